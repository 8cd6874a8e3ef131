"""MTL-LoRA (Yang et al., "MTL-LoRA: Low-Rank Adaptation for Multi-Task Learning", AAAI 2025, arXiv 2410.09437).

    y_t = W_0 x + s sum_i softmax(w_t / tau)_i B_i Lambda_t A x

One down-projection, a matrix per task on the small side, and several up-projections that each task weighs.

Shapes: `N` tokens, `D` width, `R` ranks, `O` output width, `T` tasks, `U` up-projections.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._base import RankAdapter, RankConfig, at_least_float32, down_projection, up_projection
from ._tuner import register


class MTLLora(RankAdapter):
    """Differs from the official code in: the tasks' small matrices are weighed, not an up-projection per task."""

    by_task: ClassVar[bool] = True
    expert: ClassVar[str] = "up-projection"

    def __init__(self, in_features: int, out_features: int, config: "MTLLoraConfig"):
        super().__init__(in_features, out_features, config)
        tasks, ups = len(config.tasks or ()), config.num_up_projections
        self.a_RD = down_projection(config.r, in_features)
        self.b_OP = up_projection(out_features, ups * config.r, config)
        eye = torch.ones(config.r) if config.diagonal else torch.eye(config.r)
        self.lambda_T = nn.Parameter(eye.repeat(tasks, *[1] * eye.dim()))
        self.logits_TU = nn.Parameter(torch.empty(tasks, ups))
        nn.init.kaiming_uniform_(self.logits_TU, a=math.sqrt(5))

    def weights(self) -> Tensor:
        """`[T, U]`."""
        return (at_least_float32(self.logits_TU) / self.config.temperature).softmax(-1)

    def options(self, x_ND: Tensor, told: Tensor | None) -> dict[str, Any]:
        """The mix is each task's matrix, once per up-projection and weighed for it: `[T, U R, R]`."""
        lambda_TRR = self.lambda_T.diag_embed() if self.config.diagonal else self.lambda_T
        weights_TU = self.weights()
        mix_TPR = (weights_TU[:, :, None, None] * lambda_TRR.unsqueeze(1)).flatten(1, 2)
        return {"mix_TPR": mix_TPR, "tasks_G": told, "weights": weights_TU}

    def num_active(self) -> int:
        of_tasks = self.lambda_T.numel() + self.logits_TU.numel()
        return self.num_trained() - of_tasks + of_tasks // len(self.lambda_T)

    def as_lora(self, told: Any) -> tuple[Tensor, Tensor]:
        weights_U = self.weights()[told]
        b_OR = (self.b_OP.unflatten(1, (len(weights_U), -1)) * weights_U[:, None]).sum(1)
        lambda_RR = at_least_float32(self.lambda_T[told])
        return (lambda_RR.diag() if self.config.diagonal else lambda_RR) @ at_least_float32(self.a_RD), b_OR


@register("MTL_LORA", MTLLora)
@dataclass
class MTLLoraConfig(RankConfig):
    """MTL-LoRA.

    Attributes:
        num_up_projections: `U`.
        temperature: `tau`; below 1 a task starts with one of the up-projections, at random.
        diagonal: a task's matrix is a diagonal.
    """

    num_up_projections: int = 3
    temperature: float = 0.1
    diagonal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_up_projections < 1:
            raise ValueError(f"num_up_projections: expected at least 1, found {self.num_up_projections}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected more than 0, found {self.temperature}")
