"""Dense gates: how much each task listens to each expert.

Shapes: `B` rows, `D` gate input width, `E` experts, `S` selectors, `M` bits of an expert's code.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class SoftmaxGate(nn.Module):
    """Softmax over a linear map without bias: MMoE (Ma et al., KDD 2018), equations 6 and 7.

    Args:
        input_dim: `D`.
        num_experts: `E`.
        dropout: probability of leaving out an expert in training; the rest is renormalised (Zhao et al., RecSys 2019,
            "Recommending What Video to Watch Next", their remedy against gates that polarise). A row that would lose
            every expert keeps them all.

    Differs from the official code in: keras-mmoe adds a bias to the gate; the paper has none.
    """

    def __init__(self, input_dim: int, num_experts: int, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout
        self.linear = nn.Linear(input_dim, num_experts, bias=False)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, D] -> ` weights `[B, E]` that sum to 1, and no auxiliary loss."""
        logits_BE = F.linear(x_BD, self.linear.weight)
        if self.dropout and self.training:
            drop_BE = torch.rand_like(logits_BE, dtype=torch.float32) < self.dropout
            drop_BE &= ~drop_BE.all(dim=-1, keepdim=True)
            logits_BE = logits_BE.masked_fill(drop_BE, -torch.inf)
        return gate_weights(logits_BE).to(x_BD.dtype), None


def gate_weights(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in float32 at least."""
    return torch.softmax(logits, dim=-1, dtype=_softmax_dtype(logits))


def _softmax_dtype(logits: Tensor) -> torch.dtype:
    return torch.float32 if logits.dtype in (torch.float16, torch.bfloat16) else logits.dtype


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """0 below `-gamma/2`, 1 above `gamma/2`, a cubic with matching slopes between (DSelect-k, equation 4)."""
    cubic = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
    return torch.where(t <= -gamma / 2, 0.0, torch.where(t >= gamma / 2, 1.0, cubic)).to(t.dtype)


class DSelectKGate(nn.Module):
    """At most `k` experts, chosen by gradient descent: DSelect-k (Hazimeh et al., NeurIPS 2021), sections 3 and 4.

    Each of `S = k` selectors holds one bit per binary digit of an expert's number. A smooth step turns the bits into
    a distribution over experts (equation 5), which is one expert exactly once every bit saturates; selectors are mixed
    by a softmax (equation 6). The regulariser (section 3.3) drives the selectors to saturate.

    Args:
        input_dim: `D`; only the per-example gate reads the input.
        num_experts: `E`.
        num_selected: `k`.
        gamma: width of the smooth step.
        static: one choice for all rows (`True`), or one per row. Only a static gate lets experts be dropped for good.
        entropy_weight: factor of the selectors' entropy, summed (not averaged) over rows as in the official code.
        entropy_warmup_steps: the factor grows linearly from 0 over that many steps.

    Where `E` is no power of two some codes name no expert; the regulariser then adds the sum of
    1 / (probability of a code that does), unweighted, as the official code does.

    Differs from the official code in: that probability counts as 1e-6 at least, as one row whose selector has saturated
    on a code without an expert would otherwise make the loss infinite and every gradient NaN. LibMTL's drops gamma in
    the forward pass and its regulariser never reaches the gradient.
    """

    def __init__(
        self,
        input_dim: int,
        num_experts: int,
        num_selected: int,
        gamma: float = 1.0,
        static: bool = True,
        entropy_weight: float = 1e-6,
        entropy_warmup_steps: int = 0,
    ):
        super().__init__()
        self.num_experts, self.num_selected, self.gamma, self.static = num_experts, num_selected, gamma, static
        self.entropy_weight, self.entropy_warmup_steps = entropy_weight, entropy_warmup_steps
        self.training_step = 0
        self.bits: Any
        self.mixture: Any
        self.num_bits = max(1, math.ceil(math.log2(num_experts)))
        if static:
            self.bits = nn.Parameter(torch.empty(num_selected, self.num_bits))
            self.mixture = nn.Parameter(torch.empty(num_selected))
        else:
            self.bits = nn.Linear(input_dim, num_selected * self.num_bits)
            self.mixture = nn.Linear(input_dim, num_selected)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Bits start in the steep middle of the step, within gamma/100 of 0; mixture logits within 0.05."""
        bits = [self.bits] if self.static else [self.bits.weight, self.bits.bias]
        mixture = [self.mixture] if self.static else [self.mixture.weight]
        for parameter in bits:
            init.uniform_(parameter, -self.gamma / 100, self.gamma / 100)
        for parameter in mixture:
            init.uniform_(parameter, -0.05, 0.05)
        if not self.static:
            init.zeros_(self.mixture.bias)

    def _codes(self, device: torch.device) -> Tensor:
        """Bit m of expert e: bool `[E, M]`."""
        experts_E1 = torch.arange(self.num_experts, device=device).unsqueeze(1)
        return ((experts_E1 >> torch.arange(self.num_bits, device=device)) & 1).bool()

    def selectors(self, x_BD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Distribution of each selector `[B, S, E]` and mixture of selectors `[B, S]`; B is 1 for a static gate."""
        if self.static:
            bits_BSM, mixture_BS = self.bits.unsqueeze(0), self.mixture.unsqueeze(0)
        else:
            bits_BSM = self.bits(x_BD).unflatten(-1, (self.num_selected, self.num_bits))
            mixture_BS = self.mixture(x_BD)
        on_BS1M = smooth_step(bits_BSM, self.gamma).unsqueeze(2)
        codes_EM = self._codes(bits_BSM.device)
        selectors_BSE = torch.where(codes_EM, on_BS1M, 1 - on_BS1M).prod(dim=-1)
        return selectors_BSE, gate_weights(mixture_BS).to(bits_BSM.dtype)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor | None]:
        """`[B, D] -> ` weights `[B, E]`, at most `k` of them not 0 once saturated, and the regulariser in training."""
        selectors_BSE, mixture_BS = self.selectors(x_BD)
        weights_BE = torch.einsum("bs,bse->be", mixture_BS, selectors_BSE)
        weights_BE = weights_BE.to(x_BD.dtype).expand(x_BD.shape[0], -1)
        return weights_BE, self._regulariser(selectors_BSE) if self.training else None

    def _regulariser(self, selectors_BSE: Tensor) -> Tensor:
        weight = self.entropy_weight
        if self.entropy_warmup_steps:
            weight = weight * min(1.0, self.training_step / self.entropy_warmup_steps)
        selectors_BSE = selectors_BSE.to(_softmax_dtype(selectors_BSE))  # 1e6 is beyond float16
        loss = -weight * (selectors_BSE * torch.log(selectors_BSE + 1e-6)).sum()
        if self.num_experts != 2**self.num_bits:
            loss = loss + selectors_BSE.sum(-1).clamp_min(1e-6).reciprocal().sum()
        return loss

    @torch.no_grad()
    def saturated(self, x_BD: Tensor | None = None) -> Tensor:
        """Share of selector bits at exactly 0 or 1: their gradient is 0, so what they chose is final. Scalar."""
        bits = self.bits if self.static else self.bits(x_BD)
        return (bits.abs() >= self.gamma / 2).float().mean()
