"""The one-cycle learning rate, and callbacks that keep a run's rhythm."""

import math
import time
from typing import Any

from transformers import TrainerCallback

from .balancing import LossBalancer


class OneCycle:
    """Factor of the learning rate by step (Smith 2018), without the cycle of the momentum.

    A cosine from 1/25 up to 1 over the first `rise` steps, then one down to almost 0.
    """

    def __init__(self, rise: int, steps: int):
        self.rise, self.steps = min(max(rise, 1), steps), steps

    def __call__(self, step: int) -> float:
        if step < self.rise:
            low, part = 1 / 25, 1 - step / self.rise
        else:
            low, part = 1e-5, (step - self.rise) / max(self.steps - self.rise, 1)
        return low + (1 - low) * (1 + math.cos(math.pi * min(part, 1.0))) / 2


class BalancerSteps(TrainerCallback):
    """What a scalarizer needs beyond the loss: cleared gradients, and to know when an epoch ends."""

    def __init__(self, balancer: LossBalancer):
        self.balancer = balancer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balancer.zero_grad()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balancer.end_epoch()


class SavesAfterEvaluation(TrainerCallback):
    """Puts a checkpoint that falls due with an epoch's last step off until the epoch's evaluation is done.

    A run resumed from it would otherwise begin the next epoch and never make up for that evaluation.
    """

    def __init__(self) -> None:
        self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and state.epoch == int(state.epoch):
            self.due, control.should_save = True, False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save, self.due = control.should_save or self.due, False


class SparingSaves(TrainerCallback):
    """Leaves out a checkpoint that falls due at the end of an epoch while the last one is younger than `seconds`."""

    def __init__(self, seconds: float):
        self.seconds, self.last = seconds, time.monotonic()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and time.monotonic() - self.last < self.seconds:
            control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = time.monotonic()
