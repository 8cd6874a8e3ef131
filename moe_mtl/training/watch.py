"""Each task's loss, watched: means for the log, and an error that names the task when a loss is no longer finite."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class TrainingDivergedError(RuntimeError):
    """A loss is no longer finite; the message names the task."""


class LossWatch:
    """Sums of the tasks' losses since the last `reset`, in one tensor, so that watching costs one addition a step.

    Args:
        tasks: all tasks of the model; a batch may hold losses of some of them.
    """

    def __init__(self, tasks: Sequence[str]):
        self.tasks = tuple(tasks)
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self.sums: Tensor | None = None
        self.counts = dict.fromkeys(self.tasks, 0)

    def add(self, losses: Mapping[str, Tensor] | None) -> None:
        """Adds one batch. Raises ValueError for a batch without the label of any task."""
        if not losses:
            raise ValueError("the batch has no labels of any task of the model")
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        if tuple(losses) != self.tasks:
            some, values = values, values.new_zeros(len(self.tasks))
            values[[self.tasks.index(task) for task in losses]] = some
        self.sums = values if self.sums is None else self.sums.add_(values)
        for task in losses:
            self.counts[task] += 1

    def means(self) -> dict[str, float]:
        """Mean loss per batch that had the task."""
        if self.sums is None:
            return {}
        pairs = zip(self.tasks, self.sums.tolist(), strict=True)
        return {task: value / self.counts[task] for task, value in pairs if self.counts[task]}

    def require_finite(self, step: int, epoch: float | None) -> None:
        """Raises TrainingDivergedError if a loss since the last reset was NaN or infinite."""
        if self.sums is None or math.isfinite(float(self.sums.sum())):
            return
        bad = [task for task, value in zip(self.tasks, self.sums.tolist(), strict=True) if not math.isfinite(value)]
        raise TrainingDivergedError(
            f"the loss of task {', '.join(map(repr, bad))} is not finite at step {step} (epoch {epoch or 0:.2f}): "
            "lower the learning rate, set max_grad_norm, or look for extreme values in the features and labels"
        )
