"""Which task each sample of a batch has, or which preference, from the call of a model to its adapter layers.

A base model's `forward` knows no tasks, and PEFT drops keywords that it does not know. So a hook takes `tasks` and
`preference` out of the call before the base model sees them. What it found is gone when the call ends: a part that is
called by itself has no task then. What calls with gradients were for is kept apart, as gradient checkpointing runs
layers again in the backward, when other calls may have come between. The mask of padding is kept beside them, for
methods that count tokens.

Shapes: `B` samples, `L` tokens of the longest, `T` tasks.
"""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..naming import nearest
from ..outputs import Routing
from ._losses import AddedLosses

Tasks = str | Sequence[str] | Tensor
Preference = Mapping[str, float] | Sequence[float] | Tensor
Told = str | tuple[tuple[str, float], ...]  # what a merge is for: a task, or a preference by name

_SLACK = 1e-3  # by how much the weights of a preference may miss 1: they are often rounded, or softmaxes of halves


@dataclass(frozen=True, eq=False)
class Call:
    """What one call is for."""

    tasks: Tasks | None = None
    preference: Preference | None = None
    mask_BL: Tensor | None = None  # 0 for padding
    cached: bool = False  # the mask may begin with tokens of earlier calls
    known: dict[Any, Tensor] = field(default_factory=dict)  # what layers asked for, made once

    def __str__(self) -> str:
        return " and ".join(str(value) for value in (self.tasks, self.preference) if value is not None) or "nothing"


class CurrentTasks:
    """Shared by all adapter layers of one model.

    Attributes:
        always: the task, or the tasks, of calls that name none.
        always_preference: the preference of calls that bring none.
        takes_preference: whether an adapter asks for one; else the keyword is the base model's.
        takes_mask: whether an adapter asks which tokens are padding.
        records: where its layers leave who used which expert; None asks for nothing.
        losses: what its layers add to the model's.
        merged: per kind, what those adapters were for that were merged into the weights of a model which has no
            adapter layers any more.
    """

    def __init__(self) -> None:
        self.always: Tasks | None = None
        self.always_preference: Preference | None = None
        self.takes_preference = self.takes_mask = False
        self.losses = AddedLosses()
        self.records: list[Routing] | None = None
        self.merged: set[Told] = set()
        # By thread, as the replicas of a data-parallel model run side by side and each has its own share of the batch;
        # the innermost call is the last.
        self._calls: dict[int, list[Call]] = {}
        self._repeats = False
        # By device, in whose thread a backward runs, and what is asked. Of calls with gradients since a layer last ran
        # again in a backward: the first, then one that differs if any.
        self._with_gradients: dict[tuple[torch.device | None, str], list[Call]] = {}
        self._ran_again = False

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of the base model: takes `tasks` and `preference` out of the call."""
        tasks = kwargs.pop("tasks", None)
        preference = kwargs.pop("preference", None) if self.takes_preference else None
        call = Call(
            self.always if tasks is None else tasks,
            self.always_preference if preference is None else preference,
            _mask_of(model, args, kwargs) if self.takes_mask else None,
            kwargs.get("past_key_values") is not None,
        )
        self._calls.setdefault(threading.get_ident(), []).append(call)
        for told in self.merged:
            _check_merged(told, call)
        if torch.is_grad_enabled():
            if self._ran_again:
                self._with_gradients.clear()
                self._ran_again = False
            tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            device = next((t.device for t in tensors), None)
            for asked, same in _SAME.items():
                called = self._with_gradients.setdefault((device, asked), [])
                if not called or (len(called) == 1 and not same(call, called[0])):
                    called.append(call)
        return args, kwargs

    def leave(self, *_: Any) -> None:
        """Forward hook of the base model, after an error too: the call is over."""
        calls = self._calls.get(threading.get_ident(), [])
        del calls[-1:]
        if not calls:
            self._calls.pop(threading.get_ident(), None)

    @contextlib.contextmanager
    def set(
        self, tasks: Tasks | None = None, preference: Preference | None = None, repeats: bool = False
    ) -> Iterator[None]:
        """For the calls inside, of parts of the model too; what is None stays as it is.

        `repeats`: a sample may have several rows, as beams.
        """
        before = self.always, self.always_preference, self._repeats
        if tasks is not None:
            self.always = tasks
        if preference is not None:
            self.always_preference = preference
        self._repeats = repeats
        calls = self._calls.get(threading.get_ident(), [])
        self._calls[threading.get_ident()] = [*calls, Call(self.always, self.always_preference)]
        try:
            yield
        finally:
            self.always, self.always_preference, self._repeats = before
            self._calls[threading.get_ident()] = calls
            if not calls:
                del self._calls[threading.get_ident()]

    def check_merged(self, told: Told, x: Tensor) -> None:
        """Refuses a call for anything else than what is merged into a layer's weight."""
        _check_merged(told, self._current())

    def of_samples(self, names: Sequence[str], x: Tensor) -> Tensor:
        """The number in `names` of each sample's task, `[B]`, for `x` of shape `[B, ..., D]`.

        Where the call had tasks of shape `[B, L]`, one per token of packed samples, of each token's: `[B L]`.

        Raises:
            ValueError: no task was given, an unknown one, or as many as do not fit the batch.
        """
        call = self._call(x.device)
        if call.tasks is None:
            raise ValueError(
                f"tasks: expected one of {', '.join(names)} per sample, found none; "
                "call the model with tasks=[...], or choose one for all calls with set_task"
            )
        key = ("tasks", tuple(names), len(x), x.device)
        if isinstance(call.tasks, Tensor) and call.tasks.dim() == 2:
            if call.tasks.shape != x.shape[:-1]:
                found = f"{list(call.tasks.shape)} for a layer that sees {list(x.shape)}"
                raise ValueError(f"tasks: expected one per sample, or one per token of every layer, found {found}")
            if key not in call.known:
                call.known[key] = _numbers(call.tasks.flatten(), names, call.tasks.numel()).to(x.device)
            return call.known[key]
        if key not in call.known:
            ids_B = _numbers(call.tasks, names, len(x)).to(x.device)
            call.known[key] = self._per_row("tasks", ids_B, len(x))
        return call.known[key]

    def of_all(self, names: Sequence[str], x: Tensor) -> int:
        """The number in `names` of the one task of a call, for what no sample has by itself.

        Raises:
            ValueError: no task was given, an unknown one, or several.
        """
        tasks = self._call(x.device).tasks
        if tasks is None or isinstance(tasks, str):
            return int(self.of_samples(names, x[:1]))
        found = sorted(
            set(_numbers(tasks.flatten() if isinstance(tasks, Tensor) else tasks, names, len(tasks)).tolist())
        )
        if len(found) != 1:
            listed = " and ".join(names[one] for one in found) or "none"
            raise ValueError(
                "tasks: expected one for the whole batch, as with target_parameters the weights of experts, which all "
                f"samples share, are changed for it; found {listed}"
            )
        return found[0]

    def preferences(self, names: Sequence[str], x: Tensor) -> Tensor:
        """Each sample's weights of the tasks in `names`, `[B, T]`, for `x` of shape `[B, ..., D]`.

        Raises:
            ValueError: no preference was given, or one whose weights are not of these tasks, negative, or do not sum
                to 1, or as many as do not fit the batch.
        """
        call = self._call(x.device)
        if call.preference is None:
            raise ValueError(
                f"preference: expected a weight for each of {', '.join(names)}, found none; "
                "call the model with preference={...}, or choose one for all calls with set_preference"
            )
        key = ("preference", tuple(names), len(x), x.device)
        if key not in call.known:
            weights = weights_of(call.preference, names).to(x.device)
            call.known[key] = (
                weights.expand(len(x), -1) if weights.dim() == 1 else self._per_row("preference", weights, len(x))
            )
        return call.known[key]

    def counted(self, x: Tensor) -> Tensor | None:
        """Which tokens of `x`, of shape `[B, L, D]` or flattened, are no padding: int64 `[M]`; None where all count.

        All count too without an `attention_mask` of shape `[B, L]`, where it is not of these tokens, and in a model of
        encoder and decoder, whose masks are two.
        """
        call = self._call(x.device, "padding")
        mask_BL, shape = call.mask_BL, x.shape[:-1]
        if mask_BL is None:
            return None
        if call.cached and len(shape) == 2:
            mask_BL = mask_BL[:, -shape[1] :]
        if shape not in (mask_BL.shape, (mask_BL.numel(),)):
            return None
        key = ("counted", shape, x.device)
        if key not in call.known:
            call.known[key] = mask_BL.flatten().nonzero().squeeze(1).to(x.device)
        return None if len(call.known[key]) == mask_BL.numel() else call.known[key]

    def _current(self) -> Call:
        """The call that runs; outside of all, what calls that say nothing are for."""
        calls = self._calls.get(threading.get_ident())
        return calls[-1] if calls else Call(self.always, self.always_preference)

    def _call(self, device: torch.device, asked: str = "tasks") -> Call:
        """What a layer runs for."""
        return self._of_the_backward(device, asked) if runs_again() else self._current()

    def _per_row(self, what: str, rows: Tensor, batch: int) -> Tensor:
        if len(rows) == batch:
            return rows
        if not self._repeats or not len(rows) or batch % len(rows):
            raise ValueError(f"{what}: expected {batch}, one per sample, found {len(rows)}")
        return rows.repeat_interleave(batch // len(rows), dim=0)

    def _of_the_backward(self, device: torch.device, asked: str) -> Call:
        self._ran_again = True
        called = self._with_gradients.get((device, asked))
        if not called:
            elsewhere = (calls for (_, what), calls in self._with_gradients.items() if what == asked)
            called = next(elsewhere, [self._current()])
        if len(called) > 1:
            found = f"for {' and for '.join(map(str, called))}" if asked == "tasks" else "whose padding differs"
            raise RuntimeError(
                f"{asked}: with gradient checkpointing a backward must come before the next call for other {asked}, "
                f"found calls {found}; put calls without a backward under torch.no_grad()"
            )
        return called[0]


def runs_again() -> bool:
    """Whether a layer runs in a backward, for gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


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


def weights_of(preference: Preference, names: Sequence[str]) -> Tensor:
    """`[T]`, or `[B, T]` of one per sample; by name, or in the order of the names."""
    if isinstance(preference, Mapping):
        for name in preference:
            number(name, names)
        missing = [name for name in names if name not in preference]
        if missing:
            raise ValueError(f"preference: expected a weight for each of {', '.join(names)}, found none for {missing}")
        preference = [preference[name] for name in names]
    if isinstance(preference, Tensor):
        weights = preference
    else:
        weights = torch.tensor(preference, dtype=torch.float64)
    if not weights.is_floating_point() or weights.dim() not in (1, 2) or weights.shape[-1] != len(names):
        raise ValueError(
            f"preference: expected floats of shape [{len(names)}] or [B, {len(names)}], one for each of "
            f"{', '.join(names)}, found {weights.dtype} of shape {list(weights.shape)}"
        )
    if not bool((weights >= 0).all()):  # false of NaN too
        raise ValueError(f"preference: expected weights of 0 or more, found {weights.tolist()}")
    sums = weights.sum(-1, dtype=torch.float64)
    if not bool(((sums - 1).abs() <= _SLACK).all()):
        raise ValueError(f"preference: expected weights that sum to 1, found {weights.tolist()}")
    return weights


def _same(one: Call, other: Call) -> bool:
    def plain(value: Any) -> Any:
        return value.tolist() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value

    return plain(one.tasks) == plain(other.tasks) and plain(one.preference) == plain(other.preference)


def _same_padding(one: Call, other: Call) -> bool:
    if one.mask_BL is None or other.mask_BL is None:
        return one.mask_BL is other.mask_BL
    return torch.equal(one.mask_BL, other.mask_BL)


_SAME = {"tasks": _same, "padding": _same_padding}


def _mask_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask of padding `[B, L]` of a call, if it has one."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        mask = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)).get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _check_merged(told: Told, call: Call) -> None:
    if isinstance(told, str) and call.tasks is not None:
        tasks = call.tasks
        named = {tasks} if isinstance(tasks, str) else set(tasks.tolist() if isinstance(tasks, Tensor) else tasks)
        if named - {told}:
            raise ValueError(f"tasks: expected {told!r}, which is merged into the weights, found {tasks!r}")
    if isinstance(told, tuple) and call.preference is not None:
        wanted = weights_of(dict(told), list(dict(told)))
        weights = weights_of(call.preference, list(dict(told))).detach().cpu().double()
        if not torch.allclose(weights, wanted):
            raise ValueError(
                f"preference: expected {dict(told)}, which is merged into the weights, found {call.preference!r}"
            )
