"""PaLoRA (Dimitriadis et al., "Pareto Low-Rank Adapters: Efficient Multi-Task Learning with Preferences", ICLR 2025).

    y = W_0 x + s sum_t lambda_t B_t A_t x

A pair per task, weighed by a preference `lambda` of 0 or more that sums to 1 and comes with the call: one model for all
trade-offs between the tasks.

    model(**batch, preference={"sql": 0.3, "chat": 0.7})

Train with the same weights on the losses, `sum_t lambda_t L_t`, and draw another `lambda` for every step.

Shapes: `N` tokens, `D` width, `R` ranks of a task, `P = T R` ranks of all, `O` output width, `T` tasks, `B` samples.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._base import RankAdapter, RankConfig, at_least_float32, down_projection, up_projection
from ._tuner import register


class PaLoRA(RankAdapter):
    """All pairs compute, as all have a weight. No official code was compared. The paper's schedule of preferences,
    which is deterministic and annealed, is not here: draw them as you like."""

    by_preference: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int, config: "PaLoRAConfig"):
        super().__init__(in_features, out_features, config)
        ranks = len(config.tasks or ()) * config.r
        self.a_RD = down_projection(ranks, in_features)
        self.b_OP = up_projection(out_features, ranks, config)

    def options(self, x_ND: Tensor, told: Tensor | None) -> dict[str, Any]:
        assert told is not None
        gate_BP = told.to(torch.promote_types(x_ND.dtype, torch.float32)).repeat_interleave(self.config.r, dim=1)
        return {"gate_NP": gate_BP.repeat_interleave(len(x_ND) // max(1, len(told)), dim=0), "weights": told}

    def used(self, weights: Tensor | None, told: Tensor | None, chosen: Tensor | None) -> dict[str, Tensor]:
        assert weights is not None
        return {"preference": weights}

    def names_of_experts(self, number: int) -> tuple[str, ...]:
        return tuple(self.config.tasks)

    def as_lora(self, told: Any) -> tuple[Tensor, Tensor]:
        weights_P = told.to(self.b_OP.device).repeat_interleave(self.config.r)
        b_OP = at_least_float32(self.b_OP)
        return at_least_float32(self.a_RD), b_OP * weights_P.to(b_OP.dtype)


@register("PALORA", PaLoRA)
@dataclass
class PaLoRAConfig(RankConfig):
    """PaLoRA.

    Attributes:
        r: of one task's pair.
        tasks: names, in the order of a preference that is no mapping.
        train_base: train the whole base model too, as the paper does. Its weights are then saved with the adapter,
            which becomes as large as the model; a LoRA from `extract_task` belongs to the trained base model.
    """

    train_base: bool = False

    def trains_base(self) -> bool:
        return self.train_base
