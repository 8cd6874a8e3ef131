"""A sparse mixture of two-layer experts: each token through the experts chosen for it, and their weighted sum.

    y_n = sum_k weight_nk (W_down[e] act(W_up[e] x_n + b_up[e]) + b_down[e]),   e = index_nk

Dropless: every chosen expert computes, none is padded, none has a capacity. One function, one result, three ways to get
it: `torch` is the equation as written, a loop over experts; `grouped` sorts the copies by expert and multiplies each
expert's rows in one grouped product.

Shapes: `N` tokens, `D` width, `E` experts, `K` experts chosen per token, `S = N K` routed copies, `P` width of the
first layer (`2 H` where it is gated, else `H`), `H` hidden width, `O` output width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .routing import RoutingPlan, make_plan

Backend = Literal["torch", "grouped"]
Activation = Callable[[Tensor], Tensor]


def gated(activation: Activation) -> Activation:
    """`act(gate) * up` of a first layer whose output is `[gate; up]`."""

    def apply(pre_SP: Tensor) -> Tensor:
        gate_SH, up_SH = pre_SP.chunk(2, dim=-1)
        return activation(gate_SH) * up_SH

    return apply


GATED: dict[str, Activation] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}
ACTIVATIONS: dict[str, Activation] = {
    "relu": F.relu,
    "relu2": lambda pre_SH: F.relu(pre_SH).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda pre_SH: F.gelu(pre_SH, approximate="tanh"),
    "silu": F.silu,
    **{name: gated(activation) for name, activation in GATED.items()},
}


def expert_mlp(
    x_ND: Tensor,
    w_up_EPD: Tensor,
    w_down_EOH: Tensor,
    indices_NK: Tensor,
    weights_NK: Tensor,
    *,
    activation: str | Activation = "swiglu",
    b_up_EP: Tensor | None = None,
    b_down_EO: Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Applies to each token the experts chosen for it.

    Args:
        x_ND: tokens.
        w_up_EPD: first layers, `[E, P, D]`; any strides, so that transposed weights need no copy.
        w_down_EOH: second layers, `[E, O, H]`; any strides.
        indices_NK: int64, each in `[0, E]`; `E` is nobody here, and adds nothing.
        weights_NK: float weights of the chosen experts; differentiable.
        activation: a name of `ACTIVATIONS`, or a function `[S, P] -> [S, H]` that treats each row by itself.
        b_up_EP, b_down_EO: biases.
        backend: `torch` or `grouped`; by default `grouped`.

    Returns:
        `[N, O]`, in the dtype of `x_ND`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; raised before anything is computed.
    """
    act = ACTIVATIONS.get(activation) if isinstance(activation, str) else activation
    if act is None:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)} or a function, found {activation!r}")
    _check(x_ND, w_up_EPD, w_down_EOH, indices_NK, weights_NK, b_up_EP, b_down_EO)
    if isinstance(activation, str):  # what a function makes of a row only running it would tell
        wide = w_up_EPD.shape[1]
        made = wide // 2 if activation in GATED else wide
        if made != w_down_EOH.shape[2] or (activation in GATED and wide % 2):
            raise ValueError(f"w_down: expected [E, O, {made}], as {activation} makes {made} of {wide}")
    backend = "grouped" if backend is None else backend
    if backend == "torch":
        return _loop(x_ND, w_up_EPD, w_down_EOH, indices_NK, weights_NK, act, b_up_EP, b_down_EO)
    if backend != "grouped":
        raise ValueError(f"backend: expected torch or grouped, found {backend!r}")
    plan = make_plan(indices_NK, len(w_up_EPD))
    return _Grouped.apply(x_ND, w_up_EPD, w_down_EOH, weights_NK, b_up_EP, b_down_EO, plan, act)


def _check(
    x_ND: Tensor,
    w_up_EPD: Tensor,
    w_down_EOH: Tensor,
    indices_NK: Tensor,
    weights_NK: Tensor,
    b_up_EP: Tensor | None,
    b_down_EO: Tensor | None,
) -> None:
    if x_ND.dim() != 2 or w_up_EPD.dim() != 3 or w_down_EOH.dim() != 3:
        shapes = [list(t.shape) for t in (x_ND, w_up_EPD, w_down_EOH)]
        raise ValueError(f"expected x [N, D], w_up [E, P, D] and w_down [E, O, H], found {shapes}")
    rows, width = x_ND.shape
    experts, wide, of = w_up_EPD.shape
    if of != width or len(w_down_EOH) != experts:
        raise ValueError(
            f"expected w_up [E, P, {width}] and w_down [E, O, H] of as many experts, "
            f"found {list(w_up_EPD.shape)} and {list(w_down_EOH.shape)}"
        )
    if weights_NK.shape != indices_NK.shape or indices_NK.dim() != 2 or len(indices_NK) != rows:
        raise ValueError(
            f"expected indices and weights of shape [{rows}, K], "
            f"found {list(indices_NK.shape)} and {list(weights_NK.shape)}"
        )
    for name, bias, shape in (("b_up", b_up_EP, (experts, wide)), ("b_down", b_down_EO, (experts, len(w_down_EOH[0])))):
        if bias is not None and bias.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, found {list(bias.shape)}")
    for name, tensor in (("w_up", w_up_EPD), ("w_down", w_down_EOH), ("b_up", b_up_EP), ("b_down", b_down_EO)):
        if tensor is not None and (tensor.dtype != x_ND.dtype or tensor.device != x_ND.device):
            raise ValueError(f"{name}: expected {x_ND.dtype} on {x_ND.device}, found {tensor.dtype} on {tensor.device}")


def _loop(
    x_ND: Tensor,
    w_up_EPD: Tensor,
    w_down_EOH: Tensor,
    indices_NK: Tensor,
    weights_NK: Tensor,
    act: Activation,
    b_up_EP: Tensor | None,
    b_down_EO: Tensor | None,
) -> Tensor:
    """The equation as written. `unbind` once: a `w[e]` per expert would cost the backward a full-size zero for each."""
    experts = len(w_up_EPD)
    b_up = [None] * experts if b_up_EP is None else b_up_EP.unbind()
    b_down = [None] * experts if b_down_EO is None else b_down_EO.unbind()
    out_NO = x_ND.new_zeros(len(x_ND), w_down_EOH.shape[1])
    for e, (w_up_PD, w_down_OH) in enumerate(zip(w_up_EPD.unbind(), w_down_EOH.unbind(), strict=True)):
        tokens, k = (indices_NK == e).nonzero(as_tuple=True)
        hidden = act(F.linear(x_ND[tokens], w_up_PD, b_up[e]))
        y = F.linear(hidden, w_down_OH, b_down[e])
        out_NO = out_NO.index_add(0, tokens, (y * weights_NK[tokens, k].unsqueeze(-1)).to(out_NO.dtype))
    return out_NO


class _Grouped(torch.autograd.Function):
    """Saves the tokens, what enters the activation, and the plan; nothing of width `K` times the output.

    The gradient of a weight is taken where the hidden units are at hand ("SonicMoE", 2025, arXiv 2512.14080):
    d weight_s = h_s . (W_down^T g_s) + b_down . g_s, so that the second layer's outputs need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        w_up_EPD: Tensor,
        w_down_EOH: Tensor,
        weights_NK: Tensor,
        b_up_EP: Tensor | None,
        b_down_EO: Tensor | None,
        plan: RoutingPlan,
        act: Activation,
    ) -> Tensor:
        tokens_S = _placed(plan.tokens_S, plan)
        pre_SP = _grouped_linear(x_ND[tokens_S], w_up_EPD, b_up_EP, plan)
        y_SO = _grouped_linear(act(pre_SP), w_down_EOH, b_down_EO, plan)
        y_NKO = _at_copies(y_SO, plan)
        ctx.save_for_backward(x_ND, pre_SP, w_up_EPD, w_down_EOH, weights_NK, b_down_EO)
        ctx.plan, ctx.act, ctx.has_b_up = plan, act, b_up_EP is not None
        if weights_NK.dtype == y_NKO.dtype:
            return torch.bmm(weights_NK.unsqueeze(1), y_NKO).squeeze(1)
        return (y_NKO * weights_NK.unsqueeze(-1)).sum(1).to(y_NKO.dtype)  # routers give float32 weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NO,) = grads
        x_ND, pre_SP, w_up_EPD, w_down_EOH, weights_NK, b_down_EO = ctx.saved_tensors
        plan: RoutingPlan = ctx.plan
        needs_x, needs_up, needs_down, needs_weights, needs_b_up, needs_b_down = ctx.needs_input_grad[:6]
        tokens_S, order_S = _placed(plan.tokens_S, plan), _placed(plan.order_S, plan)
        grad_SO = grad_NO[tokens_S]
        weights_S1 = weights_NK.flatten()[order_S].unsqueeze(-1)
        with torch.enable_grad():
            pre_SP = pre_SP.detach().requires_grad_()
            h_SH = ctx.act(pre_SP)
        dh_SH = _grouped_mm(grad_SO, w_down_EOH, plan)  # before the weight

        dx_ND = dw_up = dw_down = dweights_NK = db_up = db_down = None
        if needs_weights:
            dweights_S = (h_SH.detach() * dh_SH).sum(-1, dtype=weights_NK.dtype)
            if b_down_EO is not None:
                dweights_S += (b_down_EO[_experts(plan)] * grad_SO).sum(-1, dtype=weights_NK.dtype)
            dweights_NK = weights_NK.new_zeros(weights_NK.numel()).index_put((order_S,), dweights_S)
            dweights_NK = dweights_NK.view_as(weights_NK)
        if needs_down:
            dw_down = _outer(grad_SO, (h_SH.detach() * weights_S1).to(grad_SO.dtype), plan)
        if needs_b_down:
            db_down = _sums((grad_SO * weights_S1).to(grad_SO.dtype), plan)
        if needs_x or needs_up or needs_b_up:
            (dpre_SP,) = torch.autograd.grad(h_SH, pre_SP, (dh_SH * weights_S1).to(h_SH.dtype))
            if needs_b_up:
                db_up = _sums(dpre_SP, plan)
            if needs_up:
                dw_up = _outer(dpre_SP, x_ND[tokens_S], plan)
            if needs_x:
                dx_ND = _at_copies(_grouped_mm(dpre_SP, w_up_EPD, plan), plan).sum(1)
        return dx_ND, dw_up, dw_down, dweights_NK, db_up, db_down, None, None


def _placed(rows_S: Tensor, plan: RoutingPlan) -> Tensor:
    """Without what stands behind the last expert: nobody here computes that."""
    return rows_S[: int(plan.offsets[-1])]


def _at_copies(y_SO: Tensor, plan: RoutingPlan) -> Tensor:
    """From places back to copies, `[N, K, O]`; 0 for copies that nobody here computed."""
    if len(y_SO) < len(plan.order_S):
        y_SO = torch.cat([y_SO, y_SO.new_zeros(len(plan.order_S) - len(y_SO), y_SO.shape[1])])
    return y_SO[plan.position_S].unflatten(0, (-1, plan.num_selected))


def _experts(plan: RoutingPlan) -> Tensor:
    """Of each place its expert."""
    return torch.repeat_interleave(plan.counts_E)


def _sums(rows_SP: Tensor, plan: RoutingPlan) -> Tensor:
    """Per expert the sum of its rows: `[E, P]`."""
    return rows_SP.new_zeros(plan.num_experts, rows_SP.shape[1]).index_add_(0, _experts(plan), rows_SP)


def _grouped_linear(x_SD: Tensor, w_EPD: Tensor, b_EP: Tensor | None, plan: RoutingPlan) -> Tensor:
    y_SP = _grouped_mm(x_SD, w_EPD.transpose(1, 2), plan)
    return y_SP if b_EP is None else y_SP.add_(b_EP[_experts(plan)])


def _grouped_mm(x_SD: Tensor, w_EDP: Tensor, plan: RoutingPlan) -> Tensor:
    """Each expert's rows times its matrix: `[S, D], [E, D, P] -> [S, P]`."""
    if _torch_takes(x_SD, w_EDP):
        return F.grouped_mm(x_SD, w_EDP, offs=plan.ends_E)
    out_SP = x_SD.new_empty(len(x_SD), w_EDP.shape[2])
    for w_DP, (start, end) in zip(w_EDP.unbind(), _spans(plan), strict=True):
        torch.mm(x_SD[start:end], w_DP, out=out_SP[start:end])
    return out_SP


def _outer(a_SP: Tensor, b_SD: Tensor, plan: RoutingPlan) -> Tensor:
    """Per expert the product of its rows, `[S, P], [S, D] -> [E, P, D]`; 0 for an expert without rows."""
    if _torch_takes(a_SP, b_SD):
        return F.grouped_mm(a_SP.t(), b_SD, offs=plan.ends_E)
    out_EPD = a_SP.new_empty(plan.num_experts, a_SP.shape[1], b_SD.shape[1])
    for out_PD, (start, end) in zip(out_EPD.unbind(), _spans(plan), strict=True):
        torch.mm(a_SP[start:end].t(), b_SD[start:end], out=out_PD)
    return out_EPD


def _torch_takes(*operands: Tensor) -> bool:
    """Whether torch's grouped product takes them: not float64, rows of a multiple of 16 bytes."""
    return all(
        t.dtype != torch.float64
        and t.data_ptr() % 16 == 0
        and all(stride == 1 or stride * t.itemsize % 16 == 0 for stride in t.stride())
        for t in operands
    )


def _spans(plan: RoutingPlan) -> list[tuple[int, int]]:
    return list(pairwise(plan.offsets.tolist()))
