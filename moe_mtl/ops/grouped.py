"""Sparse experts from torch's own products: each expert's rows laid together, one product per layer.

Shapes: `N` tokens, `D` width, `E` experts, `K` experts chosen per token, `S = N K` routed copies, `P` width of the
first layer (`2 H` where it is gated, else `H`), `H` hidden width, `O` output width.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activation, activate, activate_for_backward
from .routing import RoutingPlan
from .weights import ExpertWeights, PerInput, no_gradients


def forward(
    x_ND: Tensor, weights_NK: Tensor, w: ExpertWeights, plan: RoutingPlan, activation: str | Activation, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """`[N, O]`, and what enters the activation, `[S, P]`, where `keep`."""
    pre_SP = _first_layer(x_ND.index_select(0, placed(plan.tokens_S, plan)), w, plan)
    y_SO = _linear(activate(activation, pre_SP), w.down_EOH, w.b_down_EO, plan)
    return combine(y_SO, plan, weights_NK), _all_places(pre_SP, plan) if keep else None


def backward(
    grad_NO: Tensor,
    x_ND: Tensor,
    pre_SP: Tensor | None,
    weights_NK: Tensor,
    w: ExpertWeights,
    plan: RoutingPlan,
    activation: str | Activation,
    needs: PerInput[bool],
) -> PerInput[Tensor | None]:
    """Gradients of what `needs` asks for; `pre_SP` is computed again where it was not kept."""
    tokens_S, order_S = placed(plan.tokens_S, plan), placed(plan.order_S, plan)
    rows_SD = x_ND.index_select(0, tokens_S)
    kept_SP = _first_layer(rows_SD, w, plan) if pre_SP is None else placed(pre_SP, plan)
    grad_SO = grad_NO.index_select(0, tokens_S)
    weights_S1 = weights_NK.flatten().index_select(0, order_S).unsqueeze(-1)
    h_SH, to_pre = activate_for_backward(activation, kept_SP)
    dh_SH = grouped_mm(grad_SO, w.down_EOH, plan)  # before the weight
    found = no_gradients()
    if needs.weights:
        # Where the hidden units are at hand the second layer's outputs need not be kept ("SonicMoE", 2025):
        # d weight_s = h_s . (W_down^T g_s) + b_down . g_s
        dweights_S = (h_SH * dh_SH).sum(-1, dtype=weights_NK.dtype)
        if w.b_down_EO is not None:
            dweights_S += (w.b_down_EO[_experts(plan)] * grad_SO).sum(-1, dtype=weights_NK.dtype)
        found.weights = weights_NK.new_zeros(weights_NK.numel()).index_put_((order_S,), dweights_S)
        found.weights = found.weights.view_as(weights_NK)
    if needs.down:
        found.down = outer(grad_SO, (h_SH * weights_S1).to(grad_SO.dtype), plan)
    if needs.b_down:
        found.b_down = _sums((grad_SO * weights_S1).to(grad_SO.dtype), plan)
    if not (needs.x or needs.gate or needs.up or needs.b_gate or needs.b_up):
        return found
    dpre_SP = to_pre(dh_SH.mul_(weights_S1))
    if w.gate_EHD is None:
        if needs.up:
            found.up = outer(dpre_SP, rows_SD, plan)
        if needs.b_up:
            found.b_up = _sums(dpre_SP, plan)
        dx_SD = grouped_mm(dpre_SP, w.up_EPD, plan) if needs.x else None
    else:
        dgate_SH, dup_SH = (half.contiguous() for half in dpre_SP.chunk(2, dim=1))
        found.gate = outer(dgate_SH, rows_SD, plan) if needs.gate else None
        found.up = outer(dup_SH, rows_SD, plan) if needs.up else None
        found.b_gate = _sums(dgate_SH, plan) if needs.b_gate else None
        found.b_up = _sums(dup_SH, plan) if needs.b_up else None
        dx_SD = grouped_mm(dgate_SH, w.gate_EHD, plan).add_(grouped_mm(dup_SH, w.up_EPD, plan)) if needs.x else None
    if dx_SD is not None:
        found.x = combine(dx_SD, plan)
    return found


def linear_forward(rows: Tensor, w_EPD: Tensor, plan: RoutingPlan, by_token: bool) -> Tensor:
    """`[S, P]` at copies, from the row of each copy or of its token; 0 for nobody."""
    return at_copies(grouped_mm(_rows_of(rows, plan, by_token), w_EPD.transpose(1, 2), plan), plan)


def linear_backward(
    grad_SP: Tensor, rows: Tensor, w_EPD: Tensor, plan: RoutingPlan, by_token: bool, needs_rows: bool, needs_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_SP = grad_SP.index_select(0, placed(plan.order_S, plan))
    drows = dw_EPD = None
    if needs_rows:
        drows = grouped_mm(grad_SP, w_EPD, plan)
        drows = combine(drows, plan) if by_token else at_copies(drows, plan)
    if needs_w:
        dw_EPD = outer(grad_SP, _rows_of(rows, plan, by_token), plan)
    return drows, dw_EPD


def _rows_of(rows: Tensor, plan: RoutingPlan, by_token: bool) -> Tensor:
    return rows.index_select(0, placed(plan.tokens_S if by_token else plan.order_S, plan))


def placed(rows_S: Tensor, plan: RoutingPlan) -> Tensor:
    """Without what stands behind the last expert: nobody here computes that."""
    return rows_S[: plan.num_placed]


def at_copies(y_SO: Tensor, plan: RoutingPlan) -> Tensor:
    """From places back to copies; 0 for copies that nobody here computed."""
    return _all_places(y_SO, plan).index_select(0, plan.position_S)


def combine(y_SO: Tensor, plan: RoutingPlan, weights_NK: Tensor | None = None) -> Tensor:
    """`[N, O]`: the (weighted) sum over a token's copies, of rows at places. In float32 at least.

    Choice by choice, each gathered, weighted and added in one go: all copies are never laid out side by side.
    """
    y_SO = _all_places(y_SO, plan)
    wide = torch.promote_types(y_SO.dtype, torch.float32)
    out_NO = None
    for k, position_N in enumerate(plan.position_S.view(-1, plan.num_selected).unbind(1)):
        y_NO = y_SO.index_select(0, position_N).to(wide)
        weight_N1 = None if weights_NK is None else weights_NK[:, k : k + 1].to(wide)
        if out_NO is None:
            out_NO = y_NO if weight_N1 is None else y_NO.mul_(weight_N1)
        else:
            out_NO = out_NO.add_(y_NO) if weight_N1 is None else out_NO.addcmul_(y_NO, weight_N1)
    assert out_NO is not None  # a plan has one choice at least
    return out_NO.to(y_SO.dtype)


def _all_places(rows_SO: Tensor, plan: RoutingPlan) -> Tensor:
    missing = len(plan.order_S) - plan.num_placed
    return torch.cat([rows_SO, rows_SO.new_zeros(missing, rows_SO.shape[1])]) if missing else rows_SO


def _experts(plan: RoutingPlan) -> Tensor:
    """Of each place its expert."""
    return torch.repeat_interleave(plan.counts_E)


def _sums(rows_SP: Tensor, plan: RoutingPlan) -> Tensor:
    """Per expert the sum of its rows: `[E, P]`."""
    return rows_SP.new_zeros(plan.num_experts, rows_SP.shape[1]).index_add_(0, _experts(plan), rows_SP)


def _first_layer(rows_SD: Tensor, w: ExpertWeights, plan: RoutingPlan) -> Tensor:
    if w.gate_EHD is None:
        return _linear(rows_SD, w.up_EPD, w.b_up_EP, plan)
    gate_SH = _linear(rows_SD, w.gate_EHD, w.b_gate_EH, plan)
    return torch.cat([gate_SH, _linear(rows_SD, w.up_EPD, w.b_up_EP, plan)], dim=1)


def _linear(x_SD: Tensor, w_EPD: Tensor, b_EP: Tensor | None, plan: RoutingPlan) -> Tensor:
    y_SP = grouped_mm(x_SD, w_EPD.transpose(1, 2), plan)
    return y_SP if b_EP is None else y_SP.add_(b_EP[_experts(plan)])


def grouped_mm(x_SD: Tensor, w_EDP: Tensor, plan: RoutingPlan) -> Tensor:
    """Each expert's rows times its matrix: `[S, D], [E, D, P] -> [S, P]`."""
    if _torch_takes(x_SD, w_EDP):
        return F.grouped_mm(x_SD, w_EDP, offs=plan.ends_E)
    out_SP = x_SD.new_empty(len(x_SD), w_EDP.shape[2])
    for w_DP, (start, end) in zip(w_EDP.unbind(), _spans(plan), strict=True):
        torch.mm(x_SD[start:end], w_DP, out=out_SP[start:end])
    return out_SP


def outer(a_SP: Tensor, b_SD: Tensor, plan: RoutingPlan) -> Tensor:
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
