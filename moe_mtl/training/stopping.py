"""Early stopping: keeps the best evaluation's weights and puts them back, whether or not patience ran out."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..naming import nearest
from .metrics import averaged, is_maximised
from .recipe import EarlyStopping, RecipeError


class BestWeights(TrainerCallback):
    """Watches one metric of each evaluation. An evaluation on which it is not defined does not count.

    What was best is read from the trainer's own log, so that a resumed run goes on counting where the interrupted one
    stopped.

    Args:
        rule: metric and patience.
        reported: the metrics of each task, to check the metric's name.
        kept: which entries of the model's state to keep, by name; all by default.

    Attributes:
        weights: the best weights so far, on the CPU; None before the first evaluation, or if the metric was never
            defined.

    Raises:
        RecipeError: a metric that no evaluation will have.
    """

    def __init__(
        self,
        rule: EarlyStopping,
        reported: Mapping[str, Iterable[str]],
        kept: Callable[[str], bool] = lambda name: True,
    ):
        known = {"loss", *(f"{task}/loss" for task in reported)}
        known |= {f"{task}/{metric}" for task, metrics in reported.items() for metric in metrics}
        known |= {averaged(metric) for metrics in reported.values() for metric in metrics}
        if rule.metric not in known:
            raise RecipeError(
                f"train.early_stopping.metric: unknown metric {rule.metric!r}{nearest(rule.metric, sorted(known))}"
            )
        self.key, self.patience = f"eval_{rule.metric}", rule.patience
        self.sign = 1.0 if is_maximised(rule.metric) else -1.0
        self.kept = kept
        self.weights: dict[str, Tensor] | None = None
        self.warned = False

    def history(self, state: Any) -> tuple[int | None, float, int]:
        """Step of the best evaluation (None if there was none), its value, and how many that count came after it."""
        step, best, since = None, -math.inf, 0
        for entry in state.log_history:
            if math.isnan(entry.get(self.key, math.nan)):
                continue
            since += 1
            if self.sign * entry[self.key] > best:
                step, best, since = entry["step"], self.sign * entry[self.key], 0
        return step, self.sign * best, since

    def on_evaluate(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.key not in (metrics or {}):
            return
        if math.isnan((metrics or {})[self.key]):
            if not self.warned:
                self.warned = True
                warnings.warn(
                    f"early stopping: {self.key.removeprefix('eval_')} is not defined on the validation rows at step "
                    f"{state.global_step}; such evaluations do not count",
                    stacklevel=2,
                )
            return
        step, best, since = self.history(state)
        # The entry of this evaluation is the last one of the log.
        if since == 0 and step is not None:
            self.weights = {
                name: value.detach().to("cpu", copy=True).contiguous()
                for name, value in model.state_dict().items()
                if self.kept(name)
            }
            state.best_metric, state.best_global_step = best, step
        elif since >= self.patience:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.weights is None:
            return
        own = model.state_dict()
        with torch.no_grad():
            for name, value in self.weights.items():
                own[name].copy_(value)
