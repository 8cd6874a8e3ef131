"""One layer per chosen expert, there and back, against the equations, row by row in float64."""

import pytest
import torch
from torch import Tensor

from moe_mtl.ops import RoutingPlan, expert_combine, expert_linear, make_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [("torch", torch.float64), ("grouped", torch.float64), ("grouped", torch.float32), ("triton", torch.float32)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(tokens: int, experts: int, k: int, nobody: bool) -> Tensor:
    indices = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :k].contiguous()
    if nobody:
        indices[::2, 0] = experts
    return indices


def layer(x: Tensor, w: Tensor, b: Tensor | None, indices: Tensor) -> Tensor:
    """`x` holds a row per token, or per token and choice."""
    zero = x.sum() * 0 + w.sum() * 0
    rows = []
    for n, experts in enumerate(indices.tolist()):
        for k, e in enumerate(experts):
            row = x[n] if x.dim() == 2 else x[n, k]
            if e == len(w):
                rows.append(zero.expand(w.shape[1]))
            else:
                rows.append(w[e] @ row + (0 if b is None else b[e]))
    return torch.stack(rows).unflatten(0, indices.shape)


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, leaves, torch.cos(torch.arange(out.numel()).to(out)).view_as(out)))


def compare(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=tolerance * float(b.detach().abs().max()))


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("nobody", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("tokens", "width", "out", "experts", "k"), [(9, 6, 5, 4, 2), (7, 8, 12, 7, 1), (5, 8, 4, 3, 3)]
)
def test_a_row_per_choice(
    backend: str,
    dtype: torch.dtype,
    nobody: bool,
    biased: bool,
    tokens: int,
    width: int,
    out: int,
    experts: int,
    k: int,
) -> None:
    indices = chosen(tokens, experts, k, nobody)
    leaves = [draw(tokens, width), draw(experts, out, width, seed=2), *([draw(experts, out, seed=3)] if biased else [])]
    exact = [t.clone().requires_grad_() for t in leaves]
    y = layer(exact[0], exact[1], exact[2] if biased else None, indices)
    cast = [t.to(DEVICE, dtype).requires_grad_() for t in leaves]
    plan = make_plan(indices.to(DEVICE), experts)
    found = expert_linear(cast[0], cast[1], plan, b_EP=cast[2] if biased else None, backend=backend)
    assert found.dtype == dtype
    compare([found, *gradients(found, cast)], [y, *gradients(y, exact)], TOLERANCE[dtype])


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
@pytest.mark.parametrize("nobody", [False, True])
def test_back_to_a_row_per_token(backend: str, dtype: torch.dtype, nobody: bool) -> None:
    indices = chosen(9, 4, 2, nobody)
    leaves = [draw(9, 2, 6), draw(4, 5, 6, seed=2), draw(9, 2, seed=3)]
    exact = [t.clone().requires_grad_() for t in leaves]
    y = (layer(exact[0], exact[1], None, indices) * exact[2].unsqueeze(-1)).sum(1)
    cast = [t.to(DEVICE, dtype).requires_grad_() for t in leaves]
    found = expert_combine(cast[0], cast[1], make_plan(indices.to(DEVICE), 4), cast[2], backend=backend)
    compare([found, *gradients(found, cast)], [y, *gradients(y, exact)], TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["torch", "grouped", "triton"])
def test_attention_of_which_each_expert_has_its_own_queries_and_output(backend: str) -> None:
    """Mod-Squad's mixture of heads: one key and value for all experts, one plan for both ways."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    length, width, head, experts, k = 6, 8, 4, 3, 2
    x, w_q, w_o = draw(length, width), draw(experts, head, width, seed=1), draw(experts, width, head, seed=2)
    keys, values, weights = draw(length, head, seed=3), draw(length, head, seed=4), draw(length, k, seed=5).softmax(-1)
    indices = chosen(length, experts, k, False)
    expected = torch.zeros(length, width, dtype=torch.float64)
    for n in range(length):
        for j, e in enumerate(indices[n].tolist()):
            attention = (keys @ (w_q[e] @ x[n]) / head**0.5).softmax(0)
            expected[n] += weights[n, j] * (w_o[e] @ (attention @ values))
    x, w_q, w_o, keys, values, weights = (t.to(DEVICE, dtype) for t in (x, w_q, w_o, keys, values, weights))
    plan = make_plan(indices.to(DEVICE), experts)
    queries_NKH = expert_linear(x, w_q, plan, backend=backend)
    mixed_NKH = torch.nn.functional.scaled_dot_product_attention(queries_NKH.transpose(0, 1), keys[None], values[None])
    found = expert_combine(mixed_NKH.transpose(0, 1), w_o, plan, weights, backend=backend)
    compare([found], [expected], TOLERANCE[dtype])


def test_autocast() -> None:
    indices = chosen(9, 4, 2, False).to(DEVICE)
    x, w, b = (t.to(DEVICE, torch.float32) for t in (draw(9, 8), draw(4, 8, 8), draw(4, 8)))
    plan = make_plan(indices, 4)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = expert_linear(x, w, plan, b_EP=b)
        out = expert_combine(y, w, plan, torch.ones(9, 2, device=DEVICE))
    assert (y.dtype, out.dtype) == (torch.bfloat16, torch.bfloat16)
    assert torch.equal(y, expert_linear(x.bfloat16(), w.bfloat16(), plan, b_EP=b.bfloat16()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, h, w, p: expert_linear(x[:4], w, p), r"x: expected shape \[9, 6\], found \[4, 6\]"),
        (lambda x, h, w, p: expert_linear(x, w[:2], p), r"w: expected shape \[4, P, D\], found \[2, 6, 6\]"),
        (lambda x, h, w, p: expert_linear(x, w.double(), p), "w: expected torch.float32 on cpu, found torch.float64"),
        (lambda x, h, w, p: expert_linear(x, w, p, b_EP=w[0]), r"b: expected shape \[4, 6\], found \[6, 6\]"),
        (lambda x, h, w, p: expert_combine(x, w, p, h[..., 0]), r"h: expected shape \[9, 2, 6\], found \[9, 6\]"),
        (lambda x, h, w, p: expert_combine(h, w, p, x), r"weights: expected shape \[9, 2\], found \[9, 6\]"),
        (lambda x, h, w, p: expert_linear(x, w, p, backend="cuda"), "backend: expected torch, grouped or triton"),
    ],
)
def test_bad_arguments(call, message: str) -> None:
    plan: RoutingPlan = make_plan(chosen(9, 4, 2, False), 4)
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(9, 6), torch.zeros(9, 2, 6), torch.zeros(4, 6, 6), plan)
