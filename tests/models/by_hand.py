"""The pieces of every paper, for one row at a time, in float64: what the models are held to.

Read with a model's `state_dict()` at hand: parameters are looked up by name, so that wiring is checked too.
"""

import math
from typing import Any

import torch
from torch import Tensor

from moe_mtl.models import REGISTRY, MultiTaskModel

ACTIVATE = {"relu": lambda x: x.clamp_min(0), "tanh": torch.tanh, "silu": lambda x: x / (1 + torch.exp(-x))}
WIDTH = 3
FEATURES = [{"name": f"x{i}", "kind": "numeric"} for i in range(WIDTH)]  # scaled: the encoded row is the row


def model_of(model_type: str, **fields: Any) -> MultiTaskModel:
    """Float64, evaluation mode, every parameter and statistic random."""
    model = REGISTRY[model_type]
    torch.manual_seed(0)
    made = model(model.config_class(**{"features": FEATURES, "tower_dims": [4], "activation": "tanh", **fields}))
    made = made.double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.6)
        for module in made.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return made


def rows(count: int = 4) -> Tensor:
    return torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def softmax(logits: Tensor) -> list[float]:
    exp = [math.exp(v) for v in logits.tolist()]
    return [v / sum(exp) for v in exp]


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = state[f"{name}.weight"] @ x
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def mlp(state: dict[str, Tensor], name: str, x: Tensor, activation: str = "tanh") -> Tensor:
    """`layers.0`, `layers.1`, ... each followed by the activation, and `output` if there is one."""
    layer = 0
    while f"{name}.layers.{layer}.weight" in state:
        x = ACTIVATE[activation](linear(state, f"{name}.layers.{layer}", x))
        layer += 1
    return linear(state, f"{name}.output", x) if f"{name}.output.weight" in state else x


def expert(state: dict[str, Tensor], name: str, index: int, x: Tensor, activation: str = "tanh") -> Tensor:
    """Expert `index` of the bank; batch norm, where there is one, before the last activation."""
    layers = sum(key.startswith(f"{name}.weights.") for key in state)
    for layer in range(layers):
        x = state[f"{name}.weights.{layer}"][index] @ x + state[f"{name}.biases.{layer}"][index]
        if layer == layers - 1 and f"{name}.norm.weight" in state:
            units = slice(index * len(x), (index + 1) * len(x))
            mean, var = state[f"{name}.norm.running_mean"][units], state[f"{name}.norm.running_var"][units]
            x = (x - mean) / torch.sqrt(var + 1e-5)
            x = x * state[f"{name}.norm.weight"][units] + state[f"{name}.norm.bias"][units]
        x = ACTIVATE[activation](x)
    return x


def bank(state: dict[str, Tensor], name: str, x: Tensor, activation: str = "tanh") -> list[Tensor]:
    return [expert(state, name, e, x, activation) for e in range(len(state[f"{name}.weights.0"]))]


def weighted(weights: list[float], experts: list[Tensor]) -> Tensor:
    assert len(weights) == len(experts)
    total = torch.zeros_like(experts[0])
    for weight, hidden in zip(weights, experts, strict=True):
        total = total + weight * hidden
    return total


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


def check_gradients(model: MultiTaskModel, labels: dict[str, Tensor]) -> None:
    """Loss against finite differences along a random direction of every parameter."""
    x = rows(3).requires_grad_()
    parameters = tuple(model.parameters())

    def loss(x: Tensor, *_: Tensor) -> Tensor:
        return model(numeric=x, labels=labels).loss

    assert torch.autograd.gradcheck(loss, (x, *parameters), fast_mode=True)
