"""Sparse experts for tokens of several tasks: the router that chooses by task, and the expert MLP.

Shapes: `T` tasks (1 while the tokens are the same for all), `B` images, `L` tokens of an image, `N = B L` tokens of a
task, `D` width, `P` width of a task's condition, `E` experts, `K` experts chosen per token, `H` expert hidden width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .. import ops
from ..outputs import Routing
from .balance import TaskExpertStatistics, importance, load, load_balance, smooth_load, z_loss
from .vit import Computed

GATES = ("multi_gate", "task_conditioned")
# Of more chosen experts the highest are found by sorting.
MOST_ROUNDS = 4


@dataclass(frozen=True)
class Choice:
    """What a router chose.

    Attributes:
        indices_TNK: numbers of the chosen experts among those that are stored.
        weights_TNK: their weights.
        probabilities_TNE: softmax over all experts, before the choice.
        auxiliary: losses, in training.
    """

    indices_TNK: Tensor
    weights_TNK: Tensor
    probabilities_TNE: Tensor
    auxiliary: tuple[Tensor, ...]


class TaskRouter(nn.Module):
    """Chooses `K` of `E` experts for each token of each task: softmax over all experts, then the K highest, whose
    weights are not renormalised unless `norm_topk_prob` says so.

    M³ViT (Fan et al., NeurIPS 2022, section 3.2) has one gate per task, `s = softmax(W_t x)`, or one gate that also
    reads a condition of the task, `s = softmax(W [x; z_t])`; the same two as in "Sparsely Activated Mixture-of-Experts
    are Robust Multi-Task Learners" (Gupta et al., 2022, section 3). Mod-Squad's gates are the first kind.

    Args:
        dim: `D`.
        num_experts: `E`, over which the softmax goes.
        num_selected: `K`.
        tasks: names.
        gate: `multi_gate` or `task_conditioned`.
        condition_dim: `P`, for `task_conditioned`.
        noise_std: of normal noise on the logits in training, divided by `E` (Riquelme et al., "Scaling Vision with
            Sparse Mixture of Experts", NeurIPS 2021); 0 for none.
        balance_weight: of `CV^2(importance) + CV^2(load)`, per gate and task.
        costs: of one token on each of the `E` experts, any unit. The balance then makes even what experts cost, not
            their tokens: see `load_balance`. None for experts that cost the same.
        z_weight: of the z-loss.
        information_weight: of Mod-Squad's mutual-information loss.
        zero_start: gates that start at zero choose evenly, as Mod-Squad's; else Kaiming-uniform, as M³ViT's.
        norm_topk_prob: weights of the K chosen are divided by their sum (Shazeer et al., "Outrageously Large Neural
            Networks", ICLR 2017, equation 3). The few that are chosen of many hold a small share of the softmax at
            first, and that much slower does a model learn that starts without pre-trained weights.
        kept: numbers of the experts that are stored, of `num_experts`. The others are never chosen; the softmax still
            counts them, so that to leave out what was never chosen changes nothing. None for all.

    Raises:
        ValueError: `costs` that are not `E` positive numbers.

    Differs from the official code in: M³ViT's balance compares logits with thresholds taken after the softmax where
    there is noise; its tasks' windows of experts are left out; Mod-Squad's noise stays on in evaluation.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        num_selected: int,
        tasks: Sequence[str],
        *,
        gate: str = "multi_gate",
        condition_dim: int = 0,
        noise_std: float = 0.0,
        balance_weight: float = 0.0,
        costs: Sequence[float] | None = None,
        z_weight: float = 0.0,
        information_weight: float = 0.0,
        zero_start: bool = False,
        norm_topk_prob: bool = False,
        kept: Sequence[int] | None = None,
    ):
        super().__init__()
        if costs is not None and (len(costs) != num_experts or not all(0 < cost < math.inf for cost in costs)):
            raise ValueError(f"costs: expected {num_experts} positive numbers, found {list(costs)}")
        self.num_experts, self.num_selected, self.noise_std = num_experts, num_selected, noise_std
        self.balance_weight, self.z_weight, self.information_weight = balance_weight, z_weight, information_weight
        self.zero_start, self.norm_topk_prob = zero_start, norm_topk_prob
        self.kept = None if kept is None else list(kept)
        # Of those that are stored: the others have no tokens.
        self.costs = None if costs is None else [costs[e] for e in (kept or range(num_experts))]
        self.gates = self.gate = None
        if gate == "multi_gate":
            self.gates = nn.ParameterDict({task: torch.empty(num_experts, dim) for task in tasks})
        else:
            self.gate = nn.Parameter(torch.empty(num_experts, dim + condition_dim))
        self.statistics = TaskExpertStatistics(tasks, num_experts) if information_weight else None

    def forward(self, x_TND: Tensor, tasks: Sequence[str], condition_TP: Tensor | None = None) -> Choice:
        """Tokens `[T, N, D]`, or `[1, N, D]` where all tasks still have the same, to the choice of each task."""
        logits_TNE = self._logits(x_TND, tasks, condition_TP)
        noisy_TNE, std = logits_TNE, 0.0
        if self.training and self.noise_std:
            std = self.noise_std / self.num_experts
            noisy_TNE = logits_TNE + torch.randn_like(logits_TNE) * std
        probabilities_TNE = noisy_TNE.softmax(-1)
        indices_TNK, weights_TNK = self._chosen(probabilities_TNE)
        auxiliary: tuple[Tensor, ...] = ()
        if self.training:
            auxiliary = self._losses(tasks, logits_TNE, noisy_TNE, std, probabilities_TNE, indices_TNK, weights_TNK)
        return Choice(indices_TNK, weights_TNK.to(x_TND.dtype), probabilities_TNE, auxiliary)

    def _logits(self, x_TND: Tensor, tasks: Sequence[str], condition_TP: Tensor | None) -> Tensor:
        """`[T, N, E]` in float32 at least."""
        if self.gates is not None:
            w_TED = torch.stack([self.gates[task] for task in tasks])
            logits_TNE = x_TND @ w_TED.transpose(1, 2)
        else:
            assert self.gate is not None
            assert condition_TP is not None
            # W [x; z] = W_x x + W_z z: what the task adds is the same for all its tokens.
            w_ED, w_EP = self.gate.split([x_TND.shape[-1], condition_TP.shape[-1]], dim=1)
            logits_TNE = x_TND @ w_ED.t() + (condition_TP.to(x_TND.dtype) @ w_EP.t()).unsqueeze(1)
        return logits_TNE.float() if logits_TNE.dtype in (torch.float16, torch.bfloat16) else logits_TNE

    def _chosen(self, probabilities_TNE: Tensor) -> tuple[Tensor, Tensor]:
        stored_TNE = probabilities_TNE if self.kept is None else probabilities_TNE[..., self.kept]
        indices_TNK = highest(stored_TNE.detach(), self.num_selected)
        weights_TNK = stored_TNE.gather(-1, indices_TNK)
        if self.norm_topk_prob:
            weights_TNK = weights_TNK / weights_TNK.sum(-1, keepdim=True)
        return indices_TNK, weights_TNK

    def _losses(
        self,
        tasks: Sequence[str],
        logits_TNE: Tensor,
        noisy_TNE: Tensor,
        std: float,
        probabilities_TNE: Tensor,
        indices_TNK: Tensor,
        weights_TNK: Tensor,
    ) -> tuple[Tensor, ...]:
        losses = []
        if self.balance_weight:
            for t in range(len(tasks)):
                stored = probabilities_TNE.shape[-1] if self.kept is None else len(self.kept)
                importance_E = importance(weights_TNK[t], indices_TNK[t], stored)
                if std and self.kept is None:
                    load_E = smooth_load(logits_TNE[t], noisy_TNE[t], std, self.num_selected)
                else:
                    load_E = load(indices_TNK[t], stored, weights_TNK.dtype)
                cost_E = None if self.costs is None else importance_E.new_tensor(self.costs)
                losses.append(self.balance_weight * load_balance(importance_E, load_E, cost_E))
        if self.z_weight:
            losses.append(self.z_weight * z_loss(logits_TNE.flatten(0, 1)))
        if self.statistics is not None:
            by_task = dict(zip(tasks, probabilities_TNE, strict=True))
            losses.append(self.information_weight * self.statistics(by_task))
        return tuple(losses)

    def routing(self, layer: str, choice: Choice, tasks: Sequence[str], grid: tuple[int, int] | None) -> Routing:
        """The record of a choice."""
        names = tuple(f"experts.{e}" for e in range(self.num_experts))
        indices_TNK = choice.indices_TNK
        if self.kept is not None:
            indices_TNK = torch.tensor(self.kept, device=indices_TNK.device)[indices_TNK]
        return Routing(
            layer,
            dict(zip(tasks, choice.probabilities_TNE.detach(), strict=True)),
            dict.fromkeys(tasks, names),
            indices=dict(zip(tasks, indices_TNK, strict=True)),
            grid=grid,
        )

    def initialise(self, std: float) -> None:
        for gate in self.parameters():
            if self.zero_start:
                init.zeros_(gate)
            else:
                init.kaiming_uniform_(gate, a=math.sqrt(5))


def highest(probabilities_NE: Tensor, num_selected: int) -> Tensor:
    """The numbers of the `K` highest, in descending order, of equals the lower number first: `[..., N, K]`.

    Not topk: which of equal ones it takes depends on the device. Of many experts to sort them all takes far longer than
    to look for the highest a few times.
    """
    if num_selected > MOST_ROUNDS:
        return probabilities_NE.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
    found = [probabilities_NE.max(-1, keepdim=True).indices]  # the first of equals, as its documentation promises
    while len(found) < num_selected:
        probabilities_NE = probabilities_NE.scatter(-1, found[-1], -1.0)
        found.append(probabilities_NE.max(-1, keepdim=True).indices)
    return torch.cat(found, -1)


class SparseExperts(nn.Module):
    """`E` two-layer perceptrons of one shape, `FFN_e(x) = W2_e gelu(W1_e x + b1_e) + b2_e`, by `ops.expert_mlp`.

    Args:
        num_experts: how many are stored.
        dim: `D`.
        hidden_dim: `H`.

    Attributes:
        backend: of `ops.expert_mlp`; None for what suits the device.
    """

    backend: ops.Backend | None = None

    def __init__(self, num_experts: int, dim: int, hidden_dim: int):
        super().__init__()
        self.w_up = nn.Parameter(torch.empty(num_experts, hidden_dim, dim))
        self.b_up = nn.Parameter(torch.empty(num_experts, hidden_dim))
        self.w_down = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.b_down = nn.Parameter(torch.empty(num_experts, dim))

    def forward(self, x_ND: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Each token through its experts, and their weighted sum: `[N, D]`."""
        return ops.expert_mlp(
            x_ND,
            self.w_up,
            self.w_down,
            indices_NK,
            weights_NK,
            activation="gelu",
            b_up_EP=self.b_up,
            b_down_EO=self.b_down,
            backend=self.backend,
            fallback=True,
        )

    def initialise(self, std: float) -> None:
        for weight in (self.w_up, self.w_down):
            init.trunc_normal_(weight, std=std)
        for bias in (self.b_up, self.b_down):
            init.zeros_(bias)

    def extra_repr(self) -> str:
        experts, hidden, dim = self.w_up.shape
        return f"experts={experts}, dim={dim}, hidden={hidden}"


class SparseMLP(nn.Module):
    """The MLP of a block made of experts: `y = sum_k s_k FFN_k(x)` over the experts that the task's gate chose.

    Args:
        layer: its name in records.
        router: chooses.
        experts: compute.
        grid: rows and columns of patches, for records.
    """

    def __init__(self, layer: str, router: TaskRouter, experts: SparseExperts, grid: tuple[int, int] | None = None):
        super().__init__()
        self.layer, self.grid = layer, grid
        self.router, self.experts = router, experts

    def forward(self, x_TBLD: Tensor, tasks: Sequence[str], condition_TP: Tensor | None, record: bool) -> Computed:
        """`[1 or T, B, L, D]` -> `[T, B, L, D]`."""
        x_TND = x_TBLD.flatten(1, 2)
        choice = self.router(x_TND, tasks, condition_TP)
        tokens_SD = x_TND.expand(len(tasks), -1, -1).flatten(0, 1)
        y_SD = self.experts(tokens_SD, choice.indices_TNK.flatten(0, 1), choice.weights_TNK.flatten(0, 1))
        y_TBLD = y_SD.unflatten(0, (len(tasks), *x_TBLD.shape[1:3]))
        routing = (self.router.routing(self.layer, choice, tasks, self.grid),) if record else ()
        return Computed(y_TBLD, choice.auxiliary, routing)


class TaskConditions(nn.Module):
    """`z_t = LN(W2 gelu(w1_t))`: what a task adds to the gates that are conditioned on it, one for all layers.

    M³ViT's `W2 gelu(W1 onehot(t))`, whose first layer picks a column: here that is a vector per task.

    Args:
        tasks: names.
        dim: `P`.
    """

    def __init__(self, tasks: Sequence[str], dim: int):
        super().__init__()
        self.dim = dim
        self.embeddings = nn.ParameterDict({task: torch.empty(dim) for task in tasks})
        self.linear = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tasks: Sequence[str]) -> Tensor:
        """`[T, P]`."""
        stacked_TP = torch.stack([self.embeddings[task] for task in tasks])
        return self.norm(self.linear(F.gelu(stacked_TP)))

    def initialise(self, std: float) -> None:
        for embedding in self.embeddings.values():
            init.normal_(embedding, std=1.0)


class TaskEmbeddings(nn.Module):
    """`e_t`: one vector per task, which Mod-Squad adds to the tokens before every block.

    Args:
        tasks: names.
        dim: `D`.
    """

    def __init__(self, tasks: Sequence[str], dim: int):
        super().__init__()
        self.embeddings = nn.ParameterDict({task: torch.empty(dim) for task in tasks})

    def forward(self, tasks: Sequence[str]) -> Tensor:
        """`[T, D]`."""
        return torch.stack([self.embeddings[task] for task in tasks])

    def initialise(self, std: float) -> None:
        for embedding in self.embeddings.values():
            init.trunc_normal_(embedding, std=std)
