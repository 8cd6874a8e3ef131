"""One level of CGC, row by row in float64."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moe_mtl.layers.cgc import CGCLevel
from moe_mtl.tasks import SHARED


def level_of(outputs: Sequence[str]) -> CGCLevel:
    torch.manual_seed(0)
    level = CGCLevel("levels.0", 3, ["a", "b"], outputs, 2, 3, [4, 5], "tanh", 0.0, 0.0).double()
    for parameter in level.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return level


def expert(level: CGCLevel, group: str, index: int, x: Tensor) -> Tensor:
    bank = level.experts[group]
    for weight, bias in zip(bank.weights, bank.biases, strict=True):
        x = torch.tanh(weight[index] @ x + bias[index])
    return x


def mixed(level: CGCLevel, output: str, inputs: dict[str, Tensor], b: int) -> Tensor:
    """w = softmax(W x); experts in the order own, shared, or, for the shared gate, every task's and then shared."""
    seen = [("a", 2), ("b", 2), (SHARED, 3)] if output == SHARED else [(output, 2), (SHARED, 3)]
    hidden = [expert(level, group, i, inputs[group][b]) for group, size in seen for i in range(size)]
    logits = (level.gates[output].linear.weight @ inputs[output][b]).tolist()
    assert len(logits) == len(hidden)
    total = sum(math.exp(v) for v in logits)
    return sum(math.exp(v) / total * h for v, h in zip(logits, hidden, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("outputs", [["a", "b"], ["a", "b", SHARED]])
def test_level_row_by_row(outputs: list[str], training: bool) -> None:
    level = level_of(outputs).train(training)
    inputs = {name: torch.randn(4, 3, dtype=torch.float64) for name in ("a", "b", SHARED)}
    got, routing = level(inputs, outputs, record=True)
    assert list(got) == outputs
    for output in outputs:
        expected = torch.stack([mixed(level, output, inputs, b) for b in range(4)])
        torch.testing.assert_close(got[output], expected, rtol=1e-10, atol=1e-12)
    assert routing.layer == "levels.0"
    assert routing.experts["a"] == ("a.0", "a.1", "shared.0", "shared.1", "shared.2")
    if SHARED in outputs:
        assert routing.experts[SHARED] == ("a.0", "a.1", "b.0", "b.1", "shared.0", "shared.1", "shared.2")
    assert all(weights.shape == (4, len(routing.experts[gate])) for gate, weights in routing.weights.items())


def test_what_is_not_asked_for_is_not_computed() -> None:
    level = level_of(["a", "b", SHARED])
    inputs = {name: torch.randn(4, 3, dtype=torch.float64) for name in ("a", SHARED)}  # nothing for b to read
    got, routing = level(inputs, ["a"], record=True)
    assert list(got) == ["a"]
    assert set(routing.dead_units) == {"a.0", "a.1", "shared.0", "shared.1", "shared.2"}
    torch.testing.assert_close(got["a"][0], mixed(level, "a", inputs, 0))


def test_gradients() -> None:
    level = level_of(["a", "b", SHARED])
    inputs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def out(a: Tensor, b: Tensor, shared: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(level({"a": a, "b": b, SHARED: shared}, ["a", "b", SHARED], record=False)[0].values())

    assert torch.autograd.gradcheck(out, (*inputs, *level.parameters()))
