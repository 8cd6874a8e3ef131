"""The models a card compares, trained one seed at a time: the card's own, the shared bottom, and one model per task.

`text_variants` has the same functions for text, `image_variants` for pictures; `kinds` says which are a recipe's.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import read_json
from ..hub import CONFIG, WEIGHTS, recipes_folder
from ..training.recipe import Recipe, RecipeError, find_recipe, load_recipe, recipe_sha256
from ..training.saved import METRICS
from .bootstrap import Statistic, auc_statistic, mean_statistic

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..data import DataSplits
    from ..data.processor import TabularProcessor
    from ..models import MultiTaskModel
    from ..tasks import Task

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Variant:
    """One row of a card's table.

    Attributes:
        model: a model type, or `single_task`.
        role: `this` or `baseline`.
        recipe_name: of the recipe that it follows.
        recipe: that recipe.
        parts: the recipes that are trained, by label: one, or one per task.
    """

    model: str
    role: str
    recipe_name: str
    recipe: Recipe
    parts: Mapping[str, Recipe]

    @property
    def row(self) -> dict[str, Any]:
        """What a record says of the recipe."""
        sha256 = recipe_sha256(self.recipe)
        return {"model": self.model, "role": self.role, "recipe": self.recipe_name, "recipe_sha256": sha256}


@dataclass(frozen=True)
class Trained:
    """A variant trained with one seed.

    Attributes:
        folders: where its models are, by label; one answers all tasks, or each its own.
        metrics: split -> task -> metric -> value.
        wall_s: seconds of training and evaluation.
        curve: of text, validation over the steps.
    """

    folders: dict[str, Path]
    metrics: dict[str, Metrics]
    wall_s: float
    curve: dict[str, list[float]] | None = None


def canonical(recipe: str | Path) -> str:
    """`<data set>/<model>` for a recipe of the library, however it was named; a path for any other."""
    path = find_recipe(recipe).resolve()
    folder = recipes_folder().resolve()
    return path.relative_to(folder).with_suffix("").as_posix() if path.is_relative_to(folder) else str(recipe)


def measured_tasks(recipe: Recipe, splits: "DataSplits") -> "list[Task]":
    """The tasks a recipe trains, in the data's order."""
    return [task for task in splits.tasks if recipe.model.tasks is None or task.name in recipe.model.tasks]


def files(folder: Path) -> tuple[str, ...]:
    """What a card ships."""
    return (CONFIG, "preprocessor_config.json", WEIGHTS)


def alone(tasks: "list[Task]") -> list[str]:
    """Tasks that get a model of their own."""
    return [task.name for task in tasks if task.product_of is None]


def variants(
    recipe: str | Path,
    baseline: str | Path | None,
    data_path: str | None,
    tasks: list[str],
    dense: str = "shared_bottom",
) -> list[Variant]:
    """A card's model and its two baselines; the baselines must have the same training budget.

    Args:
        recipe: of the card's model.
        baseline: of a `dense` model on the same data, by default the recipe of that name beside the other; with one
            task at a time it is the single-task baseline.
        data_path: where the rows are, for data sets that are read from a path.
        tasks: that get a single-task model.
        dense: model type of the baseline.

    Raises:
        RecipeError: the baseline is of another type, or has other data or another budget.
    """
    overrides = [] if data_path is None else [("data.path", data_path)]
    baseline = baseline or f"{canonical(recipe).rpartition('/')[0]}/{dense}"
    own, shared = load_recipe(recipe, overrides), load_recipe(baseline, overrides)
    if shared.model.type != dense:
        raise RecipeError(f"{baseline}: expected a recipe of a {dense}, found {shared.model.type or 'model.from'!r}")
    if own.model.type in (None, dense):
        raise RecipeError(f"{recipe}: expected a new model that is no {dense}, found {own.model.type!r}")
    if own.data != shared.data or own.model.tasks != shared.model.tasks:
        raise RecipeError(f"{baseline}: expected the data and tasks of {recipe}")
    for key in ("epochs", "max_steps", "batch_size", "early_stopping"):
        if getattr(own.train, key) != getattr(shared.train, key):
            raise RecipeError(f"{baseline}: expected the train.{key} of {recipe}, so that both have the same budget")
    names = canonical(recipe), canonical(baseline)
    each = {task: dataclasses.replace(shared, model=dataclasses.replace(shared.model, tasks=[task])) for task in tasks}
    return [
        Variant(own.model.type, "this", names[0], own, {"all": own}),
        Variant("single_task", "baseline", names[1], shared, each),
        Variant(dense, "baseline", names[1], shared, {"all": shared}),
    ]


def train(variant: Variant, seed: int, runs: Path, progress: bool = True) -> Trained:
    """Trains a variant under `runs`; a run that is already there, of the same recipe and seed, is not repeated."""
    folders, wall_s = {}, 0.0
    metrics: dict[str, Metrics] = {}
    curves = []
    for label, recipe in variant.parts.items():
        folder = runs / f"{variant.model}-{label}-{recipe_sha256(recipe)[:12]}-seed{seed}"
        if not (folder / METRICS).exists():
            if folder.exists():  # an interrupted try
                shutil.rmtree(folder)
            run_recipe(recipe, folder, seed, progress)
        content = read_json(folder, METRICS)
        folders[label] = folder
        curves.append(content.get("curve"))
        wall_s += sum(content["seconds"].values())
        for split, by_task in content["metrics"].items():
            metrics.setdefault(split, {}).update(by_task)
    return Trained(folders, metrics, wall_s, mean_curve(curves))


def mean_curve(curves: "list[dict[str, list[float]] | None]") -> dict[str, list[float]] | None:
    """Over models of one task each that were measured at the same steps."""
    first = curves[0]
    if first is None or any(one is None or one["step"] != first["step"] for one in curves):
        return None
    told = [one for one in curves if one is not None]
    means = [sum(values) / len(told) for values in zip(*(one["mean_exact_match"] for one in told), strict=True)]
    return {"step": first["step"], "exact_match": means}


def run_recipe(recipe: Recipe, folder: Path, seed: int, progress: bool) -> None:
    """Trains one recipe into a folder."""
    from ..training.run import run

    run(recipe, folder, seed=seed, progress=progress)


# --- what a trained folder says on the test rows ---


def load_trained(folder: Path) -> "tuple[MultiTaskModel, Any]":
    """A run's model and processor."""
    from ..models import AutoModelForMultiTask

    model = AutoModelForMultiTask.from_pretrained(folder)
    return model, model.processor_class.from_pretrained(folder)


def cost(model: "MultiTaskModel", task: str | None = None) -> dict[str, int]:
    """Parameters that answering a task, or all, can read, and multiply-adds per row."""
    from .. import pathway

    found = pathway.cost(model, task)
    return {"parameters": found.touched, "multiply_adds": found.multiply_adds}


def cost_of(trained: Trained) -> dict[str, int]:
    """Of all models that it takes to answer every task."""
    costs = [cost(load_trained(folder)[0]) for folder in trained.folders.values()]
    return {key: sum(one[key] for one in costs) for key in costs[0]}


def task_costs(folder: Path, tasks: "list[Task]") -> dict[str, dict[str, Any]]:
    """Of each task alone, and which experts it keeps."""
    model, _ = load_trained(folder)
    return {task.name: cost(model, task.name) | _experts_of(model, task.name) for task in tasks}


def _experts_of(model: Any, task: str) -> dict[str, dict[str, Any]]:
    """Which experts a task keeps, where the config says that: a gate that chooses may have settled on few, or not."""
    config = model.extract_task(task).config.to_dict()
    if "experts_kept" not in config:
        return {}
    number, kept = config["num_experts"], config["experts_kept"]
    return {"experts": {"kept": list(range(number)) if kept is None else kept, "of": number}}


@dataclass(frozen=True)
class Answers:
    """What one seed's models say on some rows: labels and logits by task, and the processor that knows the units."""

    labels: "dict[str, Tensor]"
    logits: "dict[str, Tensor]"
    processor: "TabularProcessor"


def answer(trained: Trained, rows: Any, batch_size: int) -> Answers:
    """Logits of every task, each from the model that answers it."""
    from ..data.tensors import TensorTable
    from ..training.evaluation import gather_logits

    labels: dict[str, Tensor] = {}
    logits: dict[str, Tensor] = {}
    for folder in trained.folders.values():
        model, processor = load_trained(folder)
        table = TensorTable(processor(rows))
        labels |= table.tensors["labels"]
        logits |= gather_logits(model, table, batch_size)
    return Answers(labels, logits, processor)


def statistics(task: "Task", answers: list[Answers]) -> tuple[Statistic, int] | None:
    """The primary metric of a task as a function of row counts, one value per seed, and how many rows count.

    None for multi-label tasks, whose metric is no mean over rows and has no single curve.
    """
    import numpy as np

    if task.kind == "multilabel":
        return None
    judged = [_judge(task, one) for one in answers]
    labels_B, values_SB = judged[0][0], np.stack([values_B for _, values_B in judged])
    if task.kind == "binary":
        return auc_statistic(labels_B, values_SB), len(labels_B)
    return mean_statistic(values_SB, root=task.kind == "regression"), len(labels_B)


def _judge(task: "Task", answers: Answers) -> "tuple[np.ndarray, np.ndarray]":
    """Labels and per-row values of the counted rows: scores for a curve, hits, or squared errors in original units."""
    from ..training.metrics import counted_rows

    counted_B = counted_rows(task, answers.labels)
    logits_BC, labels_B = answers.logits[task.name][counted_B], answers.labels[task.name][counted_B]
    if task.kind == "binary":
        values = logits_BC.squeeze(1)  # not the probability: its rounding would make ties
    elif task.kind == "multiclass":
        values = (logits_BC.argmax(1) == labels_B).double()
    else:
        unscale = answers.processor.unscale
        values = (unscale(task.name, task.predict(logits_BC)) - unscale(task.name, labels_B)).double() ** 2
    return labels_B.numpy(), values.reshape(len(values), -1).mean(1).numpy()
