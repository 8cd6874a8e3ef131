"""A bank of dense experts, and their gated mixture.

Shapes: `B` rows, `D` input width, `E` experts, `H` expert output width.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from ..outputs import Routing

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
        weight_EOI, *weights = _tensors(self.weights)
        bias_EO, *biases = _tensors(self.biases)
        # Biases are added afterwards: for a product that adds to them, ATen would first write them out for every row.
        hidden = F.linear(x_BD, weight_EOI.flatten(0, 1)).add_(bias_EO.flatten())
        if self.norm is not None and not weights:
            hidden = self.norm(hidden)
        # Activated before it becomes a view: overwriting a view would make autograd copy the whole of it.
        hidden_EBO = self._activate(hidden).view(-1, self.num_experts, self.dims[0]).transpose(0, 1)
        for layer, (weight_EOI, bias_EO) in enumerate(zip(weights, biases, strict=True), start=1):
            hidden_EBO = torch.bmm(hidden_EBO, weight_EOI.transpose(1, 2)).add_(bias_EO.unsqueeze(1))
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
        norm: Any = self.norm  # its statistics are typed as optional
        scale_EO = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).view(self.num_experts, -1)
        mean_EO, shift_EO = norm.running_mean.view_as(scale_EO), norm.bias.view_as(scale_EO)
        self.weights[-1].mul_(scale_EO.unsqueeze(-1))
        self.biases[-1].copy_((self.biases[-1] - mean_EO) * scale_EO + shift_EO)
        self.norm = None


def _tensors(parameters: nn.ParameterList) -> list[Tensor]:
    """What the list holds. To iterate over the list itself takes as long as to multiply a row by a layer."""
    return list(parameters._parameters.values())  # type: ignore[arg-type]  # none of them is None


# ATen multiplies batches of matrices smaller than this with a plain loop, which is the best there is for few of them.
SMALL_PRODUCT = 400
FEW_ROWS = 16


def mix(weights_BE: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """Gated sum of experts: `out[b] = sum_e weights[b, e] * expert_e[b]`.

    Args:
        weights_BE: `[B, E]`; its columns follow the concatenation of `experts`.
        experts: tensors `[E_g, B, H]` whose `E_g` add up to `E`.

    Returns:
        `[B, H]`.
    """
    num_experts, (_, rows, width) = weights_BE.shape[1], experts[0].shape
    if num_experts * width < SMALL_PRODUCT and not torch.compiler.is_compiling() and rows > FEW_ROWS:
        first_BH, *others = (hidden_BH for hidden_EBH in experts for hidden_BH in hidden_EBH)
        out_BH = first_BH * weights_BE[:, :1]
        for number, hidden_BH in enumerate(others, start=1):
            out_BH = torch.addcmul(out_BH, hidden_BH, weights_BE[:, number : number + 1])
        return out_BH
    hidden_EBH = torch.cat(list(experts)) if len(experts) > 1 else experts[0]
    return torch.bmm(weights_BE.unsqueeze(1), hidden_EBH.transpose(0, 1)).squeeze(1)


def mix_chosen(weights_BE: Tensor, hidden_EBH: Tensor) -> Tensor:
    """`mix` for a gate that gives every row the same weights, most of them 0: over the experts that have one.

    So the last bits of the sum do not depend on how many experts without a weight lie beside them.
    """
    chosen = weights_BE[0].nonzero().flatten()
    if not len(chosen):
        chosen = chosen.new_zeros(1)  # its weight is 0
    return mix(weights_BE[:, chosen], [hidden_EBH[chosen]])


def mix_groups(
    weights: Mapping[str, Tensor],
    sees: Mapping[str, Sequence[str]],
    hidden: Mapping[str, Tensor],
    together: bool,
) -> dict[str, Tensor]:
    """Several gated sums over groups of experts.

    Args:
        weights: output -> `[B, E]`, columns in the order of the groups it sees.
        sees: output -> groups.
        hidden: group -> `[E_g, B, H]`.
        together: one product for all outputs, with weights of 0 where an output does not see an expert. That is faster
            in training; but an output's last bits then depend on which others are asked for, and 0 times an
            expert that overflowed is not 0. So a model that answers mixes each output by itself.

    Returns:
        Output -> `[B, H]`.
    """
    if not together:
        return {o: mix(weights_BE, [hidden[group] for group in sees[o]]) for o, weights_BE in weights.items()}
    spread = []
    for output, weights_BE in weights.items():
        seen = [len(hidden[group]) for group in sees[output]]
        part = dict(zip(sees[output], weights_BE.split(seen, dim=1), strict=True))
        spread.append(
            torch.cat([part.get(g, weights_BE.new_zeros(len(weights_BE), len(hidden[g]))) for g in hidden], 1)
        )
    mixed_BOH = torch.bmm(torch.stack(spread, dim=1), torch.cat(list(hidden.values())).transpose(0, 1))
    return dict(zip(weights, mixed_BOH.unbind(1), strict=True))


def routing_of(
    layer: str, weights: Mapping[str, Tensor], sees: Mapping[str, Sequence[str]], hidden: Mapping[str, Tensor]
) -> Routing:
    """The record of one layer of grouped experts; arguments as of `mix_groups`."""
    names = {group: expert_names(group, len(hidden_EBH)) for group, hidden_EBH in hidden.items()}
    dead: dict[str, Tensor] = {}
    for group, hidden_EBH in hidden.items():
        dead |= dead_units(hidden_EBH, names[group])
    return Routing(layer, dict(weights), {o: tuple(n for g in sees[o] for n in names[g]) for o in weights}, dead)


def expert_names(group: str, size: int) -> tuple[str, ...]:
    return tuple(f"{group}.{i}" for i in range(size))


def dead_units(hidden_EBH: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Per expert, the share of hidden units that are 0 for every row of the batch."""
    share_E = (hidden_EBH.detach() == 0).all(dim=1).float().mean(-1)
    return dict(zip(names, share_E.unbind(), strict=True))
