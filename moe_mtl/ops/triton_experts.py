"""Sparse experts in Triton: the grouped product with its gathers, scatters and activations inside.

The scheme is that of "SonicMoE" (2025, arXiv 2512.14080): rows are gathered as they are read, so no copy of the tokens
is ever laid out; the activation is in the epilogue of the first product; the backward of the second product yields, in
its epilogue, the gradient of the first layer's output, the weighted hidden units and the router's gradient. Only the
tokens, the first layer's output and the plan are kept. No atomics: every result has one order of summation.

Shapes: `N` tokens, `D` width, `E` experts, `K` experts chosen per token, `S = N K` routed copies, `H` hidden width,
`O` output width. A row of a kernel is a place of the plan; a tile is up to `ROWS` places of one expert.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .activations import GATED, Activation, activate_backward
from .routing import RoutingPlan
from .triton_configs import Config, config_for, rows_per_tile
from .triton_kernels import (
    BY_COPY,
    BY_PLACE,
    BY_TOKEN,
    combine_kernel,
    first_layer_kernel,
    hidden_grad_kernel,
    linear_kernel,
    outer_kernel,
    sum_kernel,
)
from .triton_launch import launch, numerics
from .weights import ExpertWeights, PerInput, no_gradients


class Tiled:
    """A routing plan cut into row tiles, with what every launch over it needs."""

    def __init__(self, plan: RoutingPlan, like: Tensor, rows: int) -> None:
        self.plan, self.rows = plan, rows
        self.tile_expert_T, self.tile_start_T = plan.tiles(rows, "triton")
        self.device, self.dtype = like.device, like.dtype

    @property
    def num_tiles(self) -> int:
        return len(self.tile_expert_T)

    def arguments(self) -> dict[str, object]:
        return {
            "order_ptr": self.plan.order_S,
            "offsets_ptr": self.plan.offsets,
            "tile_expert_ptr": self.tile_expert_T,
            "tile_start_ptr": self.tile_start_T,
            "num_tiles": self.num_tiles,
            "num_experts": self.plan.num_experts,
            "SELECTED": self.plan.num_selected,
        }

    def tile(self, config: Config, width: int, depth: int) -> dict[str, object]:
        return {
            "DEPTH": depth,
            "ROWS": self.rows,
            "COLS": config.cols,
            "BLOCK_D": config.depth,
            "GROUP": config.group,
            "EVEN": depth % config.depth == 0 and width % config.cols == 0,
            **numerics(self.dtype),
        }

    def grid(self, config: Config, width: int) -> tuple[int, ...]:
        return (self.num_tiles * triton.cdiv(width, config.cols),)


def tiled(plan: RoutingPlan, like: Tensor) -> Tiled:
    rows = rows_per_tile(len(plan.order_S), plan.num_experts)
    return Tiled(plan, like, min(rows, 64) if like.dtype == torch.float32 else rows)


def first_layer(
    x_ND: Tensor,
    w_gate_EHD: Tensor | None,
    w_up_EHD: Tensor,
    b_gate_EH: Tensor | None,
    b_up_EH: Tensor | None,
    activation: str,
    tiles: Tiled,
    keep: bool,
) -> tuple[Tensor | None, Tensor]:
    """What enters the activation, `[S, H]` or `[S, 2 H]` with the gate's half first (where `keep`), and what leaves."""
    hidden, depth = w_up_EHD.shape[1:]
    gated, copies = w_gate_EHD is not None, len(tiles.plan.order_S)
    config = config_for("first_layer", x_ND.dtype, tiles.rows, hidden, depth, x_ND.device, gated)
    h_SH = x_ND.new_empty(copies, hidden)
    pre_SP = x_ND.new_empty(copies, 2 * hidden if gated else hidden) if keep else None
    pre_gate, pre_up = halves(pre_SP, gated) if pre_SP is not None else (None, None)
    w_gate = w_up_EHD if w_gate_EHD is None else w_gate_EHD
    if tiles.num_tiles and hidden:
        launch(
            first_layer_kernel,
            tiles.grid(config, hidden),
            {
                "x_ptr": x_ND,
                "w_gate_ptr": w_gate,
                "w_up_ptr": w_up_EHD,
                "b_gate_ptr": h_SH if b_gate_EH is None else b_gate_EH,
                "b_up_ptr": h_SH if b_up_EH is None else b_up_EH,
                "pre_gate_ptr": h_SH if pre_gate is None else pre_gate,
                "pre_up_ptr": h_SH if pre_up is None else pre_up,
                "h_ptr": h_SH,
                **tiles.arguments(),
                "hidden": hidden,
                "stride_x": x_ND.stride(0),
                "stride_we": w_up_EHD.stride(0),
                "stride_wd": w_up_EHD.stride(2),
                "stride_wh": w_up_EHD.stride(1),
                "stride_b": 0 if b_up_EH is None else b_up_EH.stride(0),
                "stride_pre": 0 if pre_SP is None else pre_SP.stride(0),
                "KIND": GATED.get(activation, activation),
                "GATED": gated,
                "BIASED": b_up_EH is not None,
                "KEEP": keep,
                **tiles.tile(config, hidden, depth),
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return pre_SP, h_SH


def linear(
    a: Tensor,
    w_EDP: Tensor,
    tiles: Tiled,
    *,
    rows_by: int = BY_PLACE,
    to: int = BY_COPY,
    second: tuple[Tensor, Tensor] | None = None,
    b_EP: Tensor | None = None,
    clear: bool = False,
) -> Tensor:
    """`[S, P]`: each place's row of `a` times its expert's matrix `[D, P]`; rows for nobody are 0 only if `clear`."""
    depth, width = w_EDP.shape[1:]
    config = config_for("linear", a.dtype, tiles.rows, width, depth, a.device)
    size = (len(tiles.plan.order_S), width)
    y_SP = a.new_zeros(size) if clear else a.new_empty(size)
    second_a, second_w = second if second is not None else (a, w_EDP)
    if tiles.num_tiles and width:
        launch(
            linear_kernel,
            tiles.grid(config, width),
            {
                "a_ptr": a,
                "w_ptr": w_EDP,
                "second_a_ptr": second_a,
                "second_w_ptr": second_w,
                "b_ptr": y_SP if b_EP is None else b_EP,
                "y_ptr": y_SP,
                **tiles.arguments(),
                "width": width,
                "stride_a": a.stride(0),
                "stride_we": w_EDP.stride(0),
                "stride_wd": w_EDP.stride(1),
                "stride_wc": w_EDP.stride(2),
                "stride_b": 0 if b_EP is None else b_EP.stride(0),
                "stride_y": y_SP.stride(0),
                "FROM": rows_by,
                "TO": to,
                "TWO": second is not None,
                "BIASED": b_EP is not None,
                **tiles.tile(config, width, depth),
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y_SP


def hidden_grad(
    grad_NO: Tensor,
    w_down_EOH: Tensor,
    pre_SP: Tensor,
    weights_NK: Tensor,
    activation: str,
    gated: bool,
    tiles: Tiled,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `pre` `[S, P]`, weighted hidden units `[S, H]`, and `h . dh` of each copy, `[S]` in float32."""
    depth, hidden = w_down_EOH.shape[1:]
    config = config_for("hidden_grad", grad_NO.dtype, tiles.rows, hidden, depth, grad_NO.device)
    dpre_SP, weighted_SH = torch.empty_like(pre_SP), pre_SP.new_empty(len(pre_SP), hidden)
    pre_gate, pre_up = halves(pre_SP, gated)
    dpre_gate, dpre_up = halves(dpre_SP, gated)
    # Zeros, for the copies that nobody here computes.
    dweights_SC = grad_NO.new_zeros(len(pre_SP), triton.cdiv(hidden, config.cols), dtype=torch.float32)
    if tiles.num_tiles and hidden:
        launch(
            hidden_grad_kernel,
            tiles.grid(config, hidden),
            {
                "grad_ptr": grad_NO,
                "w_down_ptr": w_down_EOH,
                "pre_gate_ptr": pre_gate,
                "pre_up_ptr": pre_up,
                "weights_ptr": weights_NK,
                "dpre_gate_ptr": dpre_gate,
                "dpre_up_ptr": dpre_up,
                "weighted_h_ptr": weighted_SH,
                "dweights_ptr": dweights_SC,
                **tiles.arguments(),
                "hidden": hidden,
                "stride_grad": grad_NO.stride(0),
                "stride_we": w_down_EOH.stride(0),
                "stride_wo": w_down_EOH.stride(1),
                "stride_wh": w_down_EOH.stride(2),
                "stride_pre": pre_SP.stride(0),
                "KIND": GATED.get(activation, activation),
                "GATED": gated,
                "HALVES": tiles.rows * config.cols // (32 * config.num_warps) >= 32,
                **tiles.tile(config, hidden, depth),
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return dpre_SP, weighted_SH, dweights_SC.sum(1)


def outer(a: Tensor, b: Tensor, out_EPD: Tensor, tiles: Tiled, *, a_by: int = BY_PLACE, b_by: int = BY_PLACE) -> Tensor:
    """Writes per expert the product of its rows, `a^T b`, into `out_EPD`, whatever its strides."""
    experts, a_width, b_width = out_EPD.shape
    config = config_for("outer", a.dtype, tiles.rows, b_width, a_width, a.device)
    programs = triton.cdiv(a_width, config.rows) * triton.cdiv(b_width, config.cols)
    if programs and experts:
        launch(
            outer_kernel,
            (programs, experts),
            {
                "a_ptr": a,
                "b_ptr": b,
                "out_ptr": out_EPD,
                "order_ptr": tiles.plan.order_S,
                "offsets_ptr": tiles.plan.offsets,
                "a_width": a_width,
                "b_width": b_width,
                "stride_a": a.stride(0),
                "stride_b": b.stride(0),
                "stride_oe": out_EPD.stride(0),
                "stride_oa": out_EPD.stride(1),
                "stride_ob": out_EPD.stride(2),
                "SELECTED": tiles.plan.num_selected,
                "A_BY": a_by,
                "B_BY": b_by,
                "ROWS": config.rows,
                "COLS": config.cols,
                "BLOCK_S": config.depth,
                "GROUP": config.group,
                **numerics(a.dtype),
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out_EPD


def sums(a: Tensor, tiles: Tiled, *, rows_by: int = BY_PLACE, weights_NK: Tensor | None = None) -> Tensor:
    """Per expert the (weighted) sum of its rows, `[E, P]`."""
    plan, width, cols = tiles.plan, a.shape[1], 64
    out_EP = a.new_empty(plan.num_experts, width)
    if width and plan.num_experts:
        launch(
            sum_kernel,
            (triton.cdiv(width, cols), plan.num_experts),
            {
                "a_ptr": a,
                "weights_ptr": a if weights_NK is None else weights_NK,
                "out_ptr": out_EP,
                "order_ptr": plan.order_S,
                "offsets_ptr": plan.offsets,
                "width": width,
                "stride_a": a.stride(0),
                "stride_oe": out_EP.stride(0),
                "SELECTED": plan.num_selected,
                "FROM": rows_by,
                "WEIGHTED": weights_NK is not None,
                "ROWS": 32,
                "COLS": cols,
            },
        )
    return out_EP


def combine(y_SO: Tensor, tiles: Tiled, weights_NK: Tensor | None) -> Tensor:
    """`[N, O]`: the (weighted) sum of each token's copies, of which row `n K + k` of `y` is one."""
    plan, width = tiles.plan, y_SO.shape[1]
    tokens = len(plan.indices_NK)
    out_NO = y_SO.new_empty(tokens, width)
    rows, cols = 4, min(256, max(16, triton.next_power_of_2(width)))
    if tokens and width:
        launch(
            combine_kernel,
            (triton.cdiv(tokens, rows), triton.cdiv(width, cols)),
            {
                "y_ptr": y_SO,
                "weights_ptr": y_SO if weights_NK is None else weights_NK.contiguous(),
                "indices_ptr": plan.indices_NK,
                "out_ptr": out_NO,
                "num_tokens": tokens,
                "num_experts": plan.num_experts,
                "width": width,
                "SELECTED": plan.num_selected,
                "WEIGHTED": weights_NK is not None,
                "ROWS": rows,
                "COLS": cols,
            },
        )
    return out_NO


def halves(pre_SP: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Views of the gate's and the other half; twice the whole where there is no gate."""
    if not gated:
        return pre_SP, pre_SP
    gate, up = pre_SP.chunk(2, dim=1)
    return gate, up


# --- the two passes, as `grouped` has them ---


def forward(
    x_ND: Tensor,
    weights_NK: Tensor,
    w: ExpertWeights,
    plan: RoutingPlan,
    activation: str | Activation,
    keep: bool,
    in_graph: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """`[N, O]`, and where `keep` what enters the activation, `[S, P]`. In a graph all is as without one."""
    tiles = tiled(plan, x_ND)
    x_ND = _rows(x_ND)
    pre_SP, h_SH = _hidden(x_ND, w, activation, tiles, keep)
    y_SO = linear(h_SH, w.down_EOH.transpose(1, 2), tiles, b_EP=_packed(w.b_down_EO))
    return combine(y_SO, tiles, weights_NK), [] if pre_SP is None else [pre_SP]


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
    tiles = tiled(plan, x_ND)
    x_ND, grad_NO, weights_NK = _rows(x_ND), _rows(grad_NO), weights_NK.contiguous()
    pre_SP = kept.pop() if kept else _hidden(x_ND, w, activation, tiles, keep=True)[0]
    assert pre_SP is not None
    gated = w.gate_EHD is not None or activation in GATED
    if isinstance(activation, str):
        dpre_SP, weighted_SH, dweights_S = hidden_grad(
            grad_NO, w.down_EOH, pre_SP, weights_NK, activation, gated, tiles
        )
    else:
        dpre_SP, weighted_SH, dweights_S = _unfused_hidden_grad(grad_NO, w, pre_SP, weights_NK, activation, tiles)
    found = no_gradients()
    if needs.weights:
        dweights_NK = dweights_S.view_as(weights_NK)
        if w.b_down_EO is not None:  # b_down . g of every expert: one product, from which the chosen are taken
            each_NE = F.pad((grad_NO @ w.b_down_EO.t()).float(), (0, 1))
            e_NK = plan.indices_NK.long()
            e_NK = torch.where((e_NK >= 0) & (e_NK < plan.num_experts), e_NK, plan.num_experts)
            dweights_NK = dweights_NK + each_NE.gather(1, e_NK)
        found.weights = dweights_NK.to(weights_NK.dtype)
    if needs.down:
        found.down = outer(grad_NO, weighted_SH, torch.empty_like(w.down_EOH), tiles, a_by=BY_TOKEN)
    del weighted_SH, pre_SP
    if needs.b_down:
        found.b_down = sums(grad_NO, tiles, rows_by=BY_TOKEN, weights_NK=weights_NK)
    if w.gate_EHD is None:
        if needs.up:
            found.up = outer(dpre_SP, x_ND, torch.empty_like(w.up_EPD), tiles, b_by=BY_TOKEN)
        if needs.b_up:
            found.b_up = sums(dpre_SP, tiles)
        dx_SD = linear(dpre_SP, w.up_EPD, tiles) if needs.x else None
    else:
        dgate_SH, dup_SH = halves(dpre_SP, gated)
        if needs.gate:
            found.gate = outer(dgate_SH, x_ND, torch.empty_like(w.gate_EHD), tiles, b_by=BY_TOKEN)
        if needs.up:
            found.up = outer(dup_SH, x_ND, torch.empty_like(w.up_EPD), tiles, b_by=BY_TOKEN)
        if needs.b_gate:
            found.b_gate = sums(dgate_SH, tiles)
        if needs.b_up:
            found.b_up = sums(dup_SH, tiles)
        dx_SD = linear(dgate_SH, w.gate_EHD, tiles, second=(dup_SH, w.up_EPD)) if needs.x else None
    if dx_SD is not None:
        found.x = combine(dx_SD, tiles, None)
    return found


def linear_forward(rows: Tensor, w_EPD: Tensor, plan: RoutingPlan, by_token: bool) -> Tensor:
    """`[S, P]` at copies, from the row of each copy or of its token; 0 for nobody."""
    rows_by = BY_TOKEN if by_token else BY_COPY
    return linear(_rows(rows), w_EPD.transpose(1, 2), tiled(plan, rows), rows_by=rows_by, clear=True)


def linear_backward(
    grad_SP: Tensor, rows: Tensor, w_EPD: Tensor, plan: RoutingPlan, by_token: bool, needs_rows: bool, needs_w: bool
) -> tuple[Tensor | None, Tensor | None]:
    tiles, grad_SP = tiled(plan, rows), _rows(grad_SP)
    drows = dw_EPD = None
    if needs_rows:
        drows = linear(grad_SP, w_EPD, tiles, rows_by=BY_COPY, clear=not by_token)
        if by_token:
            drows = combine(drows, tiles, None)
    if needs_w:
        rows_by = BY_TOKEN if by_token else BY_COPY
        dw_EPD = outer(grad_SP, _rows(rows), torch.empty_like(w_EPD), tiles, a_by=BY_COPY, b_by=rows_by)
    return drows, dw_EPD


def _packed(b_EP: Tensor | None) -> Tensor | None:
    """As the kernels read biases: rows one after the other."""
    return None if b_EP is None else b_EP.contiguous()


def _rows(x: Tensor) -> Tensor:
    """With the elements of a row side by side, as every kernel reads them."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _hidden(
    x_ND: Tensor, w: ExpertWeights, activation: str | Activation, tiles: Tiled, keep: bool
) -> tuple[Tensor | None, Tensor]:
    if isinstance(activation, str):
        gate_EHD, up_EHD, b_gate_EH, b_up_EH = w.gate_EHD, w.up_EPD, w.b_gate_EH, w.b_up_EP
        if gate_EHD is None and activation in GATED:
            gate_EHD, up_EHD = up_EHD.chunk(2, dim=1)
            if b_up_EH is not None:
                b_gate_EH, b_up_EH = b_up_EH.chunk(2, dim=1)
        return first_layer(x_ND, gate_EHD, up_EHD, _packed(b_gate_EH), _packed(b_up_EH), activation, tiles, keep)
    # A function of the caller's own: its rows come and go through memory.
    pre_SP = linear(x_ND, w.up_EPD.transpose(1, 2), tiles, rows_by=BY_TOKEN, to=BY_PLACE, b_EP=_packed(w.b_up_EP))
    return pre_SP if keep else None, _rows(activation(pre_SP))


def _unfused_hidden_grad(
    grad_NO: Tensor, w: ExpertWeights, pre_SP: Tensor, weights_NK: Tensor, activation: Activation, tiles: Tiled
) -> tuple[Tensor, Tensor, Tensor]:
    plan = tiles.plan
    dh_SH = linear(grad_NO, w.down_EOH, tiles, rows_by=BY_TOKEN, to=BY_PLACE)
    weights_S1 = weights_NK.flatten()[plan.order_S].unsqueeze(1)
    dpre_SP = torch.empty_like(pre_SP)
    h_SH = activate_backward(activation, pre_SP, (dh_SH * weights_S1).to(dh_SH.dtype), dpre_SP)
    here_S = torch.arange(len(pre_SP), device=pre_SP.device) < plan.offsets[-1]
    at_places_S = torch.where(here_S, (h_SH * dh_SH).sum(1, dtype=torch.float32), 0)
    dweights_S = torch.empty_like(at_places_S)
    dweights_S[plan.order_S] = at_places_S
    return _rows(dpre_SP), _rows((h_SH * weights_S1).to(dh_SH.dtype)), dweights_S
