"""FlyLoRA (Zou et al., "FlyLoRA: Boosting Task Decoupling and Parameter Efficiency via Implicit Rank-Wise
Mixture-of-Experts", NeurIPS 2025).

    y = W_0 x + s B (m(x) * A x),      m(x) = 1 for the K largest of |A x| + b, else 0

`A` is sparse, random and frozen, and is the router too. A bias `b`, of the choice alone, balances the ranks.

Shapes: `N` tokens, `D` width, `R` ranks, `K` of them chosen per token, `O` output width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from ._balance import BalancedAdapter, BalancedConfig
from ._base import up_projection
from ._tuner import register

NORMS = ("paper", "unit")


class FlyLora(BalancedAdapter):
    """Differs from the official code in: ranks are chosen by magnitude, not by their signed value; the gradient reaches
    the input; the bias moves once per optimiser step, in training alone, by shares and not by counts."""

    depends_on_input: ClassVar[str | None] = "its ranks are chosen token by token"

    def __init__(self, in_features: int, out_features: int, config: "FlyLoraConfig"):
        super().__init__(in_features, out_features, config)
        nonzero = max(1, in_features * config.num_selected // config.r)
        std = 1 / config.r if config.row_norm == "paper" else nonzero**-0.5
        where_RD = torch.rand(config.r, in_features).argsort(-1) < nonzero
        self.register_buffer("a_RD", torch.randn(config.r, in_features) * std * where_RD)
        self.b_OP = up_projection(out_features, config.r, config)


@register("FLYLORA", FlyLora)
@dataclass
class FlyLoraConfig(BalancedConfig):
    """FlyLoRA.

    Attributes:
        row_norm: of `A`. `paper`: entries of standard deviation `1 / r`, so that a row grows with the width and is
            short in a narrow model; `unit`: rows of length 1 on average, whatever the width.
    """

    r: int = 32
    alpha: float = 64.0
    row_norm: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_norm not in NORMS:
            raise ValueError(f"row_norm: expected one of {', '.join(NORMS)}, found {self.row_norm!r}")
