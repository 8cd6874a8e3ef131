"""SMoRA (Zhao et al., "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
KDD 2026, arXiv 2501.15103).

    y = W_0 x + s B diag(g(x)) A x,      g(x) = the K largest of score(W_g x) + b, which keep their score

Every rank is an expert. A bias `b`, of the choice alone, balances their use without a loss.

Shapes: `N` tokens, `D` width, `R` ranks, `K` of them chosen per token, `O` output width.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._balance import BalancedAdapter, BalancedConfig
from ._base import at_least_float32, down_projection, up_projection
from ._tuner import register

SCORES = ("sigmoid", "softmax")


class SMoRA(BalancedAdapter):
    """No official code is known. The paper's excerpts do not say which score; `scores` and `renormalise` choose."""

    depends_on_input: ClassVar[str | None] = "its ranks are chosen token by token"

    def __init__(self, in_features: int, out_features: int, config: "SMoRAConfig"):
        super().__init__(in_features, out_features, config)
        self.a_RD = down_projection(config.r, in_features)
        self.b_OP = up_projection(out_features, config.r, config)
        self.router_RD = nn.Parameter(torch.empty(config.r, in_features))
        nn.init.kaiming_uniform_(self.router_RD, a=math.sqrt(5))

    def options(self, x_ND: Tensor, told: Tensor | None) -> dict[str, Any]:
        logits_NR = at_least_float32(nn.functional.linear(x_ND, self.router_RD.to(x_ND.dtype)))
        gate_NR = logits_NR.softmax(-1) if self.config.scores == "softmax" else logits_NR.sigmoid()
        return self.choice() | {"gate_NP": gate_NR, "renormalise": self.config.renormalise, "weights": gate_NR}


@register("SMORA", SMoRA)
@dataclass
class SMoRAConfig(BalancedConfig):
    """SMoRA.

    Attributes:
        scores: sigmoid or softmax of the router's logits.
        renormalise: divide the chosen scores by their sum.
    """

    r: int = 64
    scores: str = "sigmoid"
    renormalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores not in SCORES:
            raise ValueError(f"scores: expected one of {', '.join(SCORES)}, found {self.scores!r}")
