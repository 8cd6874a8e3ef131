"""What keeps a router from using few experts, or makes tasks use different ones: losses on routing probabilities.

Shapes: `N` tokens, `E` experts, `K` experts chosen per token, `T` tasks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


def cv_squared(x_E: Tensor) -> Tensor:
    """Squared coefficient of variation, `var(x) / mean(x)^2` with the unbiased variance; 0 for one expert.

    Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017, equation 7.
    """
    if x_E.shape[-1] < 2:
        return x_E.sum(-1) * 0.0
    return x_E.var(-1) / (x_E.mean(-1).square() + 1e-10)


def importance(weights_NK: Tensor, indices_NK: Tensor, num_experts: int) -> Tensor:
    """Sum over tokens of each expert's weight: `[E]` (Shazeer et al., equation 6)."""
    zeros_E = weights_NK.new_zeros(num_experts)
    return zeros_E.index_add(0, indices_NK.flatten(), weights_NK.flatten())


def load(indices_NK: Tensor, num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """How many tokens chose each expert: `[E]`, without a gradient."""
    return torch.bincount(indices_NK.flatten(), minlength=num_experts)[:num_experts].to(dtype)


def smooth_load(clean_NE: Tensor, noisy_NE: Tensor, std: Tensor | float, num_selected: int) -> Tensor:
    """Expected number of tokens per expert under fresh noise on one expert's logit: `[E]` (equations 8 to 10).

    `P(e is chosen) = Phi((clean_e - threshold_e) / std)`, the threshold being the K-th highest noisy logit of the other
    experts.

    Args:
        clean_NE, noisy_NE: logits before and after the noise.
        std: of the noise, scalar or `[N, E]`.
        num_selected: `K`; with `K = E` every expert has all tokens.

    Differs from the official code in: M3ViT compares logits with thresholds taken after the softmax; here both are
    logits.
    """
    num_tokens, num_experts = clean_NE.shape
    if num_selected >= num_experts:
        return clean_NE.new_full((num_experts,), float(num_tokens)) + 0.0 * clean_NE.sum(0)
    top_NK1 = noisy_NE.topk(num_selected + 1, dim=-1).values
    chosen_NE = noisy_NE >= top_NK1[:, num_selected - 1 : num_selected]
    # Of the others the K-th highest: for a chosen expert the next behind it, for the rest the last that was chosen.
    threshold_NE = torch.where(chosen_NE, top_NK1[:, -1:], top_NK1[:, -2:-1])
    return torch.special.ndtr((clean_NE - threshold_NE) / std).sum(0)


def load_balance(importance_E: Tensor, load_E: Tensor, cost_E: Tensor | None = None) -> Tensor:
    """`CV^2(importance) + CV^2(load)`: M3ViT's balance loss of one gate.

    Args:
        importance_E, load_E: see above.
        cost_E: of one token on each expert, any unit: `a_e = cost_e / sum cost` then weighs both, so that the product
            of cost and tokens is made even and the faster expert gets more tokens. ShiftAddViT (You et al., NeurIPS
            2023), latency-aware load balancing.
    """
    if cost_E is not None:
        share_E = cost_E / cost_E.sum()
        importance_E, load_E = importance_E * share_E, load_E * share_E
    return cv_squared(importance_E) + cv_squared(load_E)


def z_loss(logits_NE: Tensor) -> Tensor:
    """Mean over tokens of the squared log-sum-exp: keeps logits small (Zoph et al., "ST-MoE", 2022, equation 5)."""
    return torch.logsumexp(logits_NE.float(), dim=-1).square().mean()


def mutual_information(joint_TE: Tensor) -> Tensor:
    """`I(T; E) = sum P(t, e) log(P(t, e) / (P(t) P(e)))` of a joint distribution, in nats: a scalar.

    0 where tasks use experts alike; at most `min(log T, log E)`.
    """
    task_T, expert_E = joint_TE.sum(1), joint_TE.sum(0)
    entr = torch.special.entr
    return entr(task_T).sum() + entr(expert_E).sum() - entr(joint_TE).sum()


class TaskExpertStatistics(nn.Module):
    """`-I(T; E)` of a layer: Mod-Squad's loss (Chen et al., CVPR 2023, equation 6), for steps with all tasks or few.

    It raises the entropy of the experts over all tasks, which is balance, and lowers it within a task, which is
    specialisation. Every task counts alike, `P(t) = 1 / T`: how many tokens it has says nothing about its experts.
    Tasks that a step does not have count with a running mean of their earlier probabilities, without a gradient, as
    training on one task per batch needs (Chen et al., "An Efficient General-Purpose Modular Vision Model via
    Multi-Task Heterogeneous Training", 2023).

    The running means move in `update`, once per step: gradient checkpointing runs `forward` twice. They become new
    tensors there, so that it can run with those of the first time.

    Args:
        tasks: names.
        num_experts: `E`.
        decay: of the running mean.
    """

    def __init__(self, tasks: Sequence[str], num_experts: int, decay: float = 0.95):
        super().__init__()
        self.decay = decay
        self.latest: dict[str, Tensor] = {}
        self.seen = BufferDict({task: torch.zeros(num_experts) for task in tasks})

    def forward(self, probabilities: dict[str, Tensor]) -> Tensor:
        """Loss of one step, from the probabilities `[N, E]` of the tasks it has."""
        rows = {task: p_NE.mean(0) / p_NE.mean(0).sum() for task, p_NE in probabilities.items()}
        self.latest = {task: row_E.detach() for task, row_E in rows.items()}
        told = []
        for task in self.seen:
            if task in rows:
                told.append(rows[task])
            elif bool(self.seen[task].sum() > 0):  # a task that was never seen has no experts yet
                told.append(self.seen[task].to(next(iter(rows.values())).dtype))
        return -mutual_information(torch.stack(told) / len(told))

    @torch.no_grad()
    def update(self) -> None:
        """Moves the running means of the tasks that the last forward had; the first time to what it had."""
        for task, row_E in self.latest.items():
            mean_E = self.seen[task]
            row_E = row_E.to(mean_E.dtype)
            self.seen[task] = torch.where(mean_E.sum() > 0, mean_E, row_E).lerp(row_E, 1 - self.decay)
        self.latest = {}


class BufferDict(nn.Module):
    """Buffers by name, as `nn.ParameterDict` has parameters."""

    def __init__(self, buffers: dict[str, Tensor]):
        super().__init__()
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def initialise(self, std: float) -> None:
        for buffer in self.buffers():
            init.zeros_(buffer)

    def __getitem__(self, name: str) -> Any:
        return self._buffers[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self._buffers[name] = value

    def __iter__(self) -> Any:
        return iter(self._buffers)
