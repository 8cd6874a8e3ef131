"""Mod-Squad: a vision transformer whose attention and MLP are sparse experts in turn, made to differ between tasks.

Chen et al., "Mod-Squad: Designing Mixtures of Experts as Modular Multi-Task Learners", CVPR 2023, section 3. Blocks 0,
2, 4, ... have a mixture of attention heads (section 3.2) and a dense MLP, blocks 1, 3, 5, ... dense attention and an
MLP of experts, as in the paper's base model. A vector per task is added to the tokens before every block, every gate is
a task's own, and the loss is lowered by the mutual information of tasks and experts (equation 6). Its tasks' losses
are balanced by learned uncertainty, which is training's affair.

Differs from the official code in: the weights are the softmax alone, to which the code adds 1e-4 (its logarithm of 0
needs no guard here); noise is off in evaluation; experts keep the model's dtype; one task runs alone. The sampling of
the last chosen experts is left out.
"""

from collections.abc import Sequence
from typing import Any, Self

from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from ..layers.attention_experts import HeadExperts, SparseAttention
from ..layers.moe import SparseExperts, SparseMLP, TaskEmbeddings, TaskRouter
from ._base import register
from ._tabular import MAX_WIDTH, check_count
from ._vision import VisionConfig, VisionModel
from .m3vit import check_kept

# Base is the paper's; the smaller ones keep its proportions, but for fewer attention experts in tiny.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 192,
        "num_attention_heads": 3,
        "expert_dim": 192,
        "attention_experts": 12,
        "attention_selected": 6,
        "attention_head_dim": 64,
    },
    "small": {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "expert_dim": 384,
        "attention_experts": 24,
        "attention_selected": 12,
        "attention_head_dim": 64,
    },
    "base": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "expert_dim": 768,
        "attention_experts": 24,
        "attention_selected": 12,
        "attention_head_dim": 128,
    },
}


@strict
class ModSquadConfig(VisionConfig):
    """Fields of Mod-Squad beyond those of every model for images.

    Args:
        num_experts: `E`, of each MLP of experts.
        num_selected: `K` of them.
        expert_dim: hidden width of such an expert. `num_selected * expert_dim = mlp_ratio * hidden_size` costs a token
            what the dense MLP does.
        attention_experts: heads to choose from, of each attention of experts.
        attention_selected: heads that a token chooses.
        attention_head_dim: width of such a head.
        information_weight: of the mutual-information loss, 0.005 in the paper's recipe.
        noise_std: of the noise on a gate's logits in training; 0 in the paper's recipe.
        balance_weight: of the balance loss; 0 in the paper's recipe.
        z_weight: of the z-loss; 0 in the paper's recipe.
        zero_start: whether gates start at zero, as the paper's, so that all tokens choose the first experts; else as
            M³ViT's.
        norm_topk_prob: whether the weights of the chosen experts are divided by their sum; not in the paper.
        experts_kept: by block, which experts of its attention or MLP are stored; the others are never chosen. Written
            by `pathway.prune`.
    """

    model_type = "mod_squad"

    num_experts: int = 16
    num_selected: int = 4
    expert_dim: int = 192
    attention_experts: int = 12
    attention_selected: int = 6
    attention_head_dim: int = 64
    information_weight: float | int = 0.005
    noise_std: float | int = 0.0
    balance_weight: float | int = 0.0
    z_weight: float | int = 0.0
    zero_start: bool = True
    norm_topk_prob: bool = False
    experts_kept: dict[str, list[int]] | None = None

    def validate_experts(self) -> None:
        check_count("num_experts", self.num_experts)
        check_count("num_selected", self.num_selected, self.num_experts)
        check_count("expert_dim", self.expert_dim, MAX_WIDTH)
        check_count("attention_experts", self.attention_experts)
        check_count("attention_selected", self.attention_selected, self.attention_experts)
        check_count("attention_head_dim", self.attention_head_dim, MAX_WIDTH)
        for name in ("information_weight", "noise_std", "balance_weight", "z_weight"):
            if not 0 <= getattr(self, name) < 1e6:
                raise ValueError(f"{name} must be in [0, 1e6), found {getattr(self, name)!r}")
        kept = self.experts_kept or {}
        attention = {block: kept[block] for block in kept if block in map(str, self.attention_blocks)}
        others = {block: kept[block] for block in kept if block not in attention}
        check_kept(attention, self.attention_blocks, self.attention_experts, self.attention_selected)
        check_kept(others, self.expert_blocks, self.num_experts, self.num_selected)

    @property
    def attention_blocks(self) -> list[int]:
        """The blocks whose attention is made of experts."""
        return list(range(0, self.num_hidden_layers, 2))

    @property
    def expert_blocks(self) -> list[int]:
        """The blocks whose MLP is made of experts."""
        return list(range(1, self.num_hidden_layers, 2))

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> Self:
        """`base` is the paper's, `tiny` and `small` are like it; 12 blocks and patches of 16."""
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, found {size!r}")
        return cls(**({"patch_size": 16, "num_hidden_layers": 12} | SIZES[size] | fields))


@register
class ModSquadForMultiTask(VisionModel):
    """Mod-Squad for several tasks on one image."""

    config: ModSquadConfig
    config_class = ModSquadConfig

    def build_conditions(self) -> nn.Module:
        return TaskEmbeddings(self.config.task_names, self.config.hidden_size)

    def enter(self, layer: int, x_TBLD: Tensor, tasks: Sequence[str]) -> Tensor:
        assert self.conditions is not None
        return x_TBLD + self.conditions(tasks)[:, None, None]

    def build_attention(self, layer: int) -> nn.Module:
        c = self.config
        if layer not in c.attention_blocks:
            return super().build_attention(layer)
        router, stored = self._router(layer, c.attention_experts, c.attention_selected)
        experts = HeadExperts(stored, c.hidden_size, c.attention_head_dim)
        return SparseAttention(f"blocks.{layer}", router, experts, c.hidden_size, c.attention_head_dim, c.grid)

    def build_mlp(self, layer: int) -> nn.Module:
        c = self.config
        if layer not in c.expert_blocks:
            return super().build_mlp(layer)
        router, stored = self._router(layer, c.num_experts, c.num_selected)
        return SparseMLP(f"blocks.{layer}", router, SparseExperts(stored, c.hidden_size, c.expert_dim), c.grid)

    def _router(self, layer: int, num_experts: int, num_selected: int) -> tuple[TaskRouter, int]:
        """A router, and how many experts are stored."""
        c = self.config
        kept = (c.experts_kept or {}).get(str(layer))
        router = TaskRouter(
            c.hidden_size,
            num_experts,
            num_selected,
            c.task_names,
            noise_std=c.noise_std,
            balance_weight=c.balance_weight,
            z_weight=c.z_weight,
            information_weight=c.information_weight,
            zero_start=c.zero_start,
            norm_topk_prob=c.norm_topk_prob,
            kept=kept,
        )
        return router, num_experts if kept is None else len(kept)
