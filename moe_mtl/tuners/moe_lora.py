"""MoE-LoRA by task (Liu et al., "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical
Applications", SIGIR 2024): the baseline that MTL-LoRA's authors compare with.

    y_t = W_0 x + s sum_e softmax(W_g v_t)_e B_e A_e x

Experts of `r` ranks each, and a gate that sees the task's embedding alone.

Shapes: `N` tokens, `D` width, `E` experts, `P = E r` ranks of all, `O` output width, `T` tasks, `V` embedding width.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ._base import RankAdapter, RankConfig, at_least_float32, down_projection, up_projection
from ._tuner import register


class MoELora(RankAdapter):
    """Ranks of one expert share its weight."""

    by_task: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int, config: "MoELoraConfig"):
        super().__init__(in_features, out_features, config)
        ranks = config.num_experts * config.r
        self.a_RD = down_projection(ranks, in_features)
        self.b_OP = up_projection(out_features, ranks, config)
        self.embedding_TV = nn.Parameter(torch.randn(len(config.tasks or ()), config.embedding_dim))
        self.gate_EV = nn.Parameter(torch.empty(config.num_experts, config.embedding_dim))
        nn.init.kaiming_uniform_(self.gate_EV, a=math.sqrt(5))

    def gates(self) -> Tensor:
        """`[T, E]`, in float32 at least."""
        return at_least_float32(self.embedding_TV @ self.gate_EV.t()).softmax(-1)

    def options(self, x_ND: Tensor, told: Tensor | None) -> dict[str, Any]:
        assert told is not None
        gates_TE = self.gates()
        gates_BP = gates_TE.repeat_interleave(self.config.r, dim=1).index_select(0, told)
        return {"gate_NP": gates_BP.repeat_interleave(len(x_ND) // max(1, len(told)), dim=0), "weights": gates_TE}

    def num_active(self) -> int:
        return self.num_trained() - self.embedding_TV.numel() + self.config.embedding_dim

    def as_lora(self, told: Any) -> tuple[Tensor, Tensor]:
        return at_least_float32(self.a_RD), self.b_OP * self.gates()[told].repeat_interleave(self.config.r)


@register("MOE_LORA", MoELora)
@dataclass
class MoELoraConfig(RankConfig):
    """MoE-LoRA by task.

    Attributes:
        num_experts: `E`, of rank `r` each.
        embedding_dim: `V`.
    """

    num_experts: int = 8
    embedding_dim: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_experts", "embedding_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
