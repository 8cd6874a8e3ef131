"""The sparse mixture against the equation, token by token in float64: values and every gradient, in each backend."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_mtl.ops import ACTIVATIONS, expert_mlp, gated

BACKENDS = ["torch", "grouped"]
HALVES = {"swiglu", "geglu", "reglu"}
# tokens, width, hidden, experts, chosen: fewer tokens than a tile, primes, one of everything, all of everything
SHAPES = [(7, 97, 47, 7, 1), (33, 16, 24, 5, 2), (1, 8, 8, 3, 2), (0, 8, 8, 3, 2), (6, 5, 3, 4, 4), (64, 8, 8, 64, 1)]


def make(
    tokens: int, width: int, hidden: int, experts: int, chosen: int, activation: str = "swiglu", out: int | None = None
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(tokens + 7 * width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) / max(shape[-1], 1) ** 0.5

    wide = hidden * (2 if activation in HALVES else 1)
    order = torch.rand(tokens, experts, generator=g).argsort(dim=1)
    return {
        "x_ND": draw(tokens, width) * width**0.5,
        "w_up_EPD": draw(experts, wide, width),
        "w_down_EOH": draw(experts, out or width, hidden),
        "indices_NK": order[:, :chosen],
        "weights_NK": draw(tokens, chosen).softmax(-1),
        "b_up_EP": draw(experts, wide),
        "b_down_EO": draw(experts, out or width),
    }


def equation(
    activation: str, x_ND, w_up_EPD, w_down_EOH, indices_NK, weights_NK, b_up_EP=None, b_down_EO=None
) -> Tensor:
    plain: dict[str, Callable] = {
        "relu": lambda z: z.clamp_min(0),
        "relu2": lambda z: z.clamp_min(0) ** 2,
        "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
        "gelu_tanh": lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
        "silu": lambda z: z / (1 + torch.exp(-z)),
    }
    halves = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
    if not len(x_ND):
        return x_ND[:, :1].expand(0, w_down_EOH.shape[1])
    rows = []
    for n, token in enumerate(x_ND):
        total = torch.zeros(w_down_EOH.shape[1], dtype=x_ND.dtype)
        for k, e in enumerate(indices_NK[n].tolist()):
            if e == len(w_up_EPD):
                continue
            pre = w_up_EPD[e] @ token + (0 if b_up_EP is None else b_up_EP[e])
            if activation in halves:
                half = len(pre) // 2
                h = plain[halves[activation]](pre[:half]) * pre[half:]
            else:
                h = plain[activation](pre)
            total = total + weights_NK[n, k] * (w_down_EOH[e] @ h + (0 if b_down_EO is None else b_down_EO[e]))
        rows.append(total)
    return torch.stack(rows)


def with_gradients(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {
        name: tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor
        for name, tensor in inputs.items()
    }
    out = function(**leaves)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    grads = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items() if t.requires_grad}
    return {"out": out.detach()} | grads


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        scale = float(tensor.abs().max()) if tensor.numel() else 1.0
        torch.testing.assert_close(
            found[name].double(), tensor, rtol=0, atol=tolerance * max(scale, 1e-30), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_equation(backend: str, dtype: torch.dtype, tolerance: float, shape: tuple[int, ...], biased: bool) -> None:
    inputs = make(*shape, out=11)
    if not biased:
        inputs.pop("b_up_EP"), inputs.pop("b_down_EO")
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in cast.items()}
    expected = with_gradients(lambda **t: equation("swiglu", **t), exact)
    found = with_gradients(lambda **t: expert_mlp(**t, backend=backend), cast)
    assert found["out"].dtype == dtype
    close(found, expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(backend: str, activation: str) -> None:
    inputs = make(9, 6, 4, 3, 2, activation)
    expected = with_gradients(lambda **t: equation(activation, **t), inputs)
    close(with_gradients(lambda **t: expert_mlp(**t, activation=activation, backend=backend), inputs), expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_as_activation(backend: str) -> None:
    inputs = make(9, 6, 4, 3, 2)
    expected = with_gradients(lambda **t: equation("swiglu", **t), inputs)
    close(
        with_gradients(lambda **t: expert_mlp(**t, activation=gated(F.silu), backend=backend), inputs), expected, 1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lonely", [0, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_all_tokens_to_one_expert(backend: str, lonely: int, dtype: torch.dtype, tolerance: float) -> None:
    inputs = make(9, 8, 4, 3, 1)  # rows of 16 bytes: torch's grouped product takes them in float32
    inputs["indices_NK"] = torch.full((9, 1), lonely)
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    found = with_gradients(lambda **t: expert_mlp(**t, backend=backend), cast)
    close(found, with_gradients(lambda **t: equation("swiglu", **t), inputs), tolerance)
    for name in ("w_up_EPD", "w_down_EOH", "b_up_EP", "b_down_EO"):
        for e in range(3):
            assert bool(found[name][e].any()) == (e == lonely), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_for_nobody_add_nothing(backend: str, dtype: torch.dtype) -> None:
    inputs = make(9, 6, 4, 3, 2)
    inputs["indices_NK"][::2, 1] = 3
    inputs["indices_NK"][4] = 3
    expected = with_gradients(lambda **t: equation("swiglu", **t), inputs)
    assert not expected["out"][4].any()
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    found = with_gradients(lambda **t: expert_mlp(**t, backend=backend), cast)
    close(found, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    inputs["indices_NK"].fill_(3)
    assert not expert_mlp(**inputs, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_weights_need_no_copy(backend: str) -> None:
    inputs = make(9, 6, 4, 3, 2)
    expected = with_gradients(lambda **t: expert_mlp(**t, backend=backend), inputs)
    turned = dict(inputs)
    for name in ("w_up_EPD", "w_down_EOH"):
        turned[name] = inputs[name].transpose(1, 2).contiguous()

    def call(w_up_EPD: Tensor, w_down_EOH: Tensor, **rest: Tensor) -> Tensor:
        return expert_mlp(w_up_EPD=w_up_EPD.mT, w_down_EOH=w_down_EOH.mT, **rest, backend=backend)

    found = with_gradients(call, turned)
    for name in ("w_up_EPD", "w_down_EOH"):
        found[name] = found[name].mT
    close(found, expected, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    inputs = make(5, 4, 3, 3, 2)
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point()]

    def call(*values: Tensor) -> Tensor:
        return expert_mlp(**dict(zip(names, values, strict=True)), indices_NK=inputs["indices_NK"], backend=backend)

    assert torch.autograd.gradcheck(call, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=20)
@given(st.integers(2, 20), st.integers(1, 4), st.integers(0, 2**20))
def test_order_and_company_of_a_token_do_not_matter(backend: str, tokens: int, chosen: int, seed: int) -> None:
    inputs = make(tokens, 6, 4, 4, chosen)
    whole = expert_mlp(**inputs, backend=backend)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    rows = ("x_ND", "indices_NK", "weights_NK")
    shuffled = inputs | {name: inputs[name][order] for name in rows}
    torch.testing.assert_close(expert_mlp(**shuffled, backend=backend), whole[order], rtol=1e-12, atol=1e-14)
    cut = seed % tokens
    for part in (slice(0, cut), slice(cut, None)):
        some = inputs | {name: inputs[name][part] for name in rows}
        torch.testing.assert_close(expert_mlp(**some, backend=backend), whole[part], rtol=1e-12, atol=1e-14)
    slots = torch.randperm(chosen, generator=torch.Generator().manual_seed(seed))
    turned = inputs | {name: inputs[name][:, slots] for name in ("indices_NK", "weights_NK")}
    torch.testing.assert_close(expert_mlp(**turned, backend=backend), whole, rtol=1e-12, atol=1e-14)


def test_only_the_gradients_that_are_asked_for() -> None:
    inputs = make(9, 6, 4, 3, 2)
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
    expected = with_gradients(lambda **t: expert_mlp(**t, backend="torch"), inputs)
    for some in itertools.combinations(names, 2):
        leaves = {n: t.detach().clone().requires_grad_(n in some) if n in names else t for n, t in inputs.items()}
        out = expert_mlp(**leaves)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        for name in names:
            assert (leaves[name].grad is not None) == (name in some)
            if name in some:
                torch.testing.assert_close(leaves[name].grad, expected[name], rtol=1e-10, atol=1e-12)


def test_the_grouped_backend_keeps_tokens_and_what_enters_the_activation() -> None:
    """N D + S P numbers, beside parameters and the plan: no gathered tokens, no hidden units, no outputs."""
    inputs = make(64, 16, 24, 4, 2)
    inputs = {n: t.float().requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_mlp(**inputs)
    parameters = sum(inputs[n].numel() for n in ("w_up_EPD", "w_down_EOH", "weights_NK", "b_down_EO"))
    assert sum(saved.values()) == 64 * 16 + 128 * 48 + parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_ND": torch.zeros(9)}, r"expected x \[N, D\]"),
        ({"x_ND": torch.zeros(9, 5, dtype=torch.float64)}, r"expected w_up \[E, P, 5\]"),
        ({"w_down_EOH": torch.zeros(2, 6, 4, dtype=torch.float64)}, "of as many experts"),
        (
            {"w_down_EOH": torch.zeros(3, 6, 5, dtype=torch.float64)},
            "as swiglu makes 4 of 8",
        ),
        ({"indices_NK": torch.zeros(9, 1, dtype=torch.int64)}, r"expected indices and weights of shape \[9, K\]"),
        ({"indices_NK": torch.full((9, 2), 4)}, r"indices: expected numbers in \[0, 3\], found 4 to 4"),
        ({"b_up_EP": torch.zeros(3, 4, dtype=torch.float64)}, r"b_up: expected shape \[3, 8\], found \[3, 4\]"),
        ({"b_down_EO": torch.zeros(3, 4, dtype=torch.float64)}, r"b_down: expected shape \[3, 6\], found \[3, 4\]"),
        ({"w_up_EPD": torch.zeros(3, 8, 6)}, "w_up: expected torch.float64 on cpu, found torch.float32"),
        ({"activation": "tanh"}, "activation: expected one of relu, "),
        ({"backend": "cuda"}, "backend: expected torch or grouped, found 'cuda'"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    inputs = make(9, 6, 4, 3, 2)
    with pytest.raises(ValueError, match=message):
        expert_mlp(**(inputs | change))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weights_of_a_router_are_not_rounded_to_bfloat16(backend: str) -> None:
    inputs = make(33, 16, 24, 5, 2)
    half = {n: t.bfloat16() if t.is_floating_point() and n != "weights_NK" else t for n, t in inputs.items()}
    half["weights_NK"] = inputs["weights_NK"].float()
    exact = {n: t.double() if t.is_floating_point() else t for n, t in half.items()}
    found = with_gradients(lambda **t: expert_mlp(**t, backend=backend), half)
    assert found["out"].dtype == torch.bfloat16
    assert found["weights_NK"].dtype == torch.float32
    close(found, with_gradients(lambda **t: equation("swiglu", **t), exact), 3e-2)
