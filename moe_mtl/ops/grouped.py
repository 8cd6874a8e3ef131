"""Sparse experts from torch's own products, a few neighbouring experts at a time: see `layout`.

Shapes: `N` tokens, `D` width, `E` experts, `K` experts chosen per token, `S = N K` routed copies, `R` rows, `P` width
of the first layer (`2 H` where it is gated, else `H`), `H` hidden width, `O` output width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import Activation, activate, activate_backward
from .layout import Layout, Part, batches_turned, lay_out
from .routing import RoutingPlan
from .weights import ExpertWeights, PerInput, gradient_of, no_gradients


def forward(
    x_ND: Tensor,
    weights_NK: Tensor,
    w: ExpertWeights,
    plan: RoutingPlan,
    activation: str | Activation,
    keep: bool,
    in_graph: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """`[N, O]`, and where `keep` what enters the activation: part by part, in a graph `[S, P]` as a whole."""
    slots = _may_have_slots(activation, in_graph) and (keep or batches_turned(x_ND.dtype))
    rows = lay_out(plan, w.wide, x_ND.dtype, slots, few_last=keep)
    if plan.num_placed < len(plan.order_S):  # whatever weight a copy for nobody has, it adds nothing
        weights_NK = weights_NK.masked_fill(plan.indices_NK == plan.num_experts, 0)
    y_RO = rows.empty(w.down_EOH.shape[1], x_ND)
    whole_RP = rows.empty(w.wide, x_ND) if keep and in_graph else None
    kept = []
    for part in rows.parts:
        pre_RP = _first_layer(part.of_tokens(x_ND), w, part, None if whole_RP is None else whole_RP[part.rows])
        if keep:
            kept.append(pre_RP)
        h_RH = activate(activation, pre_RP)
        part.product(h_RH, w.down_EOH[part.experts].transpose(1, 2), y_RO[part.rows])
        if w.b_down_EO is not None:
            y_RO[part.rows] += part.of_experts(w.b_down_EO)
    return combine(y_RO, rows.position_NK, weights_NK), kept if whole_RP is None else [whole_RP]


def backward(
    grad_NO: Tensor,
    x_ND: Tensor,
    kept: list[Tensor],
    weights_NK: Tensor,
    w: ExpertWeights,
    plan: RoutingPlan,
    activation: str | Activation,
    needs: PerInput[bool],
    in_graph: bool = False,
) -> PerInput[Tensor | None]:
    """Gradients of what `needs` asks for; what was not kept is computed again. Frees `kept` on the way."""
    rows = lay_out(plan, w.wide, x_ND.dtype, _may_have_slots(activation, in_graph), few_last=True)
    weights_S1 = weights_NK.reshape(-1, 1)
    wide = torch.promote_types(x_ND.dtype, torch.float32)
    dx_SD = None
    if needs.x:  # of copies alone: it grows until the end, and empty rows can be most of all
        dx_SD = x_ND.new_empty(len(plan.order_S), x_ND.shape[1])
        dx_SD[plan.num_placed :] = 0
    dweights_R1 = rows.empty(1, x_ND, wide) if needs.weights else None
    found = no_gradients()
    if in_graph and kept:
        kept = [kept[0][part.rows] for part in rows.parts]

    def of_part(part: Part) -> None:
        """What it makes on the way is gone before the next part begins."""
        x_RD, grad_RO, weights_R1 = part.of_tokens(x_ND), part.of_tokens(grad_NO), part.of_copies(weights_S1)
        pre_RP = kept.pop(0) if kept else _first_layer(x_RD, w, part)
        dh_RH = part.product(grad_RO, w.down_EOH[part.experts], grad_RO.new_empty(len(grad_RO), w.down_EOH.shape[2]))
        dpre_RP = torch.empty_like(pre_RP)
        h_RH = activate_backward(activation, pre_RP, (dh_RH * weights_R1).to(dh_RH.dtype), dpre_RP)
        if dweights_R1 is not None:
            # Where the hidden units are at hand the second layer's outputs need not be kept ("SonicMoE", 2025):
            # d weight_s = h_s . (W_down^T g_s) + b_down . g_s
            torch.sum(h_RH * dh_RH, -1, keepdim=True, dtype=wide, out=dweights_R1[part.rows])
            if w.b_down_EO is not None:
                bias_RO = part.of_experts(w.b_down_EO)
                dweights_R1[part.rows] += (bias_RO * grad_RO).sum(-1, keepdim=True, dtype=wide)
        weighted_RH = torch.mul(h_RH, weights_R1, out=dh_RH) if needs.down else None
        del pre_RP, dh_RH, h_RH
        of_first_layer(part, x_RD, dpre_RP)
        del x_RD, dpre_RP
        # The peak of memory is where the last gradient is written: this one needs the least beside it.
        if weighted_RH is not None:
            part.outer(grad_RO, weighted_RH, gradient_of(found, "down", w.down_EOH)[part.experts])
        if needs.b_down:
            part.sums(grad_RO.mul_(weights_R1), gradient_of(found, "b_down", w.b_down_EO)[part.experts])

    def of_first_layer(part: Part, x_RD: Tensor, dpre_RP: Tensor) -> None:
        dup_RP = dpre_RP
        if w.gate_EHD is not None:
            dgate_RH, dup_RP = dpre_RP.chunk(2, dim=1)
            if needs.gate:
                part.outer(dgate_RH, x_RD, gradient_of(found, "gate", w.gate_EHD)[part.experts])
            if needs.b_gate:
                part.sums(dgate_RH, gradient_of(found, "b_gate", w.b_gate_EH)[part.experts])
        if needs.up:
            part.outer(dup_RP, x_RD, gradient_of(found, "up", w.up_EPD)[part.experts])
        if needs.b_up:
            part.sums(dup_RP, gradient_of(found, "b_up", w.b_up_EP)[part.experts])
        if dx_SD is not None:
            dx_RD = dx_SD[part.copies] if part.real_C is None else torch.empty_like(x_RD)
            part.product(dup_RP, w.up_EPD[part.experts], dx_RD)
            if w.gate_EHD is not None:
                dx_RD += part.product(dgate_RH, w.gate_EHD[part.experts], torch.empty_like(dx_RD))
            if part.real_C is not None:
                torch.index_select(dx_RD, 0, part.real_C, out=dx_SD[part.copies])

    for part in rows.parts:
        of_part(part)
    if dweights_R1 is not None:
        found.weights = at_copies(dweights_R1, rows).view_as(weights_NK).to(weights_NK.dtype)
    if dx_SD is not None:
        found.x = combine(dx_SD, plan.position_S.view_as(plan.indices_NK))
    return found


def _may_have_slots(activation: str | Activation, in_graph: bool) -> bool:
    """A graph must know the number of rows; and an empty slot's zeros may be what a function is not defined for."""
    return not in_graph and isinstance(activation, str)


def linear_forward(x: Tensor, w_EPD: Tensor, plan: RoutingPlan, by_token: bool) -> Tensor:
    """`[S, P]` at copies, from the row of each copy or of its token; 0 for nobody."""
    rows = lay_out(plan, w_EPD.shape[1], x.dtype)
    y_RP = rows.empty(w_EPD.shape[1], x)
    for part in rows.parts:
        x_RD = part.of_tokens(x) if by_token else part.of_copies(x)
        part.product(x_RD, w_EPD[part.experts].transpose(1, 2), y_RP[part.rows])
    return at_copies(y_RP, rows)


def linear_backward(
    grad_SP: Tensor, x: Tensor, w_EPD: Tensor, plan: RoutingPlan, by_token: bool, needs_x: bool, needs_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    rows = lay_out(plan, w_EPD.shape[1], x.dtype)
    dx_RD = rows.empty(w_EPD.shape[2], x) if needs_x else None
    dw_EPD = w_EPD.new_empty(w_EPD.shape) if needs_w else None
    for part in rows.parts:
        grad_RP = part.of_copies(grad_SP)
        if dx_RD is not None:
            part.product(grad_RP, w_EPD[part.experts], dx_RD[part.rows])
        if dw_EPD is not None:
            part.outer(grad_RP, part.of_tokens(x) if by_token else part.of_copies(x), dw_EPD[part.experts])
    if dx_RD is None:
        return None, dw_EPD
    return combine(dx_RD, rows.position_NK) if by_token else at_copies(dx_RD, rows), dw_EPD


def at_copies(y_RO: Tensor, rows: Layout) -> Tensor:
    """From rows back to copies."""
    return y_RO.index_select(0, rows.position_NK.flatten())


def combine(y_RO: Tensor, position_NK: Tensor, weights_NK: Tensor | None = None) -> Tensor:
    """`[N, O]`: the (weighted) sum over a token's copies, each in its row, rounded once."""
    if weights_NK is None:
        return F.embedding_bag(position_NK, y_RO, mode="sum")
    wide = torch.promote_types(y_RO.dtype, weights_NK.dtype)
    weighted_NO = F.embedding_bag(position_NK, y_RO.to(wide), mode="sum", per_sample_weights=weights_NK.to(wide))
    return weighted_NO.to(y_RO.dtype)


def _first_layer(x_RD: Tensor, w: ExpertWeights, part: Part, out_RP: Tensor | None = None) -> Tensor:
    out_RP = x_RD.new_empty(len(x_RD), w.wide) if out_RP is None else out_RP
    layers = [(w.up_EPD, w.b_up_EP)] if w.gate_EHD is None else [(w.gate_EHD, w.b_gate_EH), (w.up_EPD, w.b_up_EP)]
    outs = [out_RP] if w.gate_EHD is None else out_RP.chunk(2, dim=1)
    for (weight, bias), y in zip(layers, outs, strict=True):
        part.product(x_RD, weight[part.experts].transpose(1, 2), y)
        if bias is not None:
            y += part.of_experts(bias)
    return out_RP
