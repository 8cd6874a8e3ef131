"""The operators in torch.compile and torch.export: graphs stay whole, numbers and gradients stay the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_mtl.ops import expert_combine, expert_linear, expert_mlp, gated, make_plan, route
from moe_mtl.ops.experts import _expert_mlp
from moe_mtl.ops.linear import _grouped_linear


class Layer(nn.Module):
    def __init__(self, activation, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 24, 8))
        self.b_up = nn.Parameter(torch.randn(4, 24))
        self.down = nn.Parameter(torch.randn(4, 8, 12))
        self.b_down = nn.Parameter(torch.randn(4, 8))
        self.queries = nn.Parameter(torch.randn(4, 6, 8))
        self.output = nn.Parameter(torch.randn(4, 8, 6))
        self.activation, self.backend = activation, backend

    def forward(self, x_ND: Tensor) -> Tensor:
        indices_NK, weights_NK = route(self.router(x_ND), 2)
        x_ND = expert_mlp(
            *(x_ND, self.up, self.down, indices_NK, weights_NK),
            activation=self.activation,
            b_up_EP=self.b_up,
            b_down_EO=self.b_down,
            backend=self.backend,
        )
        plan = make_plan(indices_NK, 4)
        heads_NKH = expert_linear(x_ND, self.queries, plan, backend=self.backend)
        return expert_combine(heads_NKH.tanh(), self.output, plan, weights_NK, backend=self.backend)


def gradients(layer: Layer, forward, x_ND: Tensor) -> list[Tensor]:
    out = forward(x_ND)
    return [out, *torch.autograd.grad(out.square().sum(), list(layer.parameters()))]


@pytest.mark.parametrize("activation", ["swiglu", gated(F.silu)], ids=["named", "function"])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_compile_keeps_one_graph(activation, backend: str) -> None:
    torch.compiler.reset()
    layer = Layer(activation, backend)
    x_ND = torch.randn(10, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for x in (x_ND, torch.randn(17, 8)):
        for a, b in zip(gradients(layer, compiled, x), gradients(layer, layer, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_inductor_takes_the_graph() -> None:
    torch.compiler.reset()
    layer = Layer("swiglu", "grouped")
    x_ND = torch.randn(10, 8)
    for a, b in zip(
        gradients(layer, torch.compile(layer, fullgraph=True), x_ND), gradients(layer, layer, x_ND), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["swiglu", gated(F.silu)], ids=["named", "function"])
def test_export_with_any_number_of_tokens(activation) -> None:
    layer = Layer(activation, "grouped").eval()
    x_ND = torch.randn(10, 8)
    tokens = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(layer, (x_ND,), dynamic_shapes=({0: tokens},))
        for rows in (10, 33):
            x_ND = torch.randn(rows, 8)
            torch.testing.assert_close(program.module()(x_ND), layer(x_ND))
    assert any("moe_mtl" in str(node.target) for node in program.graph.nodes)


def test_what_is_kept_has_no_gaps() -> None:
    """Rows of 24 bytes, between which torch's grouped product leaves room."""
    x, up, down = (torch.randn(*shape).bfloat16() for shape in ((5, 64), (4, 12, 64), (4, 8, 6)))
    indices, weights = torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    given = (x, weights, up, down, None, None, None, None, indices, "swiglu", "grouped", True)
    assert _expert_mlp(*given)[1].stride() == (12, 1)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_operators_are_what_they_claim(keep: bool, apart: bool, backend: str) -> None:
    """Their schemas, shapes without data and gradients, by torch's own check."""
    draw = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).requires_grad_()

    up = [leaf(4, 12, 8), leaf(4, 8, 12), leaf(4, 12, 8)] if apart else [leaf(4, 24, 8), leaf(4, 8, 12), None]
    indices = torch.randint(0, 4, (5, 2), generator=draw)
    torch.library.opcheck(
        _expert_mlp, (leaf(5, 8), leaf(5, 2), *up, None, leaf(4, 8), None, indices, "swiglu", backend, keep)
    )
    plan = make_plan(indices, 4)
    for by_token, rows in ((True, 5), (False, 10)):
        given = (plan.indices_NK, plan.order_S, plan.position_S, plan.offsets, by_token, backend)
        torch.library.opcheck(_grouped_linear, (leaf(rows, 8), leaf(4, 6, 8), *given))
