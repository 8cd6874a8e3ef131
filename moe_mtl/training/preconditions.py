"""What must hold before a run does any work, so that a mistake costs a second and not an hour."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import data
from ..data.images import ImageTable
from ..data.processor import TabularProcessor
from ..files import read_json, require_replaceable
from ..models import MultiTaskModel
from .balancing import build_method
from .building import Processor
from .checkpoints import checkpoints_in, remove_stale_staging
from .metrics import counted_rows
from .recipe import Recipe, RecipeError, load_recipe, recipe_sha256
from .saved import DATA, RECIPE
from .trainer import Table


def check_folder(output_dir: Path, recipe: Recipe, resume: bool) -> None:
    """Nothing of another run is in the way; to resume, a run of this recipe and seed is there."""
    remove_stale_staging(output_dir)
    require_replaceable(output_dir)
    if not resume:
        if checkpoints_in(output_dir):
            raise FileExistsError(
                f"{output_dir} holds the checkpoints of an unfinished run: resume it, or choose another folder"
            )
        return
    saved = [path / RECIPE for path in checkpoints_in(output_dir) if (path / RECIPE).is_file()]
    if not saved:
        raise RecipeError(f"{output_dir} holds no unfinished run to resume")
    earlier = load_recipe(saved[-1])
    if recipe_sha256(earlier) != recipe_sha256(recipe) or earlier.train.seed != recipe.train.seed:
        raise RecipeError(
            f"{output_dir} holds an unfinished run of another recipe or seed: it cannot be resumed with this one"
        )


def check_same_data(output_dir: Path, info: Mapping[str, Any]) -> None:
    """A run is resumed on the rows it began with: from others the processor would learn other ids for the weights."""
    for checkpoint in checkpoints_in(output_dir):
        if (checkpoint / DATA).is_file() and read_json(checkpoint, DATA).get("sha256") != info["sha256"]:
            raise RecipeError(
                f"{output_dir} holds an unfinished run on other rows: the data changed since {checkpoint.name} was "
                "written, so it cannot be resumed"
            )


def check_methods(recipe: Recipe) -> None:
    """Unknown methods and missing solvers, before any data is read."""
    for kind, method in (("loss_balancing", recipe.loss_method), ("gradient_balancing", recipe.gradient_method)):
        if method is not None:
            build_method(kind, *method, num_tasks=2)


def check_section(recipe: Recipe) -> None:
    """What is for text, or for tables alone."""
    model, train, images = recipe.model, recipe.train, data.is_images(recipe.data.name)
    for key, value in {
        "model.adapter": model.adapter,
        "model.sparsity": model.sparsity,
        "model.dtype": model.dtype,
        "model.quantization": model.quantization,
        "train.max_length": train.max_length,
        "train.gradient_checkpointing": train.gradient_checkpointing and not images,
    }.items():
        if value:
            kind = "pictures" if images else "a table"
            raise RecipeError(f"{key}: expected none, as {recipe.data.name} is {kind}, found {value!r}")


def check_reporter(name: str) -> None:
    """What reports is installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise RecipeError(f"train.report_to: {name} is not installed: pip install {name}")


def check_metrics(recipe: Recipe, model: MultiTaskModel, processor: Processor) -> None:
    """What is to be measured can be."""
    group = processor.group_column if isinstance(processor, TabularProcessor) else None
    for task in model.config.parsed_tasks:
        if task.dense and recipe.eval.bootstrap:
            raise RecipeError(
                f"eval.bootstrap: expected 0, as the maps of task {task.name!r} are not kept, found "
                f"{recipe.eval.bootstrap}"
            )
        if "group_auc" in task.reported_metrics and group is None:
            raise RecipeError(
                f"task {task.name!r} reports group_auc: expected the column of the groups as data.group_column, "
                "found none"
            )


def check_labels(table: Table, model: MultiTaskModel) -> None:
    """Every task has a label to learn from, on a row of its sample space that weighs something."""
    for task in model.config.parsed_tasks:
        if isinstance(table, ImageTable):
            present = counted = table.present(task.name)
        else:
            labels, weights = table.tensors["labels"], table.tensors.get("sample_weights", {})
            present, counted = task.labelled(labels[task.name]), counted_rows(task, labels)
            if task.name in weights:
                counted = counted & (weights[task.name] > 0)
        if not bool(present.any()):
            raise RecipeError(f"no training row has a label of task {task.name!r}")
        if not bool(counted.any()):
            space = f", in the space of {task.space!r}" if task.space else ""
            raise RecipeError(f"no training row counts for task {task.name!r}: none has a label and a weight{space}")
