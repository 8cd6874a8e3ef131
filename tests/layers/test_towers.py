"""Towers against a loop."""

import math

import pytest
import torch

from moe_mtl.layers.towers import MLP


@pytest.mark.parametrize("dims", [[], [4], [4, 3]])
@pytest.mark.parametrize("output", [None, 2])
def test_mlp_layer_by_layer(dims: list[int], output: int | None) -> None:
    torch.manual_seed(0)
    mlp = MLP(5, dims, output, "tanh").double()
    x = torch.randn(3, 5, dtype=torch.float64)
    rows = []
    for row in x.tolist():
        for layer in [*mlp.layers, *([mlp.output] if output else [])]:
            weight, bias = layer.weight.tolist(), layer.bias.tolist()
            row = [sum(w * v for w, v in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]
            if layer is not mlp.output:
                row = [math.tanh(v) for v in row]
        rows.append(row)
    torch.testing.assert_close(mlp(x), torch.tensor(rows, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert mlp.output_dim == len(rows[0])


def test_dropout_comes_after_hidden_layers_only() -> None:
    torch.manual_seed(0)
    tower = MLP(5, [300], 300, "tanh", dropout=0.5).train()
    assert bool((tower(torch.randn(2, 5)) != 0).all())
    hidden = MLP(5, [300], None, "tanh", dropout=0.5).train()(torch.randn(2, 5))
    assert 0.3 < (hidden == 0).float().mean() < 0.7
