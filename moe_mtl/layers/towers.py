"""What reads a task's representation. Shapes: `B` rows, `D` input width, `T` tasks, `C` outputs."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .experts import ACTIVATIONS
from .joined import Joined


class MLP(nn.Module):
    """Linear layers, each followed by an activation and dropout.

    Args:
        input_dim: `D`.
        dims: widths of the layers; none gives the identity.
        output_dim: adds a last linear layer without activation: a task's tower.
    """

    def __init__(
        self,
        input_dim: int,
        dims: Sequence[int],
        output_dim: int | None = None,
        activation: str = "relu",
        dropout: float = 0.0,
    ):
        super().__init__()
        widths = [input_dim, *dims]
        self.layers = nn.ModuleList(nn.Linear(in_, out) for in_, out in pairwise(widths))
        self.output: Any = None if output_dim is None else nn.Linear(widths[-1], output_dim)
        self.output_dim = widths[-1] if output_dim is None else output_dim
        self.activation, self.dropout = ACTIVATIONS[activation], dropout

    def forward(self, x_BD: Tensor) -> Tensor:
        """`[B, D] -> [B, C]`, or `[B, dims[-1]]` without an output layer."""
        for layer in self.layers:
            x_BD = self.activation(layer(x_BD))
            if self.dropout and self.training:
                x_BD = F.dropout(x_BD, self.dropout)
        return x_BD if self.output is None else self.output(x_BD)


class JoinedTowers(Joined):
    """Towers whose hidden layers have one shape, each with an input of its own. For evaluation without gradients."""

    def __init__(self, towers: Sequence[Any]):
        super().__init__()
        if {type(tower) for tower in towers} != {MLP} or len({tower.activation for tower in towers}) > 1:
            raise ValueError("cannot fold a model whose towers are not all MLPs of one activation")
        self.activation = towers[0].activation
        self.layers = [self._join(layers) for layers in zip(*(tower.layers for tower in towers), strict=True)]
        self.outputs = [tower.output for tower in towers]
        alike = len({output.weight.shape for output in self.outputs}) == 1
        self.output = self._join(self.outputs) if alike else None

    def _join(self, linears: Sequence[Any]) -> tuple[Tensor, Tensor]:
        weight, bias = self.lay(linears, "weight"), self.lay(linears, "bias")
        return weight.unflatten(0, (len(linears), -1)).transpose(1, 2), bias.view(len(linears), 1, -1)

    def __call__(self, x_TBD: Tensor) -> list[Tensor]:
        """`[T, B, D] -> ` per tower `[B, C]`."""
        for weight_TIO, bias_T1O in self.layers:
            x_TBD = self.activation(torch.bmm(x_TBD, weight_TIO).add_(bias_T1O))
        if self.output is None:
            return [output(x_BD) for output, x_BD in zip(self.outputs, x_TBD, strict=True)]
        weight_TIC, bias_T1C = self.output
        return list(torch.bmm(x_TBD, weight_TIC).add_(bias_T1C))
