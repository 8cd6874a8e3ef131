"""Pairs of tasks over runs of tokens, against each token by itself."""

import pytest
import torch
from torch import Tensor

from moe_mtl.ops.runs import run_pairs


def tensors(tasks: int, width: int = 6, out: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (12, width), "base": (12, out), "a": (tasks, 3, width), "b": (tasks, out, 3)}
    shapes |= {"a_shared": (2, width), "b_shared": (out, 2)}
    return {name: torch.randn(shape, dtype=torch.float64, requires_grad=True) for name, shape in shapes.items()}


@pytest.mark.parametrize("runs", [1, 4, 12])
@pytest.mark.parametrize("num_tasks", [1, 7])
@pytest.mark.parametrize("has_shared", [False, True])
def test_equation_and_gradients(runs: int, num_tasks: int, has_shared: bool) -> None:
    t = tensors(num_tasks)
    tasks_G = torch.tensor([5, 0, 5, 2] * 3)[:runs] % num_tasks
    shared = (t["a_shared"], t["b_shared"], 0.3) if has_shared else None
    found = run_pairs(t["x"], t["base"], t["a"], t["b"], tasks_G, scale=0.7, shared=shared)
    rows = []
    for n, (x_D, base_O) in enumerate(zip(t["x"], t["base"], strict=True)):
        task = int(tasks_G[n * runs // 12])
        row = base_O + 0.7 * t["b"][task] @ t["a"][task] @ x_D
        rows.append(row + 0.3 * t["b_shared"] @ t["a_shared"] @ x_D if has_shared else row)
    expected = torch.stack(rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    leaves = list(t.values())[: None if has_shared else 4]
    grad = torch.linspace(-1, 1, 60, dtype=torch.float64).view(12, 5)
    for got, wanted in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_no_tokens() -> None:
    t = tensors(2)
    found = run_pairs(t["x"][:0], t["base"][:0], t["a"], t["b"], torch.empty(0, dtype=torch.int64))
    assert found.shape == (0, 5)
    found.sum().backward()
    assert not t["a"].grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks_G": torch.zeros(5, dtype=torch.int64)}, r"tasks: expected shape \[12\], or of an equal share"),
        ({"b_TOR": torch.zeros(2, 3, 5)}, r"b: expected shape \[2, 5, 3\], found \[2, 3, 5\]"),
        ({"a_TRD": torch.zeros(2, 3, 4)}, r"a: expected shape \[2, 3, 6\]"),
        ({"base_NO": torch.zeros(11, 5)}, r"base: expected shape \[12, 5\]"),
    ],
)
def test_what_does_not_fit(change: dict[str, Tensor], message: str) -> None:
    t = tensors(2)
    call = {"base_NO": t["base"], "a_TRD": t["a"], "b_TOR": t["b"], "tasks_G": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        run_pairs(t["x"], **(call | change))


def test_autocast() -> None:
    t = {name: tensor.detach().float() for name, tensor in tensors(2).items()}
    tasks_G = torch.tensor([1, 0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        found = run_pairs(t["x"], t["base"], t["a"], t["b"], tasks_G)
    assert found.dtype == torch.bfloat16
    expected = run_pairs(t["x"], t["base"], t["a"], t["b"], tasks_G)
    torch.testing.assert_close(found.float(), expected, rtol=5e-2, atol=1e-1)
