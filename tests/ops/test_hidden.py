"""The inside of experts that share a block, against each copy by itself; and its dropout."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_mtl.ops import make_plan
from moe_mtl.ops.hidden import expert_hidden

INDICES = torch.tensor([[1, 3], [3, 0], [1, 3], [0, 1]])  # nobody for expert 2


def tensors(layers: int, ranks: int = 2) -> list[Tensor]:
    """What enters, by layer: first, z, b; then a and the weights."""
    torch.manual_seed(0)
    shapes = [(4, 6)] * layers + [(4, 2, 3)] * layers + [(4, 6, 3)] * layers + [(4, ranks, 6), (4, 2)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def computed(entered: list[Tensor], dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    *by_layer, a, weights = entered
    n = len(by_layer) // 3
    first, z, b = (by_layer[i * n : (i + 1) * n] for i in range(3))
    return expert_hidden(first, z, b, a, F.silu, make_plan(INDICES, 4), weights, dropout)


def plainly(entered: list[Tensor]) -> tuple[Tensor, Tensor]:
    *by_layer, a, weights = entered
    n = len(by_layer) // 3
    first, z, b = (by_layer[i * n : (i + 1) * n] for i in range(3))
    shared, down = [], []
    for token, experts in enumerate(INDICES.tolist()):
        units = []
        for k, e in enumerate(experts):
            pre = [first[i][token] + b[i][e] @ z[i][token, k] for i in range(n)]
            units.append(F.silu(pre[0]) * (pre[1] if n > 1 else 1.0))
        shared.append(sum(weights[token, k] * h for k, h in enumerate(units)))
        down.append(torch.stack([a[e] @ h for e, h in zip(experts, units, strict=True)]))
    return torch.stack(shared), torch.stack(down)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("size", [1, 2**19])
def test_equation_and_gradients(layers: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_mtl.ops.hidden.BYTES", size)
    entered = tensors(layers)
    found, expected = computed(entered), plainly(entered)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = [torch.randn_like(t) for t in expected]
    torch.testing.assert_close(
        torch.autograd.grad(found, entered, grads),
        torch.autograd.grad(expected, entered, grads),
        rtol=1e-12,
        atol=1e-12,
    )


def test_first_layers_that_need_no_gradient() -> None:
    entered = tensors(2)
    entered[0].requires_grad_(False)
    sum(t.sum() for t in computed(entered)).backward()
    assert entered[0].grad is None
    assert all(t.grad is not None for t in entered[1:])


@pytest.mark.parametrize("layers", [1, 2])
def test_dropout_is_of_what_is_taken_down(layers: int) -> None:
    entered = tensors(layers, ranks=6)
    with torch.no_grad():
        entered[-2].copy_(torch.eye(6))
    shared, units = computed(entered)
    torch.manual_seed(1)
    shared_too, dropped = computed(entered, 0.25)
    assert torch.equal(shared_too, shared)
    kept = dropped != 0
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(dropped, kept * units / 0.75)

    def again(*entered: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return computed(list(entered), 0.25)

    assert torch.autograd.gradcheck(again, entered)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype: torch.dtype) -> None:
    entered = tensors(2)
    halves = [t.detach().to(dtype).requires_grad_() for t in entered]
    found, expected = computed(halves), computed(entered)
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, rtol=5e-2, atol=1e-1)
    sum(t.sum() for t in found).backward()
    sum(t.sum() for t in expected).backward()
    for got, wanted in zip(halves, entered, strict=True):
        torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=5e-2, atol=2e-1)
