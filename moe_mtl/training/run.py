"""A recipe from beginning to end: load, fit, train, measure, save. Nothing that is not whole appears."""

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from .. import data
from ..data.images import ImageSplits, ImageTable
from ..data.processor import TabularProcessor
from ..data.splits import DataSplits
from ..data.tensors import TensorTable
from ..data.text import TextSplits
from ..data.vision_processor import VisionProcessor
from ..files import staged_folder, write_atomically
from ..hub import resolve, write_manifest
from ..models import AutoModelForMultiTask, MultiTaskModel
from ..tasks import Task, check_task_names
from .building import Processor, build
from .callbacks import ExpertHealth, Progress
from .checkpoints import keep_last_checkpoints, remove_stale_staging
from .crash_safe import CrashSafeTrainer
from .evaluation import Evaluation
from .evaluation import evaluate as evaluate_rows
from .metrics import Metrics, standard_errors
from .preconditions import (
    check_folder,
    check_labels,
    check_methods,
    check_metrics,
    check_reporter,
    check_same_data,
    check_section,
)
from .recipe import Recipe, RecipeError, TrainSection, recipe_sha256
from .saved import DATA, METRICS, RECIPE, plain, recipe_of
from .trainer import MultiTaskTrainer, Table

if TYPE_CHECKING:
    from .text_trainer import TextEvaluation

# Nothing chosen: ten passes.
DEFAULT_EPOCHS = 10
SECONDS_BETWEEN_SAVES = 30.0
SCHEDULES = {
    "constant": "constant_with_warmup",
    "linear": "linear",
    "cosine": "cosine",
    "polynomial": "polynomial",
    "one_cycle": "constant",
}
POWER = {"power": 0.9, "lr_end": 0.0}  # of the polynomial schedule: "poly" in the field of dense prediction
LIBRARIES = ("torch", "transformers", "moe-mtl")


@dataclass
class RunResult:
    """What a run gave.

    Attributes:
        metrics: split -> task -> metric -> value.
        output_dir: the saved model, with processor, recipe and metrics.
        record: what `metrics.json` holds: metrics, losses, hashes, seed, steps, seconds, versions.
        model, processor: as saved; of text, the processor is the tokeniser.
    """

    metrics: dict[str, Metrics]
    output_dir: Path
    record: dict[str, Any]
    model: Any = field(repr=False)
    processor: Any = field(repr=False)


def run(
    recipe: Recipe,
    output_dir: str | Path,
    seed: int | None = None,
    progress: bool = True,
    resume: bool = False,
    tell: Callable[[str], None] | None = None,
) -> RunResult:
    """Trains a recipe and saves model, processor, recipe and metrics in `output_dir`.

    Args:
        recipe: from `load_recipe`.
        output_dir: a new or empty folder, or one that holds a saved model, which is replaced at the end.
        seed: instead of the recipe's.
        progress: show a bar, if the error stream is a terminal.
        resume: go on from the last complete checkpoint of an interrupted run of the same recipe in `output_dir`.
        tell: gets, before training, one line per column whose kind was inferred from the table.

    Raises:
        RecipeError, DataError: before training, for what cannot be.
        FileExistsError: the folder holds something else, or an unfinished run that `resume` was not asked for.
        TrainingDivergedError: a loss is not finite; a model that stood in the folder is as it was.
        OSError: the disk is full; likewise.
    """
    if seed is not None:
        recipe.train.seed = seed
    recipe.validate()
    check_methods(recipe)
    check_reporter(recipe.train.report_to)
    output_dir = Path(output_dir)
    check_folder(output_dir, recipe, resume)
    if data.is_text(recipe.data.name):
        from .text_run import run_text

        return run_text(recipe, output_dir, progress, resume, tell)
    check_section(recipe)
    start = time.perf_counter()
    splits = load_data(recipe)
    assert not isinstance(splits, TextSplits)
    if resume:
        check_same_data(output_dir, splits.info)
    if tell is not None and recipe.model.source is None:  # a saved model has its columns
        for note in splits.info.get("inferred", ()):
            tell(note)
    set_seed(recipe.train.seed)
    model, processor = build(recipe, splits)
    check_metrics(recipe, model, processor)
    processor.to_json()  # raises for vocabularies too large to be saved
    tables = {
        name: encoded(part, processor)
        for name, part in splits.parts().items()
        if name in {"train", "validation", *recipe.eval.splits}
    }
    check_labels(tables["train"], model)
    output_dir.mkdir(parents=True, exist_ok=True)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = make_trainer(
        recipe, model, processor, tables["train"], tables["validation"], splits.info, output_dir, progress
    )
    prepared = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    trained = time.perf_counter()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    check_finite(model)
    shipped = rounded(model, recipe.train.save_dtype)
    results = {
        name: evaluate_rows(
            model, tables[name], recipe.train.eval_batch_size, model.config.parsed_tasks, processor.unscale
        )
        for name in recipe.eval.splits
    }
    errors = _errors(recipe, model, processor, tables, results)
    told = {
        **({"standard_error": errors} if errors else {}),
        "model_type": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    record = record_of(recipe, splits, trainer, results, told, (start, prepared, trained), LIBRARIES)

    def save(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=shipped)
        processor.save_pretrained(folder)

    save_run(output_dir, recipe, record, save)
    return RunResult(record["metrics"], output_dir, record, model, processor)


def evaluate(
    folder: str | Path,
    split: str = "test",
    recipe: Recipe | None = None,
    overrides: Iterable[tuple[str, str]] = (),
    tasks: str | Sequence[str] | None = None,
) -> "Evaluation | TextEvaluation":
    """Measures a saved model again; on the same rows the numbers are those of its `metrics.json`.

    Args:
        folder: a folder, zoo name or Hub id.
        split: validation, test or train.
        recipe: where the rows come from; by default the recipe saved beside the model.
        overrides: of that recipe, for example `("data.path", "...")`.
        tasks: which; only what they need is loaded, and the loss is theirs. By default all.

    Raises:
        RecipeError: an unknown split.
        UnknownTaskError: a task that the model does not have.
    """
    if split not in ("train", "validation", "test"):
        raise RecipeError(f"split: expected train, validation or test, found {split!r}")
    folder = resolve(folder)
    if recipe is None:
        recipe = recipe_of(folder, overrides)
        options, trained = recipe.data.options, recipe_of(folder).data.options
        for key in ("tasks", "features", "missing_values"):
            if options.get(key) != trained.get(key):
                raise RecipeError(
                    f"data.{key}: expected none, as the saved model keeps its own, found {options.get(key)!r}"
                )
    if data.is_text(recipe.data.name):
        from .text_run import evaluate_saved_text

        return evaluate_saved_text(folder, split, recipe, tasks)
    model, processor, measured = load_measured(folder, tasks)
    table = encoded(load_data(recipe).parts()[split], processor, measured)
    return evaluate_rows(model, table, recipe.train.eval_batch_size, measured, processor.unscale)


def load_measured(folder: Path, tasks: str | Sequence[str] | None) -> tuple[MultiTaskModel, Processor, list[Task]]:
    """A saved model with what `tasks` need, its processor, and these tasks with the spaces that they count within.

    Raises:
        UnknownTaskError: a task that the model does not have.
    """
    model = AutoModelForMultiTask.from_pretrained(folder, tasks=tasks).eval()
    processor = model.processor_class.from_pretrained(folder)
    # The processor keeps the spaces, also those whose own task was not loaded; the recipe's weights are the model's.
    known = {task.name: task for task in processor.parsed_tasks}
    weights = {task.name: task.weight for task in model.config.parsed_tasks}
    names = check_task_names(tasks, model.tasks)
    return model, processor, [dataclasses.replace(known[name], weight=weights[name]) for name in names]


def encoded(part: Any, processor: Processor, tasks: Sequence[Task] | None = None) -> Table:
    """A part of a data set as a model takes it; of a table only the labels that `tasks` are measured with.

    Raises:
        RecipeError: pictures for a model of tables, or the other way.
        DataError: pictures of another size than the model's.
    """
    if isinstance(part, ImageTable) != isinstance(processor, VisionProcessor):
        found = ["rows of a table", "pictures"]
        data_are = isinstance(part, ImageTable)
        raise RecipeError(f"data: expected {found[not data_are]}, as the model takes, found {found[data_are]}")
    if isinstance(processor, TabularProcessor):
        return TensorTable(processor(part, labels=True if tasks is None else [task.name for task in tasks]))
    if part.processor.image_size != processor.image_size:
        raise data.DataError(
            f"expected pictures of {list(processor.image_size)}, as the model takes, found "
            f"{list(part.processor.image_size)}"
        )
    return part.with_processor(processor)


def load_data(recipe: Recipe) -> DataSplits | TextSplits | ImageSplits:
    """The rows of a recipe. Raises DataError for an unknown data set or option."""
    options = dict(recipe.data.options)
    if recipe.data.path is not None:
        options["path"] = recipe.data.path
    return data.load(recipe.data.name, **options)


def make_trainer(
    recipe: Recipe,
    model: MultiTaskModel,
    processor: Processor,
    train: Table,
    validation: Table,
    info: Mapping[str, Any],
    output_dir: Path,
    progress: bool = False,
) -> MultiTaskTrainer:
    """The trainer of a recipe's `train` section; `info` is what the data say of themselves."""
    section = recipe.train
    trainer = MultiTaskTrainer(
        model,
        training_arguments(section, output_dir),
        train,
        validation,
        processor,
        loss_balancing=recipe.loss_method,
        gradient_balancing=recipe.gradient_method,
        task_sampling=section.task_sampling,
        **trainer_options(recipe, info, output_dir, progress),
    )

    def report(numbers: dict[str, float]) -> None:
        trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, numbers)

    trainer.add_callback(ExpertHealth(validation, report if section.report_to != "none" else None))
    return trainer


def trainer_options(recipe: Recipe, info: Mapping[str, Any], output_dir: Path, progress: bool) -> dict[str, Any]:
    """What every trainer of a recipe, on data that say `info` of themselves, is told beside its arguments."""
    section = recipe.train
    callbacks: list[Any] = [_reporter(section.report_to, output_dir)] if section.report_to != "none" else []
    if progress:
        callbacks.append(Progress())
    return {
        "callbacks": callbacks,
        "early_stopping": section.early_stopping,
        "one_cycle": section.schedule == "one_cycle",
        "optimizer_name": section.optimizer,
        "seconds_between_saves": SECONDS_BETWEEN_SAVES,
        "saved_along": {RECIPE: recipe.to_yaml(), DATA: json.dumps(plain(info), indent=1) + "\n"},
    }


def training_arguments(section: TrainSection, output_dir: str | Path) -> TrainingArguments:
    """What `transformers.Trainer` is told."""
    evaluation = (
        {"eval_strategy": "epoch"}
        if section.eval_steps is None
        else {"eval_strategy": "steps", "eval_steps": section.eval_steps}
    )
    saving: dict[str, Any] = {"save_strategy": "epoch"}
    if section.save_steps is not None:
        saving = (
            {"save_strategy": "steps", "save_steps": section.save_steps}
            if section.save_steps
            else {"save_strategy": "no"}
        )
    return TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=section.epochs or DEFAULT_EPOCHS,
        max_steps=section.max_steps or -1,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=section.eval_batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        adam_beta1=section.betas[0],
        adam_beta2=section.betas[1],
        max_grad_norm=section.max_grad_norm,
        lr_scheduler_type=SCHEDULES[section.schedule],
        lr_scheduler_kwargs=POWER if section.schedule == "polynomial" else None,
        warmup_steps=section.warmup or 0,
        bf16=section.precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        seed=section.seed,
        data_seed=section.seed,
        logging_steps=section.logging_steps,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        save_total_limit=2,
        **evaluation,
        **saving,
    )


def _reporter(name: str, output_dir: Path) -> Any:
    from transformers import integrations

    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        return integrations.TensorBoardCallback(SummaryWriter(str(output_dir / "runs")))
    return {"trackio": integrations.TrackioCallback, "wandb": integrations.WandbCallback}[name]()


def check_finite(model: nn.Module) -> None:
    """Raises RuntimeError where training left what is no number."""
    bad = [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if bad:
        raise RuntimeError(
            f"training left values that are not finite in {', '.join(bad[:3])}: lower the learning rate or set "
            "max_grad_norm"
        )


@torch.no_grad()
def rounded(model: nn.Module, save_dtype: str | None) -> dict[str, Tensor] | None:
    """Rounds the parameters to what `save_dtype` holds. Returns the state to save, None for the model's own.

    Raises:
        RuntimeError: a value is too large for it.
    """
    if save_dtype is None:
        return None
    state = model.state_dict()
    for name, parameter in model.named_parameters():
        state[name] = parameter.to(getattr(torch, save_dtype))
        if not bool(state[name].isfinite().all()):
            raise RuntimeError(
                f"train.save_dtype: {save_dtype} cannot hold {name}, which has {float(parameter.abs().max()):.3g}"
            )
        parameter.copy_(state[name])
    return state


def _errors(
    recipe: Recipe,
    model: MultiTaskModel,
    processor: Processor,
    tables: dict[str, Table],
    results: dict[str, Evaluation],
) -> dict[str, Metrics]:
    if not recipe.eval.bootstrap:
        return {}
    errors = {}
    for name, result in results.items():
        table = tables[name]
        further = table.tensors if isinstance(table, TensorTable) else {}
        errors[name] = standard_errors(
            model.config.parsed_tasks,
            result.logits,
            result.labels,
            further.get("sample_weights"),
            further["groups"].numpy() if "groups" in further else None,
            processor.unscale,
            resamples=recipe.eval.bootstrap,
        )
    return errors


def record_of(
    recipe: Recipe,
    splits: DataSplits | TextSplits | ImageSplits,
    trainer: CrashSafeTrainer,
    results: Mapping[str, Any],
    told: dict[str, Any],
    times: tuple[float, float, float],
    libraries: Iterable[str],
) -> dict[str, Any]:
    """What `metrics.json` holds.

    Args:
        recipe, splits, trainer: of the run.
        results: what was measured, by split.
        told: what there is to say of the model.
        times: when it began, when training began, and when it ended.
        libraries: whose versions the numbers depend on.
    """
    start, prepared, trained = times
    return plain(
        {
            "metrics": {name: result.metrics for name, result in results.items()},
            "loss": {name: result.loss for name, result in results.items()},
            **told,
            "seed": recipe.train.seed,
            "recipe_sha256": recipe_sha256(recipe),
            "data": splits.info,
            "eval_batch_size": recipe.train.eval_batch_size,
            "steps": trainer.state.global_step,
            "best_step": trainer.state.best_global_step if trainer.best is not None else None,
            "seconds": {
                "prepare": prepared - start,
                "train": trained - prepared,
                "evaluate": time.perf_counter() - trained,
            },
            "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        }
    )


def save_run(output_dir: Path, recipe: Recipe, record: dict[str, Any], save: Callable[[Path], None]) -> None:
    """The folder of a run, at once; `save` writes the model's own files."""
    with staged_folder(output_dir) as staging:
        save(staging)
        write_atomically(staging / RECIPE, recipe.to_yaml())
        write_atomically(staging / METRICS, json.dumps(record, indent=1, allow_nan=False) + "\n")
        write_manifest(staging)
    keep_last_checkpoints(output_dir, 0)
    remove_stale_staging(output_dir)
