"""The inside of feed-forward experts that share a frozen block and have low-rank pairs of their own, on a CPU.

    g_nk = g_n + B_g[e] z_nk,   u_nk = u_n + B_u[e] z'_nk,   h_nk = act(g_nk) * u_nk,      e = index_nk
    shared_n = sum_k weight_nk h_nk,      down_nk = A[e] h_nk

What is as wide as the block exists once per token outside of here, as it does without experts. Of the routed copies it
exists for a *tile* at a time, copies of one expert, few enough to stay in the caches; the backward computes it again.

Shapes: `N` tokens, `H` hidden width, `R` ranks, `E` experts, `K` experts chosen per token, `S = N K` routed copies, `M`
copies of a tile.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import Activation
from .ranks import no_autocast
from .routing import RoutingPlan

BYTES = 2**19  # of one tensor of a tile, at most


def expert_hidden(
    first: list[Tensor],
    z: list[Tensor],
    b: list[Tensor],
    a_ERH: Tensor,
    activation: Activation,
    plan: RoutingPlan,
    weights_NK: Tensor,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """From what the block's first layers give to what its last one takes, and to what the experts take it down to.

    Args:
        first: `[N, H]` of each first layer, the gate before `up`, or of that alone; of one dtype, not written to.
        z: `[N, K, R]`, what goes up again to be added to each.
        b: `[E, H, R]`, what takes it up.
        a_ERH: what takes the hidden units down.
        activation: any function of the elements that trains nothing.
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
        shared_NH, down_SR = _Hidden.apply(activation, plan, dropout, layers, weights_S1, a_ERH, *first, *z, *b)
    return shared_NH, down_SR.index_select(0, plan.position_S).unflatten(0, sizes)


class _Hidden(torch.autograd.Function):
    """Keeps what enters, all copies in the plan's order; and where dropout strikes."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        plan: RoutingPlan,
        dropout: float,
        layers: int,
        weights_S1: Tensor,
        a_ERH: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        first, z, b = (tensors[i * layers : (i + 1) * layers] for i in range(3))
        tiles = _Tiles(plan, first[0])
        sums_NH, down_SR = _zeros(first[0]), first[0].new_empty(len(weights_S1), a_ERH.shape[1])
        masks = []
        for e, rows, tokens_M in tiles:
            *gates, last_MH = _entering(tiles, first, z, b, e, rows, tokens_M)
            h_MH = torch.mul(activation(gates[0]), last_MH, out=last_MH) if gates else activation(last_MH)
            if dropout:
                dropped_MH, mask_MH = torch.native_dropout(h_MH, dropout, True)
                masks.append(mask_MH)
                torch.mm(dropped_MH, a_ERH[e].t(), out=down_SR[rows])
            else:
                torch.mm(h_MH, a_ERH[e].t(), out=down_SR[rows])
            sums_NH.index_add_(0, tokens_M, h_MH.mul_(weights_S1[rows]).to(sums_NH.dtype))
        ctx.save_for_backward(weights_S1, a_ERH, *tensors, *masks)
        ctx.activation, ctx.plan, ctx.dropout, ctx.layers = activation, plan, dropout, layers
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
    kept = 1 / (1 - ctx.dropout)
    tiles = _Tiles(ctx.plan, first[0])
    for nth, (e, rows, tokens_M) in enumerate(tiles):
        entering = _entering(tiles, first, z, b, e, rows, tokens_M)
        with torch.enable_grad():
            leaf_MH = entering[0].detach().requires_grad_()
            entered_MH = leaf_MH.view_as(leaf_MH)  # what watches modules takes no leaf in a backward within a backward
            activated_MH = ctx.activation(entered_MH)
        h_MH = act_MH = activated_MH.detach()
        if ctx.layers > 1:
            h_MH = torch.mul(act_MH, entering[1], out=tiles.buffer("h", len(tokens_M)))
        dh_MH = torch.index_select(dshared_NH, 0, tokens_M, out=tiles.buffer("dh", len(tokens_M)))
        product_MH = torch.mul(h_MH, dh_MH, out=tiles.buffer("product", len(tokens_M)))
        torch.sum(product_MH, 1, keepdim=True, dtype=dweights_S1.dtype, out=dweights_S1[rows])
        dh_MH.mul_(weights_S1[rows])
        if masks:
            h_MH = torch.ops.aten.native_dropout_backward(h_MH, masks[nth], kept)
            dh_MH += torch.ops.aten.native_dropout_backward(ddown_SR[rows] @ a_ERH[e], masks[nth], kept)
        else:
            dh_MH.addmm_(ddown_SR[rows], a_ERH[e])
        da_ERH[e].addmm_(ddown_SR[rows].t(), h_MH)
        left = []
        if ctx.layers > 1:
            left.append(torch.mul(dh_MH, act_MH, out=product_MH))
            dh_MH.mul_(entering[1])
        left.insert(0, torch.autograd.grad(activated_MH, entered_MH, dh_MH)[0])
        for t_MH, z_SR, dz_SR, b_EHR, db_ERH, into_NH in zip(left, z, dz, b, db_turned, dfirst, strict=True):
            torch.mm(t_MH, b_EHR[e], out=dz_SR[rows])
            db_ERH[e].addmm_(z_SR[rows].t(), t_MH)  # the other way round it would take twice as long
            if into_NH is not None:
                into_NH.index_add_(0, tokens_M, t_MH.to(into_NH.dtype))
    given = [None if t is None else t.to(first[0].dtype) for t in dfirst]
    return dweights_S1, da_ERH, *given, *dz, *(t.transpose(1, 2) for t in db_turned)


class _Tiles:
    """Of each tile its expert, its places in the plan's order, and their tokens; and memory that all tiles share."""

    def __init__(self, plan: RoutingPlan, like_NH: Tensor):
        self.plan, self.like = plan, like_NH
        self.most = max(1, BYTES // max(1, like_NH.shape[1] * like_NH.itemsize))
        self.buffers: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[int, slice, Tensor]]:
        counts = self.plan.counts_E.tolist()
        self.most = max(1, min(self.most, max(counts)))
        for e, (start, count) in enumerate(zip(accumulate(counts, initial=0), counts, strict=False)):
            number = -(-count // self.most)
            for nth in range(number):  # of about one size
                rows = slice(start + nth * count // number, start + (nth + 1) * count // number)
                yield e, rows, self.plan.tokens_S[rows]

    def buffer(self, name: str, rows: int) -> Tensor:
        """`[M, H]`."""
        if name not in self.buffers:
            self.buffers[name] = self.like.new_empty(self.most, self.like.shape[1])
        return self.buffers[name][:rows]


def _entering(
    tiles: _Tiles,
    first: Sequence[Tensor],
    z: Sequence[Tensor],
    b: Sequence[Tensor],
    e: int,
    rows: slice,
    tokens_M: Tensor,
) -> list[Tensor]:
    """What enters the activation: of each copy what its token has in common, and what its expert adds."""
    found = []
    for nth, (t_NH, z_SR, b_EHR) in enumerate(zip(first, z, b, strict=True)):
        into_MH = tiles.buffer(f"first {nth}", len(tokens_M))
        found.append(torch.index_select(t_NH, 0, tokens_M, out=into_MH).addmm_(z_SR[rows], b_EHR[e].t()))
    return found


def _zeros(like: Tensor) -> Tensor:
    """To sum up in, rounded once."""
    return like.new_zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float32))
