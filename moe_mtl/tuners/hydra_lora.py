"""HydraLoRA (Tian et al., "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning", NeurIPS 2024).

    y = W_0 x + s sum_i omega_i(x) B_i A x,      omega(x) = softmax(W_g x)

One down-projection, several up-projections, and a router that weighs them token by token.

Shapes: `N` tokens, `D` width, `R` ranks, `O` output width, `U` up-projections.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._base import RankAdapter, RankConfig, at_least_float32, down_projection, up_projection
from ._tuner import register


class HydraLora(RankAdapter):
    """Sums over the up-projections by a mix of stacked identities."""

    depends_on_input: ClassVar[str | None] = "a router weighs its up-projections token by token"

    expert: ClassVar[str] = "up-projection"

    def __init__(self, in_features: int, out_features: int, config: "HydraLoraConfig"):
        super().__init__(in_features, out_features, config)
        self.a_RD = down_projection(config.r, in_features)
        self.b_OP = up_projection(out_features, config.num_up_projections * config.r, config)
        self.router_UD = nn.Parameter(torch.empty(config.num_up_projections, in_features))
        nn.init.kaiming_uniform_(self.router_UD, a=math.sqrt(5))

    def options(self, x_ND: Tensor, told: Tensor | None) -> dict[str, Any]:
        gate_NU = at_least_float32(nn.functional.linear(x_ND, self.router_UD.to(x_ND.dtype))).softmax(-1)
        copies_PR = torch.eye(self.config.r, dtype=gate_NU.dtype, device=x_ND.device).repeat(len(self.router_UD), 1)
        return {
            "weights": gate_NU,
            "gate_NP": gate_NU.repeat_interleave(self.config.r, dim=1),
            "mix_TPR": copies_PR.unsqueeze(0),
            "tasks_G": torch.zeros(min(1, len(x_ND)), dtype=torch.int64, device=x_ND.device),
        }


@register("HYDRA_LORA", HydraLora)
@dataclass
class HydraLoraConfig(RankConfig):
    """HydraLoRA.

    Attributes:
        num_up_projections: `U`.
    """

    num_up_projections: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_up_projections < 1:
            raise ValueError(f"num_up_projections: expected at least 1, found {self.num_up_projections}")
