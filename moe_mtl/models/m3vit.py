"""M³ViT: a vision transformer whose every second MLP is a sparse mixture of experts, with gates that know the task.

Fan et al., "M³ViT: Mixture-of-Experts Vision Transformer for Efficient Multi-task Learning with Model-Accelerator
Co-design", NeurIPS 2022, section 3. Blocks 1, 3, 5, ... (from 0) have experts. A task's path is its gates, the experts
that they choose, the blocks, and its own decoder.

Differs from the official code in: tokens are told apart by task from the first layer of experts on, so that all tasks
share what stands before it, where the code runs the whole backbone once per task; `tasks=[...]` runs one task in either
kind of routing, where the code's multi-gate mode runs all of them; the tasks' windows of experts, which run past the
last expert for four tasks or more, are left out; the balance compares logits with logits (`layers/balance.py`). The
attention between tasks' decoder features that the code has in training alone is left out too.

The published 88 % fewer operations for one task are not the experts' doing, which cost a token what the dense MLP costs
it. `pathway.cost` counts 83.8 G multiply-adds for segmentation with M³ViT small on PASCAL-Context: 31.8 G of blocks and
52.0 G of one decoder of five. The published comparison is with models that run an encoder per task (NDDR-CNN: 747 G).
All five tasks together take 400 G here, where a multi-task ResNet-18 with one encoder takes 167 G.
"""

from collections.abc import Sequence
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from torch import nn

from ..layers.moe import GATES, SparseExperts, SparseMLP, TaskConditions, TaskRouter
from ._base import register
from ._tabular import MAX_WIDTH, check_count
from ._vision import VisionConfig, VisionModel

# The paper's, with its 12 heads for the small one too; tiny is Edge-MoE's (Sarkar et al., ICCAD 2023), whose experts
# are twice as wide, and of which two are chosen.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "num_selected": 2, "expert_dim": 384},
    "small": {"hidden_size": 384, "num_attention_heads": 12, "num_selected": 4, "expert_dim": 384},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "num_selected": 4, "expert_dim": 768},
}


@strict
class M3ViTConfig(VisionConfig):
    """Fields of M³ViT beyond those of every model for images.

    Args:
        num_experts: `E`, of each layer of experts.
        num_selected: `K`.
        expert_dim: hidden width of an expert. `num_selected * expert_dim = mlp_ratio * hidden_size` costs a token what
            the dense MLP does.
        gate: `multi_gate`, one gate per task, or `task_conditioned`, one gate that reads the task.
        condition_dim: width of what a task tells a gate that is conditioned on it.
        noise_std: of the noise on a gate's logits in training; 0 in the published recipe.
        balance_weight: of the balance loss, 0.01 in the paper.
        z_weight: of the z-loss.
        norm_topk_prob: whether the weights of the chosen experts are divided by their sum; not in the paper, whose
            models start from pre-trained weights.
        experts_kept: by block, which of the `num_experts` are stored; the others are never chosen. Written by
            `pathway.prune`.
    """

    model_type = "m3vit"

    num_experts: int = 16
    num_selected: int = 4
    expert_dim: int = 192
    gate: str = "multi_gate"
    condition_dim: int = 64
    noise_std: float | int = 0.0
    balance_weight: float | int = 0.01
    z_weight: float | int = 0.0
    norm_topk_prob: bool = False
    experts_kept: dict[str, list[int]] | None = None

    def validate_experts(self) -> None:
        check_count("num_experts", self.num_experts)
        check_count("num_selected", self.num_selected, self.num_experts)
        check_count("expert_dim", self.expert_dim, MAX_WIDTH)
        check_count("condition_dim", self.condition_dim, MAX_WIDTH)
        if self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, found {self.gate!r}")
        for name in ("noise_std", "balance_weight", "z_weight"):
            if not 0 <= getattr(self, name) < 1e6:
                raise ValueError(f"{name} must be in [0, 1e6), found {getattr(self, name)!r}")
        check_kept(self.experts_kept, self.expert_blocks, self.num_experts, self.num_selected)

    @property
    def expert_blocks(self) -> list[int]:
        """The blocks whose MLP is made of experts."""
        return list(range(1, self.num_hidden_layers, 2))

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> Self:
        """A configuration of the paper: `tiny`, `small` or `base`, with 12 blocks and patches of 16."""
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, found {size!r}")
        return cls(**({"patch_size": 16, "num_hidden_layers": 12} | SIZES[size] | fields))


def check_kept(kept: dict[str, list[int]] | None, blocks: Sequence[int], num_experts: int, num_selected: int) -> None:
    """Raises ValueError for a list of stored experts, by block, that cannot be."""
    for block, experts in (kept or {}).items():
        if block not in map(str, blocks):
            raise ValueError(f"experts_kept must name blocks with experts, {list(blocks)}, found {block!r}")
        if experts != sorted(set(experts)) or not all(0 <= e < num_experts for e in experts):
            raise ValueError(f"experts_kept must be increasing numbers below {num_experts}, found {experts}")
        if len(experts) < num_selected:
            raise ValueError(f"experts_kept must leave {num_selected} experts to choose, found {experts}")


@register
class M3ViTForMultiTask(VisionModel):
    """M³ViT for several tasks on one image."""

    config: M3ViTConfig
    config_class = M3ViTConfig

    def build_conditions(self) -> nn.Module | None:
        c = self.config
        return TaskConditions(c.task_names, c.condition_dim) if c.gate == "task_conditioned" else None

    def build_mlp(self, layer: int) -> nn.Module:
        c = self.config
        if layer not in c.expert_blocks:
            return super().build_mlp(layer)
        kept = (c.experts_kept or {}).get(str(layer))
        router = TaskRouter(
            c.hidden_size,
            c.num_experts,
            c.num_selected,
            c.task_names,
            gate=c.gate,
            condition_dim=c.condition_dim,
            noise_std=c.noise_std,
            balance_weight=c.balance_weight,
            z_weight=c.z_weight,
            norm_topk_prob=c.norm_topk_prob,
            kept=kept,
        )
        experts = SparseExperts(c.num_experts if kept is None else len(kept), c.hidden_size, c.expert_dim)
        return SparseMLP(f"blocks.{layer}", router, experts, c.grid)
