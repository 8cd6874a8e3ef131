"""A bank of dense experts, and their gated mixture.

Shapes: `B` rows, `D` input width, `E` experts, `H` expert output width.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

# Each is applied to the fresh output of a linear layer, which no gradient reads: ReLU and tanh, whose gradient needs
# their result alone, overwrite it. A second buffer of that size costs more than the activation.
ACTIVATIONS = {"relu": torch.relu_, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh_}


class ExpertBank(nn.Module):
    """`E` multi-layer perceptrons of one shape that read the same input, computed together.

    Weights are stacked as `[E, out, in]`, so that the first layer of all experts is one matrix product against a free
    view `[E*out, in]`; further layers are batched products. Nothing loops over experts.

    Args:
        num_experts: `E`.
        input_dim: `D`.
        dims: widths of the layers; the last one is `H`.
        activation: a name of `ACTIVATIONS`, applied after every layer.
        dropout: probability, applied after every activation.
        batch_norm: normalise each expert's last linear output over the batch before its activation
            (HoME, section 4.1). `fold_batch_norm` later absorbs it into the last layer.
    """

    def __init__(
        self,
        num_experts: int,
        input_dim: int,
        dims: Sequence[int],
        activation: str = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
    ):
        super().__init__()
        self.num_experts, self.input_dim, self.dims = num_experts, input_dim, tuple(dims)
        self.activation, self.dropout = ACTIVATIONS[activation], dropout
        widths = [input_dim, *dims]
        pairs = list(pairwise(widths))
        self.weights = nn.ParameterList(torch.empty(num_experts, out, in_) for in_, out in pairs)
        self.biases = nn.ParameterList(torch.empty(num_experts, out) for _, out in pairs)
        self.norm = nn.BatchNorm1d(num_experts * dims[-1]) if batch_norm else None
        self.reset_parameters()

    @property
    def output_dim(self) -> int:
        return self.dims[-1]

    def reset_parameters(self) -> None:
        """He's uniform initialisation per expert, so that no two experts start alike; biases 0."""
        for weight_EOI, bias_EO in zip(self.weights, self.biases, strict=True):
            bound = math.sqrt(6.0 / weight_EOI.shape[-1])
            init.uniform_(weight_EOI, -bound, bound)
            init.zeros_(bias_EO)

    def forward(self, x_BD: Tensor) -> Tensor:
        """`[B, D] -> [E, B, H]` (a view; its memory may be laid out `[B, E, H]`)."""
        (weight_EOI, *weights), (bias_EO, *biases) = self.weights, self.biases
        hidden = F.linear(x_BD, weight_EOI.flatten(0, 1), bias_EO.flatten())
        if self.norm is not None and not weights:
            hidden = self.norm(hidden)
        # Activated before it becomes a view: overwriting a view would make autograd copy the whole of it.
        hidden_EBO = self._activate(hidden).view(-1, self.num_experts, self.dims[0]).transpose(0, 1)
        for layer, (weight_EOI, bias_EO) in enumerate(zip(weights, biases, strict=True), start=1):
            hidden_EBO = torch.baddbmm(bias_EO.unsqueeze(1), hidden_EBO, weight_EOI.transpose(1, 2))
            if self.norm is not None and layer == len(weights):
                normed = self.norm(hidden_EBO.transpose(0, 1).flatten(1))
                hidden_EBO = normed.view(-1, self.num_experts, self.output_dim).transpose(0, 1)
            hidden_EBO = self._activate(hidden_EBO)
        return hidden_EBO

    def _activate(self, hidden: Tensor) -> Tensor:
        hidden = self.activation(hidden)
        return F.dropout(hidden, self.dropout) if self.dropout and self.training else hidden

    @torch.no_grad()
    def fold_batch_norm(self) -> None:
        """Absorbs the batch norm's running statistics into the last linear layer: same output in evaluation mode."""
        if self.norm is None:
            return
        norm = self.norm
        scale_EO = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(self.num_experts, -1)
        mean_EO, shift_EO = norm.running_mean.view_as(scale_EO), norm.bias.view_as(scale_EO)
        self.weights[-1].mul_(scale_EO.unsqueeze(-1))
        self.biases[-1].copy_((self.biases[-1] - mean_EO) * scale_EO + shift_EO)
        self.norm = None


def mix(weights_BE: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Gated sum of experts: `out[b] = sum_e weights[b, e] * expert_e[b]`.

    Args:
        weights_BE: `[B, E]`; its columns follow the concatenation of `experts`.
        experts: tensors `[E_g, B, H]` whose `E_g` add up to `E`. They are never copied together: the result of one
            group is where the next accumulates.

    Returns:
        `[B, H]`.
    """
    weights_B1E = weights_BE.unsqueeze(1)
    out_B1H, start = None, 0
    for expert_EBH in experts:
        end = start + len(expert_EBH)
        group_B1E = weights_B1E if end - start == weights_BE.shape[1] else weights_B1E[:, :, start:end]
        expert_BEH = expert_EBH.transpose(0, 1)
        if out_B1H is None:
            out_B1H = torch.bmm(group_B1E, expert_BEH)
        else:
            out_B1H = torch.baddbmm(out_B1H, group_B1E, expert_BEH)
        start = end
    return out_B1H.squeeze(1)


def dead_units(hidden_EBH: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Per expert, the share of hidden units that are 0 for every row of the batch."""
    share_E = (hidden_EBH.detach() == 0).all(dim=1).float().mean(-1)
    return dict(zip(names, share_E.unbind(), strict=True))
