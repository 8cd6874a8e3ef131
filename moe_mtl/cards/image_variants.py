"""What the card of a vision model compares: the same functions as `variants` has for tables.

The baselines are plain vision transformers of the recipe `multi_task_vit` beside the card's: one for all tasks, which
costs a token what the card's model does, and one per task.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.recipe import RecipeError
from . import variants as tables
from .bootstrap import Statistic
from .variants import Trained, Variant, files, measured_tasks

if TYPE_CHECKING:
    import numpy as np

    from ..data import ImageSplits, ImageTable
    from ..models import MultiTaskModel
    from ..tasks import Task

DENSE = "multi_task_vit"
CLOSE = 0.15  # by what share the multiply-adds of one task may differ and still be called equal

__all__ = [
    "alone",
    "answer",
    "check_costs",
    "cost_of",
    "files",
    "measured_tasks",
    "statistics",
    "task_costs",
    "variants",
]


def alone(tasks: "list[Task]") -> list[str]:
    """Tasks that get a model of their own."""
    return [task.name for task in tasks]


def variants(recipe: str | Path, baseline: str | Path | None, data_path: str | None, tasks: list[str]) -> list[Variant]:
    """A card's model and its two baselines, see `variants.variants`."""
    return tables.variants(recipe, baseline, data_path, tasks, dense=DENSE)


def cost_of(trained: Trained) -> dict[str, int]:
    """Of all models that it takes to answer every task."""
    costs = [_cost(tables.load_trained(folder)[0]) for folder in trained.folders.values()]
    return {key: sum(one[key] for one in costs) for key in costs[0]}


def task_costs(folder: Path, tasks: "list[Task]") -> dict[str, dict[str, int]]:
    """Of each task alone."""
    model, _ = tables.load_trained(folder)
    return {task.name: _cost(model.extract_task(task.name)) for task in tasks}


def _cost(model: "MultiTaskModel") -> dict[str, int]:
    """Parameters stored: which experts an image touches depends on the image. Multiply-adds of one image."""
    return {"parameters": model.num_parameters(), "multiply_adds": tables.cost(model)["multiply_adds"]}


def check_costs(chosen: "list[Variant]", splits: "ImageSplits") -> None:
    """Raises RecipeError unless one task costs about as much in the dense model: then a difference is the experts'.

    Told by untrained models, before anything is trained.
    """
    from ..training.building import build

    own, dense = (next(v for v in chosen if v.model == model) for model in (chosen[0].model, DENSE))
    costs = []
    for variant in (own, dense):
        model, _ = build(variant.recipe, splits)
        costs.append(max(tables.cost(model, task)["multiply_adds"] for task in model.tasks))
    if abs(costs[0] - costs[1]) > CLOSE * costs[1]:
        raise RecipeError(
            f"{dense.recipe_name}: expected about as many multiply-adds for one task as {own.recipe_name}, "
            f"{costs[0]:,}, found {costs[1]:,}"
        )


# Of each task, per test image: totals of the metric's meter, or of a class task whether the answer is right.
Answers = dict[str, "np.ndarray"]


def answer(trained: Trained, rows: "ImageTable", batch_size: int) -> Answers:
    """Per image what its metric is made of, by task, each from the model that answers it."""
    import numpy as np
    import torch

    from ..training.dense_metrics import DenseMetrics

    found: Answers = {}
    for folder in trained.folders.values():
        model, _ = tables.load_trained(folder)
        model.eval()
        told: dict[str, list[np.ndarray]] = {task.name: [] for task in model.config.parsed_tasks}
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            with torch.no_grad():
                logits = model(batch["pixel_values"]).logits
            for task in model.config.parsed_tasks:
                labels = batch["labels"][task.name]
                if not task.dense:
                    told[task.name].append(_hits(task, logits[task.name], labels))
                    continue
                for i in range(len(labels)):
                    metrics = DenseMetrics(task)
                    metrics.add(logits[task.name][i : i + 1], labels[i : i + 1])
                    told[task.name].append(metrics.meters[0].totals[None].copy())
        found |= {task: np.concatenate(values) for task, values in told.items()}
    return found


def _hits(task: "Task", logits_BC: Any, labels_B: Any) -> "np.ndarray":
    """`[B, 2]`: whether the answer is right, and whether there is a label at all."""
    import numpy as np

    counted_B = task.labelled(labels_B)
    right_B = (logits_BC.argmax(1) if task.kind == "multiclass" else logits_BC[:, 0] > 0) == labels_B
    return np.stack([(right_B & counted_B).numpy(), counted_B.numpy()], axis=1).astype(np.float64)


def statistics(task: "Task", answers: list[Answers]) -> tuple[Statistic, int] | None:
    """The primary metric of a task as a function of how often each image counts, one value per seed.

    None for kinds whose metric is none of these.
    """
    import numpy as np

    from ..training.dense_metrics import DenseMetrics

    rows = [one[task.name] for one in answers]
    if not task.dense:
        if task.reported_metrics[0] != "accuracy":
            return None
        right_SB, counted_B = np.stack([values[:, 0] for values in rows]), rows[0][:, 1]
        return lambda counts_B: right_SB @ counts_B / (counted_B @ counts_B), len(counted_B)
    meter = DenseMetrics(task).meters[0]
    metric = task.reported_metrics[0]

    def statistic(counts_B: np.ndarray) -> np.ndarray:
        found = np.full(len(rows), np.nan)
        for s, totals_B in enumerate(rows):
            meter.totals = np.tensordot(counts_B, totals_B, axes=1)
            found[s] = meter.values()[metric]
        return found

    return statistic, len(rows[0])
