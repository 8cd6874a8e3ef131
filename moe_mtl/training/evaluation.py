"""One pass over a split: logits gathered as tensors, then every metric once over all rows; of maps, counts and sums.

Shapes: `B` rows of a batch, `N` rows of the split, `C` outputs of a task.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data.images import ImageTable
from ..data.tensors import TensorTable
from ..tasks import Task
from .dense_metrics import DenseMetrics
from .metrics import Metrics, compute_metrics, counted_rows, mean_metrics

# Entries of a batch that are no input of the model's answer.
TARGETS = ("labels", "sample_weights", "groups")

Unscale = Callable[[str, Tensor], Tensor]


@dataclass
class Evaluation:
    """What a model does on a split.

    Attributes:
        metrics: task -> metric -> value.
        loss: sum over tasks of weight x mean loss over the counted rows of the whole split, without regularisers; the
            classes of saliency are balanced within each batch.
        task_losses: that mean loss by task; of a dense task over the counted pixels.
        logits: task -> `[N, C]`, on the CPU; maps are not kept.
        labels: of the same tasks, as the table has them.
    """

    metrics: Metrics
    loss: float
    task_losses: dict[str, float]
    logits: dict[str, Tensor] = field(repr=False)
    labels: dict[str, Tensor] = field(repr=False)

    def flat(self) -> dict[str, float]:
        """`income/auc`, `income/loss`, `mean_auc`, `loss`: the names that early stopping and the log use."""
        out = {"loss": self.loss}
        out |= {f"{task}/loss": loss for task, loss in self.task_losses.items()}
        out |= {f"{task}/{metric}": value for task, values in self.metrics.items() for metric, value in values.items()}
        return out | mean_metrics(self.metrics)


def batches_of(table: TensorTable | ImageTable, batch_size: int) -> Iterator[dict[str, Any]]:
    """The rows in order, as views where they are in memory; pictures without augmentation."""
    for start in range(0, len(table), batch_size):
        yield table[start : start + batch_size]


def model_inputs(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What of a batch the model answers from, on its device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items() if name not in TARGETS}


@torch.no_grad()
def gather_logits(model: nn.Module, table: TensorTable, batch_size: int) -> dict[str, Tensor]:
    """Logits of all rows by task, float32 `[N, C]` on the CPU, in evaluation mode; the model's mode is put back.

    A row's logits can differ in the last bit with the number of rows computed beside it: equal `batch_size`, equal
    bits.
    """
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        parts = [model(**model_inputs(batch, device)).logits for batch in batches_of(table, batch_size)]
    finally:
        model.train(was_training)
    return {task: torch.cat([part[task].float().cpu() for part in parts]) for task in parts[0]}


def evaluate_table(
    model: nn.Module,
    table: TensorTable,
    batch_size: int,
    tasks: list[Task],
    unscale: Unscale | None = None,
) -> Evaluation:
    """Metrics and losses of a model on encoded rows.

    Args:
        model: any model of the zoo.
        table: inputs and `labels`; optional `sample_weights` and `groups` (int64 `[N]`, for `group_auc`).
        batch_size: rows per forward pass.
        tasks: what to measure; a task without labels in the table is left out.
        unscale: the processor's `unscale`, for regression in original units.

    Raises:
        ValueError: the table has no labels.
    """
    labels = table.tensors.get("labels")
    if not labels:
        raise ValueError("evaluation needs labels, and these rows have none")
    weights = table.tensors.get("sample_weights", {})
    groups = table.tensors.get("groups")
    logits = gather_logits(model, table, batch_size)
    tasks = [task for task in tasks if task.name in logits and task.name in labels]
    losses = {
        task.name: float(
            task.loss(logits[task.name], labels[task.name], weights.get(task.name), counted_rows(task, labels))
        )
        for task in tasks
    }
    metrics = compute_metrics(tasks, logits, labels, weights, None if groups is None else groups.numpy(), unscale)
    return Evaluation(
        metrics, _weighted(tasks, losses), losses, logits, {task.name: labels[task.name] for task in tasks}
    )


@torch.no_grad()
def evaluate_images(
    model: nn.Module, table: ImageTable, batch_size: int, tasks: list[Task], unscale: Unscale | None = None
) -> Evaluation:
    """Metrics and losses of a model on pictures, in one pass that keeps no map.

    Args:
        model: any model of pictures; computes in evaluation mode, and its mode is put back.
        table: pictures and labels, taken without augmentation.
        batch_size: pictures per forward pass.
        tasks: what to measure; a task that the table does not have is left out.
        unscale: the processor's `unscale`, for regression in original units.

    Raises:
        ValueError: the table is empty or has none of the tasks.
    """
    known = [task.name for task in table.tasks]
    tasks = [task for task in tasks if task.name in known]
    if not tasks or not len(table):
        raise ValueError(
            f"evaluation needs pictures with labels, found {len(table)} with those of {', '.join(known) or 'no task'}"
        )
    names = [task.name for task in tasks]
    dense = {task.name: DenseMetrics(task) for task in tasks if task.dense}
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names if name not in dense}
    terms = {name: [0.0, 0.0] for name in dense}
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for batch in batches_of(table, batch_size):
            logits = model(**model_inputs(batch, device), tasks=names).logits
            for task in tasks:
                found, labels = logits[task.name].float(), batch["labels"][task.name]
                if not task.dense:
                    kept[task.name].append((found.cpu(), labels))
                    continue
                for i, term in enumerate(task.loss_terms(found, labels.to(device))):
                    terms[task.name][i] += float(term)
                dense[task.name].add(found, labels)
    finally:
        model.train(was_training)
    whole = {name: [torch.cat(parts) for parts in zip(*pairs, strict=True)] for name, pairs in kept.items()}
    logits = {name: pair[0] for name, pair in whole.items()}
    labels = {name: pair[1] for name, pair in whole.items()}
    losses, metrics = {}, compute_metrics(tasks, logits, labels, unscale=unscale)
    for task in tasks:
        if task.dense:
            total, weight = terms[task.name]
            losses[task.name] = total / weight if weight else 0.0
            metrics[task.name] = dense[task.name].values()
        else:
            losses[task.name] = float(task.loss(logits[task.name], labels[task.name]))
    metrics = {name: metrics[name] for name in names}
    return Evaluation(metrics, _weighted(tasks, losses), losses, logits, labels)


def evaluate(
    model: nn.Module,
    table: TensorTable | ImageTable,
    batch_size: int,
    tasks: list[Task],
    unscale: Unscale | None = None,
) -> Evaluation:
    """`evaluate_images` or `evaluate_table`."""
    if isinstance(table, ImageTable):
        return evaluate_images(model, table, batch_size, tasks, unscale)
    return evaluate_table(model, table, batch_size, tasks, unscale)


def _weighted(tasks: list[Task], losses: Mapping[str, float]) -> float:
    return sum(task.weight * losses[task.name] for task in tasks)
