"""The inside of feed-forward experts that share a frozen block and have low-rank pairs of their own, on a CPU.

    g_nk = g_n + B_g[e] z_nk,   u_nk = u_n + B_u[e] z'_nk,   h_nk = act(g_nk) * u_nk,      e = index_nk
    shared_n = sum_k weight_nk h_nk,      down_nk = A[e] h_nk

What is as wide as the block exists once per token outside of here, as it does without experts. Of the routed copies it
exists for a *tile* at a time, copies of one expert, few enough to stay in the caches; the backward computes it again.

Shapes: `N` tokens, `H` hidden width, `R` ranks, `E` experts, `K` experts chosen per token, `S = N K` routed copies, `M`
copies of a tile.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .ranks import no_autocast
from .routing import RoutingPlan

Hidden = Callable[[list[Tensor]], Tensor]
BYTES = 2**20  # of one tensor of a tile, at most


def expert_hidden(
    first: list[Tensor],
    z: list[Tensor],
    b: list[Tensor],
    a_ERH: Tensor,
    hidden: Hidden,
    plan: RoutingPlan,
    weights_NK: Tensor,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """From what the block's first layers give to what its last one takes, and to what the experts take it down to.

    Args:
        first: `[N, H]` of each first layer, of one dtype; not written to.
        z: `[N, K, R]`, what goes up again to be added to each.
        b: `[E, H, R]`, what takes it up.
        a_ERH: what takes the hidden units down.
        hidden: what is between the layers; row by row, and without parameters.
        plan: of the chosen experts.
        weights_NK: differentiable.
        dropout: of what `a` takes down.

    Returns:
        `[N, H]`, the weighted sum over a token's copies; and `[N, K, R]`.
    """
    like, layers = first[0], len(first)
    order_S, sizes = plan.order_S, plan.indices_NK.shape
    z = [t.to(like.dtype).flatten(0, 1).index_select(0, order_S) for t in z]
    weights_S1 = weights_NK.reshape(-1, 1).index_select(0, order_S)
    b, a_ERH = [t.to(like.dtype) for t in b], a_ERH.to(like.dtype)
    with no_autocast(like.device.type):
        shared_NH, down_SR = _Hidden.apply(hidden, plan, dropout, layers, weights_S1, a_ERH, *first, *z, *b)
    return shared_NH, down_SR.index_select(0, plan.position_S).unflatten(0, sizes)


class _Hidden(torch.autograd.Function):
    """Keeps what enters, all copies in the plan's order; and where dropout strikes."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Hidden,
        plan: RoutingPlan,
        dropout: float,
        layers: int,
        weights_S1: Tensor,
        a_ERH: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        first, z, b = (tensors[i * layers : (i + 1) * layers] for i in range(3))
        sums_NH = _zeros(first[0])
        down_SR = first[0].new_empty(len(weights_S1), a_ERH.shape[1])
        masks = []
        for e, rows, tokens_M in _tiles(plan, first[0]):
            h_MH = hidden(_entering(first, z, b, e, rows, tokens_M))
            dropped_MH = h_MH
            if dropout:
                dropped_MH, mask_MH = torch.native_dropout(h_MH, dropout, True)
                masks.append(mask_MH)
            torch.mm(dropped_MH, a_ERH[e].t(), out=down_SR[rows])
            sums_NH.index_add_(0, tokens_M, (h_MH * weights_S1[rows]).to(sums_NH.dtype))
        ctx.save_for_backward(weights_S1, a_ERH, *tensors, *masks)
        ctx.hidden, ctx.plan, ctx.dropout, ctx.layers = hidden, plan, dropout, layers
        return sums_NH.to(first[0].dtype), down_SR

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(grads[0].device.type):
            return None, None, None, None, *_gradients(ctx, *grads)


def _gradients(ctx: Any, dshared_NH: Tensor, ddown_SR: Tensor) -> tuple[Tensor | None, ...]:
    weights_S1, a_ERH, *tensors = ctx.saved_tensors
    first, z, b, masks = (tensors[i * ctx.layers : (i + 1) * ctx.layers if i < 3 else None] for i in range(4))
    needs_first = ctx.needs_input_grad[6 : 6 + ctx.layers]
    dfirst = [_zeros(t) if needed else None for t, needed in zip(first, needs_first, strict=True)]
    dz, dweights_S1 = [torch.empty_like(t) for t in z], torch.empty_like(weights_S1)
    da_ERH, db_turned = torch.zeros_like(a_ERH), [t.new_zeros(len(t), t.shape[2], t.shape[1]) for t in b]
    wide = dweights_S1.dtype
    for nth, (e, rows, tokens_M) in enumerate(_tiles(ctx.plan, first[0])):
        entering = [t.requires_grad_() for t in _entering(first, z, b, e, rows, tokens_M)]
        with torch.enable_grad():
            entered_MH = ctx.hidden(entering)
        h_MH = entered_MH.detach()
        dshared_MH = dshared_NH.index_select(0, tokens_M)
        torch.sum(h_MH * dshared_MH, 1, keepdim=True, dtype=wide, out=dweights_S1[rows])
        dh_MH = (dshared_MH * weights_S1[rows]).to(dshared_MH.dtype)
        if masks:
            h_MH = torch.ops.aten.native_dropout_backward(h_MH, masks[nth], 1 / (1 - ctx.dropout))
            ddropped_MH = ddown_SR[rows] @ a_ERH[e]
            dh_MH += torch.ops.aten.native_dropout_backward(ddropped_MH, masks[nth], 1 / (1 - ctx.dropout))
        else:
            dh_MH.addmm_(ddown_SR[rows], a_ERH[e])
        da_ERH[e].addmm_(ddown_SR[rows].t(), h_MH)
        for i, dentering_MH in enumerate(torch.autograd.grad(entered_MH, entering, dh_MH)):
            torch.mm(dentering_MH, b[i][e], out=dz[i][rows])
            db_turned[i][e].addmm_(z[i][rows].t(), dentering_MH)  # the other way round it would take twice as long
            into_NH = dfirst[i]
            if into_NH is not None:
                into_NH.index_add_(0, tokens_M, dentering_MH.to(into_NH.dtype))
    given = [None if t is None else t.to(first[0].dtype) for t in dfirst]
    return dweights_S1, da_ERH, *given, *dz, *(t.transpose(1, 2) for t in db_turned)


def _tiles(plan: RoutingPlan, like_NH: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Of each tile its expert, its places in the plan's order, and their tokens."""
    most = max(1, BYTES // max(1, like_NH.shape[1] * like_NH.itemsize))
    bounds = accumulate(plan.counts_E.tolist(), initial=0)
    for e, (start, stop) in enumerate(pairwise(bounds)):
        for first in range(start, stop, most):
            rows = slice(first, min(first + most, stop))
            yield e, rows, plan.tokens_S[rows]


def _entering(first: Any, z: Any, b: Any, e: int, rows: slice, tokens_M: Tensor) -> list[Tensor]:
    """What enters the activation: of each copy what its token has in common, and what its expert adds."""
    return [
        t_NH.index_select(0, tokens_M).addmm_(z_SR[rows], b_EHR[e].t())
        for t_NH, z_SR, b_EHR in zip(first, z, b, strict=True)
    ]


def _zeros(like: Tensor) -> Tensor:
    """To sum up in, rounded once."""
    return like.new_zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))
