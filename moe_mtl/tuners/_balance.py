"""What methods share that choose ranks token by token: a bias of the choice alone, which evens out their use.

Shapes: `P` ranks to choose from, `K` of them chosen per token.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import TrainerCallback

from ._base import RankAdapter, RankConfig
from ._tasks import runs_again


@dataclass
class BalancedConfig(RankConfig):
    """Fields of methods that choose ranks token by token.

    Attributes:
        num_selected: `K`, ranks chosen per token.
        balance_rate: by how much the bias of a rank moves per optimiser step: up if it was chosen less than the mean,
            else down ("Auxiliary-Loss-Free Load Balancing", Wang et al., 2024, algorithm 1). 0 leaves it at 0.
    """

    num_selected: int = 8
    balance_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_selected <= self.r:
            raise ValueError(f"num_selected: expected 1 to {self.r}, the ranks, found {self.num_selected}")
        if self.balance_rate < 0:
            raise ValueError(f"balance_rate: expected 0 or more, found {self.balance_rate}")


class BalancedAdapter(RankAdapter):
    """Chooses ranks token by token, and counts in training how often it chose each; padding is not counted.

    Attributes:
        bias_P: of the choice alone; saved with the adapter.
        counts_P: since the last `update_balance`.
    """

    counts_tokens: ClassVar[bool] = True
    expert: ClassVar[str] = "rank"

    bias_P: Tensor
    counts_P: Tensor

    def __init__(self, in_features: int, out_features: int, config: Any):
        super().__init__(in_features, out_features, config)
        self.register_buffer("bias_P", torch.zeros(config.r))
        # No buffer: data parallelism would overwrite those with the first process's in every forward.
        self.counts_P = torch.zeros(config.r, dtype=torch.int64)

    def choice(self) -> dict[str, Any]:
        """What `rank_experts` needs to know of it."""
        self.counts_P = self.counts_P.to(self.bias_P.device)
        counts_P = self.counts_P if self.training and not runs_again() else None
        return {"num_selected": self.config.num_selected, "bias_P": self.bias_P, "counts_P": counts_P}

    def options(self, x_ND: Tensor, told: Tensor | None) -> dict[str, Any]:
        return self.choice()

    def used(self, weights: Tensor | None, told: Tensor | None, chosen: Tensor | None) -> dict[str, Tensor]:
        assert chosen is not None
        kept_NP = chosen.float() if weights is None else weights * chosen
        return {"tokens": kept_NP / kept_NP.sum(-1, keepdim=True)}

    def num_active(self) -> int:
        ranks, chosen = self.config.r, self.config.num_selected
        by_rank = [t for name, t in self.named_parameters() if name in ("a_RD", "b_OP")]
        return self.num_trained() - sum(t.numel() // ranks * (ranks - chosen) for t in by_rank)

    @torch.no_grad()
    def update_balance(self) -> None:
        """One step of the bias; over all processes, where there are several."""
        counts_P = self.counts_P.to(self.bias_P.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts_P)
        self.counts_P = torch.zeros_like(counts_P)
        self.bias_P += self.config.balance_rate * (counts_P.float().mean() - counts_P).sign()


class BalanceRanks(TrainerCallback):
    """Calls `update_balance` after every optimiser step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model = getattr(model, "module", model)
        model.base_model.update_balance()
