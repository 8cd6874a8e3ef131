"""The sparse mixture against the equation, token by token in float64: values and every gradient, in each backend."""

import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mixture import DEVICE, HALVES, TOLERANCE, close, equation, make, on_device, with_gradients
from torch import Tensor

from moe_mtl.ops import ACTIVATIONS, expert_mlp, gated, grouped, layout

BACKENDS = ["torch", "grouped", "triton"]
# The kernels have no float64; in float32 all three are held to the same equation.
EXACT = {"torch": (torch.float64, 1e-12), "grouped": (torch.float64, 1e-12), "triton": (torch.float32, 1e-5)}
DTYPES = [
    *((backend, dtype) for backend in ("torch", "grouped") for dtype in (torch.float64, torch.float32, torch.bfloat16)),
    *(("triton", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]
# tokens, width, hidden, experts, chosen: fewer tokens than a tile, primes, one of everything, all of everything
SHAPES = [(7, 97, 47, 7, 1), (33, 16, 24, 5, 2), (1, 8, 8, 3, 2), (0, 8, 8, 3, 2), (6, 5, 3, 4, 4), (64, 8, 8, 64, 1)]


@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_equation(backend: str, dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    inputs = make(*shape, out=11)
    if not biased:
        inputs.pop("b_up_EP"), inputs.pop("b_down_EO")
    cast = on_device(inputs, dtype)
    exact = {
        name: tensor.double().cpu() if tensor.is_floating_point() else inputs[name] for name, tensor in cast.items()
    }
    expected = with_gradients(lambda **t: equation("swiglu", **t), exact)
    found = with_gradients(lambda **t: expert_mlp(**t, backend=backend), cast)
    assert found["out"].dtype == dtype
    close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations(backend: str, activation: str) -> None:
    inputs, (dtype, tolerance) = make(9, 6, 4, 3, 2, activation), EXACT[backend]
    expected = with_gradients(lambda **t: equation(activation, **t), inputs)
    found = with_gradients(
        lambda **t: expert_mlp(**t, activation=activation, backend=backend), on_device(inputs, dtype)
    )
    close(found, expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nobody", [False, True])
def test_a_function_as_activation(backend: str, nobody: bool) -> None:
    inputs, (dtype, tolerance) = make(9, 6, 4, 3, 2), EXACT[backend]
    if nobody:
        inputs["indices_NK"][::2, 1] = 3
    expected = with_gradients(lambda **t: equation("swiglu", **t), inputs)
    found = with_gradients(
        lambda **t: expert_mlp(**t, activation=gated(F.silu), backend=backend), on_device(inputs, dtype)
    )
    close(found, expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", sorted(HALVES))
def test_gate_and_up_as_two_tensors(backend: str, biased: bool, activation: str) -> None:
    inputs, (dtype, tolerance) = make(9, 6, 4, 3, 2, activation), EXACT[backend]
    if not biased:
        inputs.pop("b_up_EP"), inputs.pop("b_down_EO")
    expected = with_gradients(lambda **t: equation(activation, **t), inputs)
    apart = dict(inputs)
    apart["w_gate_EHD"], apart["w_up_EPD"] = inputs["w_up_EPD"].chunk(2, dim=1)
    expected["w_gate_EHD"], expected["w_up_EPD"] = expected["w_up_EPD"].chunk(2, dim=1)
    if biased:
        apart["b_gate_EH"], apart["b_up_EP"] = inputs["b_up_EP"].chunk(2, dim=1)
        expected["b_gate_EH"], expected["b_up_EP"] = expected["b_up_EP"].chunk(2, dim=1)
    found = with_gradients(lambda **t: expert_mlp(**t, activation=activation, backend=backend), on_device(apart, dtype))
    close(found, expected, tolerance)


@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", gated(F.silu)])
def test_recomputing_changes_nothing(backend: str, activation) -> None:
    # Widths that are multiples of four: on some processors a product's last bit depends on where its operands begin.
    inputs = on_device(make(9, 8, 4, 3, 2, activation if isinstance(activation, str) else "swiglu"), torch.float32)
    inputs["indices_NK"][::2, 1] = 3
    kept, again = (
        with_gradients(
            lambda r=recompute, **t: expert_mlp(**t, activation=activation, backend=backend, recompute=r), inputs
        )
        for recompute in (False, True)
    )
    assert all(torch.equal(kept[name], again[name]) for name in kept)


@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_autocast(backend: str) -> None:
    inputs = on_device(make(9, 6, 4, 3, 2), torch.float32)
    half = {n: t.bfloat16() if t.is_floating_point() and n != "weights_NK" else t for n, t in inputs.items()}
    expected = with_gradients(lambda **t: expert_mlp(**t, backend=backend), half)

    def call(**t: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return expert_mlp(**t, backend=backend)

    found = with_gradients(call, inputs)
    assert found["out"].dtype == torch.bfloat16
    assert found["w_up_EPD"].dtype == torch.float32
    assert all(torch.equal(found[name].to(expected[name].dtype), expected[name]) for name in expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lonely", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_tokens_to_one_expert(backend: str, lonely: int, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    inputs = make(9, 8, 4, 3, 1)  # rows of 16 bytes: torch's grouped product takes them in float32
    inputs["indices_NK"] = torch.full((9, 1), lonely)
    found = with_gradients(lambda **t: expert_mlp(**t, backend=backend), on_device(inputs, dtype))
    close(found, with_gradients(lambda **t: equation("swiglu", **t), inputs), TOLERANCE[dtype] * 10)
    for name in ("w_up_EPD", "w_down_EOH", "b_up_EP", "b_down_EO"):
        for e in range(3):
            assert bool(found[name][e].any()) == (e == lonely), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_copies_for_nobody_add_nothing(backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    inputs = make(9, 6, 4, 3, 2)
    inputs["indices_NK"][::2, 1] = 3
    inputs["indices_NK"][4] = 3
    expected = with_gradients(lambda **t: equation("swiglu", **t), inputs)
    assert not expected["out"][4].any()
    cast = on_device(inputs, dtype)
    found = with_gradients(lambda **t: expert_mlp(**t, backend=backend), cast)
    close(found, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    cast["indices_NK"].fill_(3)
    assert not expert_mlp(**cast, backend=backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_transposed_weights_need_no_copy(backend: str) -> None:
    dtype, tolerance = EXACT[backend]
    inputs = on_device(make(9, 6, 4, 3, 2), dtype)
    expected = with_gradients(lambda **t: expert_mlp(**t, backend="torch"), {n: t.cpu() for n, t in inputs.items()})
    turned = dict(inputs)
    for name in ("w_up_EPD", "w_down_EOH"):
        turned[name] = inputs[name].transpose(1, 2).contiguous()

    def call(w_up_EPD: Tensor, w_down_EOH: Tensor, **rest: Tensor) -> Tensor:
        return expert_mlp(w_up_EPD=w_up_EPD.mT, w_down_EOH=w_down_EOH.mT, **rest, backend=backend)

    found = with_gradients(call, turned)
    for name in ("w_up_EPD", "w_down_EOH"):
        found[name] = found[name].mT
    close(found, {name: tensor.double() for name, tensor in expected.items()}, tolerance)


@pytest.mark.parametrize("backend", ["torch", "grouped"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu_tanh", gated(torch.tanh)])
def test_gradcheck(backend: str, activation) -> None:
    inputs = make(5, 4, 3, 3, 2, activation if isinstance(activation, str) else "swiglu")
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point()]

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return expert_mlp(**given, indices_NK=inputs["indices_NK"], activation=activation, backend=backend)

    assert torch.autograd.gradcheck(call, [inputs[name].requires_grad_() for name in names])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=12)
@given(st.integers(2, 20), st.integers(1, 4), st.integers(0, 2**20))
def test_order_and_company_of_a_token_do_not_matter(backend: str, tokens: int, chosen: int, seed: int) -> None:
    dtype, tolerance = EXACT[backend]
    inputs = on_device(make(tokens, 6, 4, 4, chosen), dtype)
    whole = expert_mlp(**inputs, backend=backend)
    near = {"rtol": tolerance, "atol": tolerance * float(whole.abs().max())}
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    rows = ("x_ND", "indices_NK", "weights_NK")
    shuffled = inputs | {name: inputs[name][order] for name in rows}
    torch.testing.assert_close(expert_mlp(**shuffled, backend=backend), whole[order], **near)
    cut = seed % tokens
    for part in (slice(0, cut), slice(cut, None)):
        some = inputs | {name: inputs[name][part] for name in rows}
        torch.testing.assert_close(expert_mlp(**some, backend=backend), whole[part], **near)
    slots = torch.randperm(chosen, generator=torch.Generator().manual_seed(seed))
    turned = inputs | {name: inputs[name][:, slots] for name in ("indices_NK", "weights_NK")}
    torch.testing.assert_close(expert_mlp(**turned, backend=backend), whole, **near)


@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_only_the_gradients_that_are_asked_for(backend: str) -> None:
    dtype, tolerance = EXACT[backend]
    inputs = make(9, 6, 4, 3, 2)
    names = [name for name, tensor in inputs.items() if tensor.is_floating_point()]
    expected = with_gradients(lambda **t: expert_mlp(**t, backend="torch"), inputs)
    cast = on_device(inputs, dtype)
    for some in itertools.combinations(names, 2):
        leaves = {n: t.detach().clone().requires_grad_(n in some) if n in names else t for n, t in cast.items()}
        out = expert_mlp(**leaves, backend=backend)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=DEVICE).view_as(out)).sum().backward()
        for name in names:
            assert (leaves[name].grad is not None) == (name in some)
        close({name: leaves[name].grad for name in some}, {name: expected[name] for name in some}, tolerance)


@pytest.mark.parametrize("backend", ["grouped", "triton"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", gated(F.silu)])
def test_what_is_kept_for_the_backward(backend: str, recompute: bool, activation) -> None:
    """Beside inputs and the plan what enters the activation: no gathered tokens, hidden units, outputs."""
    inputs = on_device(make(64, 16, 24, 4, 2), torch.float32)
    inputs = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
    known = {tensor.data_ptr() for tensor in inputs.values()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known and tensor.is_floating_point():
            saved[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_mlp(**inputs, activation=activation, backend=backend, recompute=recompute)
    slots = 4 * int(inputs["indices_NK"].flatten().bincount().max())
    rows = slots if backend == "grouped" and isinstance(activation, str) else 128  # in one part
    assert sum(saved.values()) == (0 if recompute else rows * 48)


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
        ({"backend": "cuda"}, "backend: expected torch, grouped or triton, found 'cuda'"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    inputs = make(9, 6, 4, 3, 2)
    with pytest.raises(ValueError, match=message):
        expert_mlp(**(inputs | change))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weights_of_a_router_are_not_rounded_to_bfloat16(backend: str) -> None:
    inputs = make(33, 16, 24, 5, 2)
    half = on_device(inputs, torch.bfloat16) | {"weights_NK": inputs["weights_NK"].float().to(DEVICE)}
    exact = {n: t.double().cpu() if t.is_floating_point() else inputs[n] for n, t in half.items()}
    found = with_gradients(lambda **t: expert_mlp(**t, backend=backend), half)
    assert found["out"].dtype == torch.bfloat16
    assert found["weights_NK"].dtype == torch.float32
    close(found, with_gradients(lambda **t: equation("swiglu", **t), exact), 3e-2)


def test_what_triton_cannot_do_is_said_and_left_to_grouped_only_when_asked() -> None:
    inputs = on_device(make(9, 6, 4, 3, 2), torch.float64)
    with pytest.raises(
        NotImplementedError, match=r"backend triton: the kernels compute in float32, .* found torch.float64"
    ):
        expert_mlp(**inputs, backend="triton")
    expected = expert_mlp(**inputs, backend="grouped")
    assert torch.equal(expert_mlp(**inputs, backend="triton", fallback=True), expected)
    assert torch.equal(expert_mlp(**inputs), expected)  # nobody asked for triton


@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_biases_and_weights_of_any_strides(backend: str) -> None:
    dtype, tolerance = EXACT[backend]
    inputs = on_device(make(9, 8, 4, 3, 2), dtype)
    expected = expert_mlp(**inputs, backend="torch")
    turned = dict(inputs)
    for name in ("b_up_EP", "b_down_EO"):
        turned[name] = inputs[name].t().contiguous().t()
    for name in ("w_up_EPD", "w_down_EOH"):  # the experts innermost
        turned[name] = inputs[name].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    torch.testing.assert_close(expert_mlp(**turned, backend=backend), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_what_is_infinite_stays_with_the_experts_that_saw_it(backend: str) -> None:
    inputs = on_device(make(9, 8, 4, 3, 1), torch.float32)
    inputs["indices_NK"] = torch.tensor([[0], [2], [2], [2], [0], [2], [0], [2], [2]], device=DEVICE)
    inputs["x_ND"][0] = float("inf")
    found = with_gradients(lambda **t: expert_mlp(**t, backend=backend), inputs)
    for name in ("w_up_EPD", "w_down_EOH", "b_up_EP", "b_down_EO"):
        assert not found[name][1].any(), name  # no token
        assert found[name][2].isfinite().all(), name
    assert found["out"][1:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_that_is_not_defined_at_zero(backend: str) -> None:
    """Where a copy stands it is; rows that no copy needs must not be seen."""
    inputs = make(9, 8, 4, 3, 1)
    inputs.pop("b_up_EP"), inputs.pop("b_down_EO")
    inputs["w_up_EPD"] = inputs["w_up_EPD"][:, :4]
    activation = lambda pre: pre.abs().log()  # noqa: E731
    expected = with_gradients(lambda **t: equation(activation, **t), inputs)
    found = with_gradients(
        lambda **t: expert_mlp(**t, activation=activation, backend=backend), on_device(inputs, torch.float32)
    )
    close(found, expected, 1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weight_of_a_copy_for_nobody_does_not_matter(backend: str) -> None:
    inputs = on_device(make(9, 8, 4, 3, 2), torch.float32)
    inputs["indices_NK"][::2, 1] = 3
    plain = expert_mlp(**inputs, backend=backend)
    inputs["weights_NK"] = inputs["weights_NK"].masked_fill(inputs["indices_NK"] == 3, float("nan"))
    assert torch.equal(expert_mlp(**inputs, backend=backend), plain)


@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    inputs = on_device(make(5, 8, 4, 3, 1), torch.float32)
    inputs["x_ND"].requires_grad_()
    inputs["w_up_EPD"].requires_grad_()
    out = expert_mlp(**inputs, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs["x_ND"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_a_kept_graph_gives_the_same_again_and_another_frees_what_it_kept(backend: str) -> None:
    """As gradient balancing does it: one backward per loss through one graph."""
    inputs = on_device(make(64, 16, 24, 4, 2), torch.float32)
    inputs["w_up_EPD"].requires_grad_()
    out = expert_mlp(**inputs, backend=backend)
    first = torch.autograd.grad(out.square().sum(), inputs["w_up_EPD"], retain_graph=True)
    again = torch.autograd.grad(out.square().sum(), inputs["w_up_EPD"])
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out.sum(), inputs["w_up_EPD"])


@pytest.mark.parametrize("keep_graph", [False, True])
def test_what_was_kept_is_freed_in_the_backward_unless_the_graph_is_kept(
    keep_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, combine = grouped.forward, grouped.combine
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def noted_forward(*args, **kwargs):
        out_NO, tensors = forward(*args, **kwargs)
        kept.extend(map(weakref.ref, tensors))
        return out_NO, tensors

    def noted_combine(*args):
        alive.append(sum(tensor() is not None for tensor in kept))
        return combine(*args)

    monkeypatch.setattr(grouped, "forward", noted_forward)
    monkeypatch.setattr(grouped, "combine", noted_combine)
    monkeypatch.setattr(layout, "BYTES", 2**11)
    inputs = on_device(make(64, 16, 24, 4, 2), torch.float32)
    inputs["x_ND"].requires_grad_()
    expert_mlp(**inputs, backend="grouped").sum().backward(retain_graph=keep_graph)
    assert len(kept) == (4 if DEVICE == "cpu" else 1)
    assert alive[-1] == (len(kept) if keep_graph else 0)  # the last step of the backward


def test_an_activation_with_parameters_is_refused() -> None:
    inputs = make(5, 8, 4, 3, 1, "gelu")
    with pytest.raises(ValueError, match="activation: expected one without parameters to train"):
        expert_mlp(**on_device(inputs, torch.float32), activation=torch.nn.PReLU(device=DEVICE))
