"""What reads a task's representation. Shapes: `B` rows, `D` input width, `C` outputs."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .experts import ACTIVATIONS


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
        self.output = None if output_dim is None else nn.Linear(widths[-1], output_dim)
        self.output_dim = widths[-1] if output_dim is None else output_dim
        self.activation, self.dropout = ACTIVATIONS[activation], dropout

    def forward(self, x_BD: Tensor) -> Tensor:
        """`[B, D] -> [B, C]`, or `[B, dims[-1]]` without an output layer."""
        for layer in self.layers:
            x_BD = self.activation(layer(x_BD))
            if self.dropout and self.training:
                x_BD = F.dropout(x_BD, self.dropout)
        return x_BD if self.output is None else self.output(x_BD)
