"""Timing in turns, so that what else the machine does hits every contender alike."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Runs its block with that many threads of torch; None leaves torch its choice."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one figure per round.

    Attributes:
        seconds: by round; the same round of two contenders was measured side by side.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)

    def ratio(self, other: "Timing") -> float:
        """Median over the rounds of this one's time over the other's."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def alternate(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    slice_seconds: float = 0.0,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, Timing]:
    """Measures the contenders round by round, in an order that rotates, after one warm-up call each.

    Args:
        calls: contender -> what to time.
        rounds: how many measurements of each.
        slice_seconds: a measurement repeats its call for about that long (fast calls need it); 0 for one call.
        wait: ends a measurement, on a device that computes while its host goes on.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        wait()
        if slice_seconds:
            once = min(_time(call, 1, wait) for _ in range(3))
            repeats[name] = max(1, math.ceil(slice_seconds / once))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(_time(calls[name], repeats.get(name, 1), wait))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def _time(call: Callable[[], object], repeats: int, wait: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats
