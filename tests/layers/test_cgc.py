"""One level of CGC, row by row in float64."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moe_mtl.layers.cgc import CGCLevel, JoinedCGCLevel
from moe_mtl.tasks import SHARED


def level_of(outputs: Sequence[str], specific: int = 2, shared: int = 3, dims: Sequence[int] = (4, 5)) -> CGCLevel:
    torch.manual_seed(0)
    level = CGCLevel("levels.0", 3, ["a", "b"], outputs, specific, shared, dims, "tanh", 0.0, 0.0).double()
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
    seen = ("a", "b", SHARED) if output == SHARED else (output, SHARED)
    hidden = [
        expert(level, group, i, inputs[group][b]) for group in seen for i in range(level.experts[group].num_experts)
    ]
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


@pytest.mark.parametrize("dims", [[5], [4, 5], [4, 6, 5]])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 3)])
@pytest.mark.parametrize("outputs", [["a", "b"], ["a", "b", SHARED], ["b", SHARED]])
@pytest.mark.parametrize("one_input", [True, False])
def test_a_joined_level_row_by_row(
    one_input: bool, outputs: list[str], sizes: tuple[int, int], dims: list[int]
) -> None:
    level = level_of(outputs, *sizes, dims)
    streams = [torch.randn(4, 3, dtype=torch.float64)] * 3 if one_input else list(torch.randn(3, 4, 3).double())
    inputs = dict(zip(("a", "b", SHARED), streams, strict=True))
    names = list(level.state_dict())
    joined = JoinedCGCLevel(level, one_input)
    assert list(level.state_dict()) == names
    with torch.no_grad():
        got = joined(streams[0] if one_input else torch.stack(streams))
        assert got.shape == (len(outputs), 4, 5)
        for output, of_output in zip(outputs, got, strict=True):
            expected = torch.stack([mixed(level, output, inputs, b) for b in range(4)])
            torch.testing.assert_close(of_output, expected, rtol=1e-10, atol=1e-12)
    assert joined.holds()
