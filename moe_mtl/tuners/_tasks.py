"""Which task each sample of a batch has, from the call of a model to its adapter layers.

A base model's `forward` knows no tasks, and PEFT drops keywords that it does not know. So a hook takes `tasks` out of
the call before the base model sees it. What it found stays until the next call; and what calls with gradients were for
is kept apart, as gradient checkpointing runs layers again in the backward, when other calls may have come between.

Shapes: `B` samples.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..naming import nearest

Tasks = str | Sequence[str] | Tensor


class CurrentTasks:
    """Shared by all adapter layers of one model.

    Attributes:
        always: the task, or the tasks, of calls that name none.
        merged: the task whose adapters were merged into the weights of a model that has no adapter layers any more.
    """

    def __init__(self) -> None:
        self.always: Tasks | None = None
        self.merged: str | None = None
        # By device, as the replicas of a data-parallel model run side by side and each has its own share of the batch.
        self._of_call: dict[torch.device | None, Tasks | None] = {}
        self._last: Tasks | None = None
        self._repeats = False
        self._known: dict[Any, Tensor] = {}
        # Of calls with gradients since a layer last ran again in a backward: the first's tasks, then other ones if any.
        self._with_gradients: dict[torch.device | None, list[Tasks | None]] = {}
        self._ran_again = False

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the base model: takes `tasks` out of the call."""
        tasks = kwargs.pop("tasks", None)
        if tasks is None:
            tasks = self.always
        if self.merged is not None:
            _check_merged(self.merged, tasks)
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = next((t.device for t in tensors), None)
        if not getattr(model, "_is_replica", False):
            self._of_call.clear()
        self._of_call[device] = self._last = tasks
        self._known.clear()
        if torch.is_grad_enabled():
            if self._ran_again:
                self._with_gradients.clear()
                self._ran_again = False
            called = self._with_gradients.setdefault(device, [])
            if not called or (len(called) == 1 and not _same(tasks, called[0])):
                called.append(tasks)
        return args, kwargs

    @contextlib.contextmanager
    def set(self, tasks: Tasks | None, repeats: bool = False) -> Iterator[None]:
        """For the calls inside, of parts of the model too. `repeats`: a sample may have several rows, as beams."""
        before = self.always, self._repeats, self._of_call, self._last
        self.always, self._repeats, self._of_call, self._last = tasks, repeats, {}, tasks
        self._known.clear()
        try:
            yield
        finally:
            self.always, self._repeats, self._of_call, self._last = before
            self._known.clear()

    def check_merged(self, task: str, x: Tensor) -> None:
        """Refuses a call for other tasks than the one that is merged into a layer's weight."""
        _check_merged(task, self._of_call.get(x.device, self._last))

    def of_samples(self, names: Sequence[str], x: Tensor) -> Tensor:
        """The number in `names` of each sample's task, `[B]`, for `x` of shape `[B, ..., D]`.

        Raises:
            ValueError: no task was given, an unknown one, or as many as do not fit the batch.
        """
        again = torch._C._current_graph_task_id() != -1  # in a backward
        tasks = self._of_the_backward(x.device) if again else self._of_call.get(x.device, self._last)
        if tasks is None:
            raise ValueError(
                f"tasks: expected one of {', '.join(names)} per sample, found none; "
                "call the model with tasks=[...], or choose one for all calls with set_task"
            )
        key = (tuple(names), len(x), x.device, again)
        if key not in self._known:
            ids_B = _numbers(tasks, names, len(x)).to(x.device)
            if len(ids_B) != len(x):
                if not self._repeats or len(x) % len(ids_B):
                    raise ValueError(f"tasks: expected {len(x)}, one per sample, found {len(ids_B)}")
                ids_B = ids_B.repeat_interleave(len(x) // len(ids_B))
            self._known[key] = ids_B
        return self._known[key]

    def _of_the_backward(self, device: torch.device) -> Tasks | None:
        self._ran_again = True
        called = self._with_gradients.get(device) or next(iter(self._with_gradients.values()), [self._last])
        if len(called) > 1:
            raise RuntimeError(
                "tasks: with gradient checkpointing a backward must come before the next call for other tasks, found "
                f"calls for {' and for '.join(map(str, called))}; put calls without a backward under torch.no_grad()"
            )
        return called[0]


def number(task: str, names: Sequence[str]) -> int:
    """Its place among the names; an unknown one is a ValueError."""
    if task not in names:
        raise ValueError(f"tasks: expected one of {', '.join(names)}, found {task!r}{nearest(task, names)}")
    return list(names).index(task)


def _numbers(tasks: Tasks, names: Sequence[str], batch: int) -> Tensor:
    if isinstance(tasks, str):
        return torch.full((batch,), number(tasks, names))
    if not isinstance(tasks, Tensor):
        return torch.tensor([number(task, names) for task in tasks], dtype=torch.int64)
    if tasks.dim() != 1 or tasks.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tasks: expected int64 of shape [{batch}], found {tasks.dtype} of shape {list(tasks.shape)}")
    if tasks.numel() and not 0 <= int(tasks.min()) <= int(tasks.max()) < len(names):
        raise ValueError(f"tasks: expected numbers in [0, {len(names)}), found {tasks.tolist()}")
    return tasks.long()


def _same(one: Tasks | None, other: Tasks | None) -> bool:
    def plain(tasks: Tasks | None) -> Any:
        return tasks.tolist() if isinstance(tasks, Tensor) else tasks if tasks is None else list(tasks)

    return plain(one) == plain(other)


def _check_merged(merged: str, tasks: Tasks | None) -> None:
    if tasks is None:
        return
    named = {tasks} if isinstance(tasks, str) else set(tasks.tolist() if isinstance(tasks, Tensor) else tasks)
    if named - {merged}:
        raise ValueError(f"tasks: expected {merged!r}, which is merged into the weights, found {tasks!r}")
