"""One layer of each chosen expert: what a mixture of attention heads is made of.

`expert_linear` gives every token one row per chosen expert, `expert_combine` takes such rows back to one per token:

    y_nk = W[e] x_n + b[e],      out_n = sum_k weight_nk W[e] h_nk,      e = index_nk

Mod-Squad's mixture of attention heads (Chen et al., CVPR 2023, section 3.2; Zhang et al., EMNLP 2022) makes its queries
with the first and its output with the second, over one plan; keys and values are shared by all experts.

Shapes: `N` tokens, `D` width, `E` experts, `K` experts chosen per token, `S = N K` routed copies, `P` and `O` output
width, `H` width of a head.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .activations import Activation
from .experts import choose_backend, engine, under_autocast
from .routing import Backend, RoutingPlan
from .weights import ExpertWeights


def expert_linear(
    x_ND: Tensor,
    w_EPD: Tensor,
    plan: RoutingPlan,
    *,
    b_EP: Tensor | None = None,
    backend: Backend | None = None,
    fallback: bool = False,
) -> Tensor:
    """Each token through one layer of each expert chosen for it. Under autocast in its dtype.

    Args:
        x_ND: tokens.
        w_EPD: `[E, P, D]`, any strides.
        plan: of the chosen experts; see `make_plan`.
        b_EP: biases.
        backend, fallback: as for `expert_mlp`.

    Returns:
        `[N, K, P]`; zero where the plan says nobody.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        NotImplementedError: backend `triton` cannot compute this; says why.
    """
    x_ND, w_EPD, b_EP = under_autocast(x_ND, w_EPD, b_EP)
    _check("x", x_ND, plan.indices_NK.shape[:1], w_EPD, plan)
    if b_EP is not None and b_EP.shape != w_EPD.shape[:2]:
        raise ValueError(f"b: expected shape {list(w_EPD.shape[:2])}, found {list(b_EP.shape)}")
    y_SP = _grouped(x_ND, w_EPD, plan, True, choose_backend(backend, fallback, x_ND))
    y_NKP = y_SP.unflatten(0, plan.indices_NK.shape)
    if b_EP is None:
        return y_NKP
    return y_NKP + _padded(b_EP)[plan.indices_NK]


def expert_combine(
    h_NKH: Tensor,
    w_EOH: Tensor,
    plan: RoutingPlan,
    weights_NK: Tensor,
    *,
    backend: Backend | None = None,
    fallback: bool = False,
) -> Tensor:
    """Each row through one layer of its expert, and the weighted sum over a token's rows.

    Args:
        h_NKH: a row per token and chosen expert.
        w_EOH: `[E, O, H]`, any strides.
        plan: of the chosen experts.
        weights_NK: float weights; differentiable.
        backend, fallback: as for `expert_mlp`.

    Returns:
        `[N, O]`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        NotImplementedError: backend `triton` cannot compute this; says why.
    """
    h_NKH, w_EOH = under_autocast(h_NKH, w_EOH)
    _check("h", h_NKH, plan.indices_NK.shape, w_EOH, plan)
    if weights_NK.shape != plan.indices_NK.shape:
        raise ValueError(f"weights: expected shape {list(plan.indices_NK.shape)}, found {list(weights_NK.shape)}")
    # Before the product, where the rows are narrower than after it.
    weighted_SH = (h_NKH * weights_NK.unsqueeze(-1)).to(h_NKH.dtype).flatten(0, 1)
    y_SO = _grouped(weighted_SH, w_EOH, plan, False, choose_backend(backend, fallback, h_NKH))
    return y_SO.unflatten(0, plan.indices_NK.shape).sum(1).to(y_SO.dtype)  # autocast sums in float32


def composed(
    x_ND: Tensor,
    w: ExpertWeights,
    plan: RoutingPlan,
    weights_NK: Tensor,
    activation: Activation,
    backend: Backend,
) -> Tensor:
    """`expert_mlp` from these two: for graphs, whose operators cannot hold a function as activation."""
    pre_NKP = expert_linear(x_ND, w.up_EPD, plan, b_EP=w.b_up_EP, backend=backend)
    h_NKH = activation(pre_NKP.flatten(0, 1)).unflatten(0, plan.indices_NK.shape)
    out_NO = expert_combine(h_NKH, w.down_EOH, plan, weights_NK, backend=backend)
    if w.b_down_EO is None:
        return out_NO
    bias_NKO = _padded(w.b_down_EO)[plan.indices_NK]
    return out_NO + (bias_NKO * weights_NK.unsqueeze(-1)).sum(1).to(out_NO.dtype)


def _padded(b_EP: Tensor) -> Tensor:
    """With a row of zeros for nobody."""
    return torch.cat([b_EP, b_EP.new_zeros(1, b_EP.shape[1])])


def _check(name: str, rows: Tensor, sizes: torch.Size, w_EPD: Tensor, plan: RoutingPlan) -> None:
    if w_EPD.dim() != 3 or len(w_EPD) != plan.num_experts:
        raise ValueError(f"w: expected shape [{plan.num_experts}, P, D], found {list(w_EPD.shape)}")
    if rows.shape != (*sizes, w_EPD.shape[2]):
        raise ValueError(f"{name}: expected shape {[*sizes, w_EPD.shape[2]]}, found {list(rows.shape)}")
    if w_EPD.dtype != rows.dtype or w_EPD.device != rows.device:
        raise ValueError(f"w: expected {rows.dtype} on {rows.device}, found {w_EPD.dtype} on {w_EPD.device}")


def _grouped(rows: Tensor, w_EPD: Tensor, plan: RoutingPlan, by_token: bool, backend: str) -> Tensor:
    """`[S, P]` at copies, from the row of each copy or of its token; 0 for nobody."""
    if backend == "torch":
        y_SP = rows.new_zeros(plan.indices_NK.numel(), w_EPD.shape[1])
        for e, w_PD in enumerate(w_EPD.unbind()):
            copies = (plan.indices_NK.flatten() == e).nonzero().flatten()
            chosen = rows[copies // plan.num_selected if by_token else copies]
            y_SP = y_SP.index_copy(0, copies, F.linear(chosen, w_PD))
        return y_SP
    return _grouped_linear(rows, w_EPD, plan.indices_NK, plan.order_S, plan.position_S, plan.offsets, by_token, backend)


@torch.library.custom_op("moe_mtl::grouped_linear", mutates_args=())
def _grouped_linear(
    rows: Tensor,
    w_EPD: Tensor,
    indices_NK: Tensor,
    order_S: Tensor,
    position_S: Tensor,
    offsets: Tensor,
    by_token: bool,
    backend: str,
) -> Tensor:
    plan = RoutingPlan(indices_NK, order_S, position_S, offsets)
    return engine(backend).linear_forward(rows, w_EPD, plan, by_token)


@_grouped_linear.register_fake
def _(rows, w_EPD, indices_NK, order_S, *rest):  # type: ignore[no-untyped-def]
    return rows.new_empty(order_S.shape[0], w_EPD.shape[1])


@register_flop_formula(torch.ops.moe_mtl.grouped_linear)
def _operations(rows, w_EPD, indices_NK, *_, **__):  # type: ignore[no-untyped-def]
    return 2 * math.prod(indices_NK) * math.prod(w_EPD[1:])


@torch.library.custom_op("moe_mtl::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_SP: Tensor,
    rows: Tensor,
    w_EPD: Tensor,
    indices_NK: Tensor,
    order_S: Tensor,
    position_S: Tensor,
    offsets: Tensor,
    by_token: bool,
    backend: str,
    needs_rows: bool,
    needs_w: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `rows` and of the weights, empty where not needed."""
    plan = RoutingPlan(indices_NK, order_S, position_S, offsets)
    found = engine(backend).linear_backward(grad_SP, rows, w_EPD, plan, by_token, needs_rows, needs_w)
    drows, dw_EPD = (rows.new_empty(0) if t is None else t.contiguous() for t in found)
    return drows, dw_EPD


@_grouped_linear_backward.register_fake
def _(grad_SP, rows, w_EPD, *rest):  # type: ignore[no-untyped-def]
    needs_rows, needs_w = rest[-2:]
    return (
        rows.new_empty(rows.shape if needs_rows else 0),
        w_EPD.new_empty(w_EPD.shape if needs_w else 0),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.by_token, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_SP: Tensor) -> tuple[Tensor | None, ...]:
    needs_rows, needs_w = ctx.needs_input_grad[:2]
    drows, dw_EPD = _grouped_linear_backward(
        grad_SP, *ctx.saved_tensors, ctx.by_token, ctx.backend, needs_rows, needs_w
    )
    return drows if needs_rows else None, dw_EPD if needs_w else None, *[None] * 6


_grouped_linear.register_autograd(_backward, setup_context=_setup)
