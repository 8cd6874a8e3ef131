"""Rank experts: a low-rank adapter whose ranks are gated or chosen token by token, added to the base layer's output.

    y_n = base_n + s B (g_n * u_n),   u_n = M_t A x_n,   t = task_n

The gain is bytes. Tokens are read once, the base's output is read and the sum written once; scale, gate and choice
happen on the small side, at width `P`. Choosing `K` of `P` ranks saves no time: a matrix unit multiplies whole tiles.

Shapes: `N` tokens, `M` of them whose choice is counted, `D` width, `R` ranks of the down-projection, `P` ranks that
reach gate and up-projection (`R`, or what the mix makes of them), `K` of them chosen per token, `T` tasks, `G` runs of
tokens of one task each, `O` output width.
"""

import contextlib
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .experts import why_not_triton

RankBackend = Literal["torch", "triton"]

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF, torch.float32, torch.float64)
_MAX_RANKS = 128  # of the kernels: all ranks of a token stand in one tile


def rank_experts(
    x_ND: Tensor,
    a_RD: Tensor,
    b_OP: Tensor,
    base_NO: Tensor | None = None,
    *,
    scale: float = 1.0,
    gate_NP: Tensor | None = None,
    num_selected: int | None = None,
    bias_P: Tensor | None = None,
    renormalise: bool = False,
    mix_TPR: Tensor | None = None,
    tasks_G: Tensor | None = None,
    counts_P: Tensor | None = None,
    counted_M: Tensor | None = None,
    chosen: list[Tensor] | None = None,
    backend: RankBackend | None = None,
) -> Tensor:
    """Adds a gated low-rank adapter to the output of its base layer.

    With nothing but `x`, `a` and `b` this is LoRA (Hu et al., ICLR 2022, equation 3). Beyond it:

    - A dense gate: `gate`, the weight of each rank. Experts of several ranks repeat theirs; experts of HydraLoRA share
      `a`, which a mix of stacked identities copies.
    - SMoRA (Zhao et al., KDD 2026, arXiv 2501.15103): `gate` holds the router's scores (softmax or sigmoid of its
      logits), `num_selected` of them are kept, chosen with `bias` added. The chosen keep their score; `renormalise`
      divides it by their sum, which makes a softmax one over the chosen.
    - FlyLoRA (Zou et al., NeurIPS 2025): `num_selected` without a gate. The ranks of largest `|u|` plus `bias` are
      chosen, each with weight 1. Differs from the official code in: its full version takes the largest signed `u` and
      sends no gradient to `x`; its minimal one adds the bias inside the absolute value.
    - MTL-LoRA (Yang et al., AAAI 2025): `mix` holds a task's `R x R` matrix. Its several up-projections, weighed by
      task, go into the same call: stack the weighed matrices along `P`, and the up-projections along the columns of
      `b`.

    The choice itself has no gradient: of the gate only the chosen weights get one. Backward keeps `x` only if `a` needs
    a gradient, and nothing else of width `D` or `O`.

    Args:
        x_ND: tokens; float16, bfloat16, float32, or float64 in the torch backend.
        a_RD: down-projection, in the dtype of `x` or float32, in which case it is cast: it is the small side.
        b_OP: up-projection, likewise.
        base_NO: output of the base layer, in the dtype of `x`; not written to. Nothing is added where None.
        scale: `s`.
        gate_NP: weight of each rank, in the dtype of `x` or float32; differentiable.
        num_selected: `K`; all ranks where None. The lower rank first among equals.
        bias_P: added for the choice alone.
        renormalise: divide the chosen weights by their sum.
        mix_TPR: a matrix per task, in the dtype of `x` or float32; differentiable.
        tasks_G: int64, each in `[0, T)`: the task of each token, or of each run of `N / G` tokens, as the tokens of one
            sample are. Of runs the time does not grow with `T`.
        counts_P: int64; to it is added how many tokens chose each rank.
        counted_M: int64; the tokens that are counted, without those of padding. All of them where None.
        chosen: to it is appended which ranks each token chose, bool `[N, P]`.
        backend: `torch` or `triton`; by default `triton` on CUDA where it is installed and takes the case.

    Returns:
        `[N, O]` in the dtype of `x`, or that of autocast. Products accumulate in float32 at least, and what stands
        between the projections is float32 at least.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot take them; raised before
            anything is computed.
        RuntimeError, IndexError: a task out of range, found when the tasks are read.
    """
    _check(x_ND, a_RD, b_OP, base_NO, gate_NP, num_selected, bias_P, renormalise, mix_TPR, tasks_G, counts_P)
    if counted_M is not None and (counted_M.dim() != 1 or counted_M.dtype != torch.int64):
        raise ValueError(f"counted: expected int64 of shape [M], found {counted_M.dtype} of {list(counted_M.shape)}")
    if chosen is not None and num_selected is None:
        raise ValueError("chosen: expected num_selected beside it, found None")
    device = x_ND.device.type
    dtype = x_ND.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    backend = _backend(backend, x_ND, max(len(a_RD), b_OP.shape[1]))
    with no_autocast(device):
        out_NO, chosen_NP = _RankExperts.apply(
            x_ND.to(dtype),
            a_RD.to(dtype),
            b_OP.to(dtype),
            None if base_NO is None else base_NO.to(dtype),
            gate_NP,
            mix_TPR,
            bias_P,
            tasks_G,
            float(scale),
            num_selected or 0,
            renormalise,
            backend,
        )
    if counts_P is not None:
        counts_P += (chosen_NP if counted_M is None else chosen_NP.index_select(0, counted_M)).sum(0)
    if chosen is not None:
        chosen.append(chosen_NP)
    return out_NO


def _check(
    x_ND: Tensor,
    a_RD: Tensor,
    b_OP: Tensor,
    base_NO: Tensor | None,
    gate_NP: Tensor | None,
    num_selected: int | None,
    bias_P: Tensor | None,
    renormalise: bool,
    mix_TPR: Tensor | None,
    tasks_G: Tensor | None,
    counts_P: Tensor | None,
) -> None:
    if x_ND.dim() != 2 or x_ND.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(f"x: expected [N, D] of {names}, found {list(x_ND.shape)} of {x_ND.dtype}")
    rows, width = x_ND.shape
    if a_RD.dim() != 2 or a_RD.shape[1] != width or not len(a_RD):
        raise ValueError(f"a: expected shape [R, {width}], R of 1 at least, found {list(a_RD.shape)}")
    ranks = len(a_RD)
    if (mix_TPR is None) != (tasks_G is None):
        given = "mix" if tasks_G is None else "tasks"
        raise ValueError(f"mix, tasks: expected both or neither, found {given} alone")
    if mix_TPR is not None:
        if mix_TPR.dim() != 3 or mix_TPR.shape[2] != ranks or not mix_TPR.shape[0] * mix_TPR.shape[1]:
            raise ValueError(f"mix: expected shape [T, P, {ranks}], found {list(mix_TPR.shape)}")
        ranks = mix_TPR.shape[1]
    if b_OP.dim() != 2 or b_OP.shape[1] != ranks:
        raise ValueError(f"b: expected shape [O, {ranks}], found {list(b_OP.shape)}")
    for name, tensor, shape in (
        ("base", base_NO, (rows, len(b_OP))),
        ("gate", gate_NP, (rows, ranks)),
        ("bias", bias_P, (ranks,)),
        ("counts", counts_P, (ranks,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
    if tasks_G is not None and (tasks_G.dim() != 1 or rows % max(1, len(tasks_G)) or (rows and not len(tasks_G))):
        raise ValueError(f"tasks: expected shape [{rows}], or of an equal share of it, found {list(tasks_G.shape)}")
    if num_selected is not None and not 1 <= num_selected <= ranks:
        raise ValueError(f"num_selected: expected 1 to {ranks}, found {num_selected}")
    for name, tensor in (("bias", bias_P), ("counts", counts_P)):
        if tensor is not None and num_selected is None:
            raise ValueError(f"{name}: expected num_selected beside it, as it is of the choice alone, found None")
    if renormalise and (num_selected is None or gate_NP is None):
        raise ValueError("renormalise: expected a gate and num_selected beside it, found one of them None")

    either = {x_ND.dtype, torch.float32}
    base_dtypes = {x_ND.dtype}
    if torch.is_autocast_enabled(x_ND.device.type):
        base_dtypes |= {torch.float32, torch.get_autocast_dtype(x_ND.device.type)}
        either |= base_dtypes
    for name, tensor, dtypes in (
        ("a", a_RD, either),
        ("b", b_OP, either),
        ("base", base_NO, base_dtypes),
        ("gate", gate_NP, either),
        ("bias", bias_P, either),
        ("mix", mix_TPR, either),
        ("tasks", tasks_G, {torch.int64}),
        ("counts", counts_P, {torch.int64}),
    ):
        if tensor is not None and tensor.dtype not in dtypes:
            names = " or ".join(sorted(map(str, dtypes)))
            raise ValueError(f"{name}: expected {names}, found {tensor.dtype}")
        if tensor is not None and tensor.device != x_ND.device:
            raise ValueError(f"{name}: expected a tensor on {x_ND.device}, found one on {tensor.device}")


def _backend(asked: RankBackend | None, x_ND: Tensor, ranks: int) -> RankBackend:
    if asked not in (None, "torch", "triton"):
        raise ValueError(f"backend: expected torch or triton, found {asked!r}")
    if asked == "torch" or (asked is None and not x_ND.is_cuda):
        return "torch"
    reason = _why_not_triton(x_ND, ranks)
    if reason is None:
        return "triton"
    if asked is None:
        return "torch"
    raise ValueError(f"backend triton: {reason}; backend='torch' computes the same")


def _why_not_triton(x_ND: Tensor, ranks: int) -> str | None:
    if ranks > _MAX_RANKS:
        return f"the kernels take at most {_MAX_RANKS} ranks, found {ranks}"
    return why_not_triton(x_ND)


def no_autocast(device: str) -> contextlib.AbstractContextManager:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


class _RankExperts(torch.autograd.Function):
    """Keeps the down-projection in float32 and the choice, both of the small width; `x` where `a` needs a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        a_RD: Tensor,
        b_OP: Tensor,
        base_NO: Tensor | None,
        gate_NP: Tensor | None,
        mix_TPR: Tensor | None,
        bias_P: Tensor | None,
        tasks_G: Tensor | None,
        scale: float,
        num_selected: int,
        renormalise: bool,
        backend: RankBackend,
    ) -> tuple[Tensor, Tensor]:
        down, up = (_down_triton, _up_triton) if backend == "triton" else (_down_torch, _up_torch)
        h_NR, z_NP, chosen_NP = down(x_ND, a_RD, gate_NP, mix_TPR, bias_P, tasks_G, scale, num_selected, renormalise)
        kept_x = x_ND if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(kept_x, a_RD, b_OP, gate_NP, mix_TPR, tasks_G, h_NR, chosen_NP)
        ctx.scale, ctx.num_selected, ctx.renormalise, ctx.backend = scale, num_selected, renormalise, backend
        ctx.mark_non_differentiable(chosen_NP)
        return up(z_NP, b_OP, base_NO), chosen_NP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_NO, _ = grads
        with no_autocast(grad_NO.device.type):
            return _gradients(ctx, grad_NO)


def _gradients(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, a_RD, b_OP, gate_NP, mix_TPR, tasks_G, h_NR, chosen_NP = ctx.saved_tensors
    needs_x, needs_a, needs_b, needs_base, needs_gate, needs_mix = ctx.needs_input_grad[:6]
    u_NP = h_NR if mix_TPR is None else _mixed(h_NR, mix_TPR, tasks_G)
    back = _back_triton if ctx.backend == "triton" else _back_torch
    du_NP, z_NP, dgate_NP = back(
        grad_NO, b_OP, u_NP, gate_NP, chosen_NP, ctx.scale, ctx.num_selected > 0, ctx.renormalise
    )
    dx_ND = da_RD = db_OP = dgate = dmix_TPR = None
    if needs_b:
        db_OP = grad_NO.t() @ z_NP
    if needs_gate:
        dgate = dgate_NP.to(gate_NP.dtype)
    if needs_mix:
        dmix_TPR = _mix_gradient(du_NP, h_NR, mix_TPR, tasks_G)
    if needs_x or needs_a:
        dh_NR = du_NP
        if mix_TPR is not None:
            dh_NR = _mixed(du_NP, mix_TPR.transpose(1, 2), tasks_G)
        dh_NR = dh_NR.to(grad_NO.dtype)
        if needs_a:
            da_RD = dh_NR.t() @ x_ND
        if needs_x:
            dx_ND = dh_NR @ a_RD
    dbase_NO = grad_NO if needs_base else None
    return dx_ND, da_RD, db_OP, dbase_NO, dgate, dmix_TPR, *[None] * 6


def _down_torch(
    x_ND: Tensor,
    a_RD: Tensor,
    gate_NP: Tensor | None,
    mix_TPR: Tensor | None,
    bias_P: Tensor | None,
    tasks_G: Tensor | None,
    scale: float,
    num_selected: int,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the down-projection gives, what enters the up-projection, and the choice (empty where there is none)."""
    if x_ND.dtype not in _HALF:
        h_NR = x_ND @ a_RD.t()
    elif x_ND.is_cuda:
        h_NR = torch.mm(x_ND, a_RD.t(), out_dtype=torch.float32)
    else:  # rounding here could change the choice, and the mix
        h_NR = x_ND.float() @ a_RD.t().float()
    u_NP = h_NR if mix_TPR is None or tasks_G is None else _mixed(h_NR, mix_TPR, tasks_G)
    gate = None if gate_NP is None else gate_NP.to(u_NP.dtype)
    chosen_NP = torch.empty(0, dtype=torch.bool, device=x_ND.device)
    if num_selected:
        key_NP = u_NP.abs() if gate is None else gate
        chosen_NP = _largest(key_NP if bias_P is None else key_NP + bias_P, num_selected)
    weights_NP, _ = _weights(gate, chosen_NP if num_selected else None, renormalise)
    z_NP = u_NP * scale if weights_NP is None else u_NP * weights_NP * scale
    return h_NR, z_NP.to(x_ND.dtype), chosen_NP


def _up_torch(z_NP: Tensor, b_OP: Tensor, base_NO: Tensor | None) -> Tensor:
    return z_NP @ b_OP.t() if base_NO is None else torch.addmm(base_NO, z_NP, b_OP.t())


def _back_torch(
    grad_NO: Tensor,
    b_OP: Tensor,
    u_NP: Tensor,
    gate_NP: Tensor | None,
    chosen_NP: Tensor,
    scale: float,
    selects: bool,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of what enters the gate, what enters the up-projection, and the gate's gradient (empty without one)."""
    dz_NP = (grad_NO @ b_OP).to(u_NP.dtype) * scale
    gate, chosen = None if gate_NP is None else gate_NP.to(u_NP.dtype), chosen_NP if selects else None
    weights_NP, sums_N1 = _weights(gate, chosen, renormalise)
    if weights_NP is None:
        return dz_NP, (u_NP * scale).to(grad_NO.dtype), u_NP.new_empty(0)
    dgate_NP = u_NP.new_empty(0)
    if gate is not None:
        dgate_NP = dz_NP * u_NP
        if sums_N1 is not None:
            dgate_NP = (dgate_NP - (dgate_NP * weights_NP).sum(-1, keepdim=True)) / sums_N1
        if chosen is not None:
            dgate_NP = dgate_NP * chosen
    return dz_NP * weights_NP, (u_NP * weights_NP * scale).to(grad_NO.dtype), dgate_NP


def _weights(
    gate_NP: Tensor | None, chosen_NP: Tensor | None, renormalise: bool
) -> tuple[Tensor | None, Tensor | None]:
    """`g`, None for 1 everywhere; and the sum that it was divided by."""
    if chosen_NP is None:
        return gate_NP, None
    if gate_NP is None:
        return chosen_NP, None
    kept_NP = gate_NP * chosen_NP
    if not renormalise:
        return kept_NP, None
    sums_N1 = kept_NP.sum(-1, keepdim=True)
    return kept_NP / sums_N1, sums_N1


def _largest(key_NP: Tensor, number: int) -> Tensor:
    """Marks each row's largest, the lower rank first among equals; which of equals `topk` takes differs by device."""
    last_N1 = key_NP.topk(number, sorted=False).values.amin(-1, keepdim=True)
    above_NP, equal_NP = key_NP > last_N1, key_NP == last_N1
    return above_NP | (equal_NP & (equal_NP.cumsum(-1) <= number - above_NP.sum(-1, keepdim=True)))


# So many tasks at most have a column each, where every token has a task of its own: a product with the columns needs no
# matrix per token, but takes as long as there are tasks.
FEW_TASKS = 16


def _mixed(h_NR: Tensor, mix_TPR: Tensor, tasks_G: Tensor) -> Tensor:
    """Each row times its task's matrix: `[N, P]`."""
    mix_TPR = mix_TPR.to(h_NR.dtype)
    if _in_columns(h_NR, mix_TPR, tasks_G):
        return _at_tasks(h_NR, tasks_G, len(mix_TPR)) @ mix_TPR.transpose(1, 2).flatten(0, 1)
    mix_GPR = mix_TPR.index_select(0, tasks_G)
    return torch.bmm(_in_runs(h_NR, tasks_G), mix_GPR.transpose(1, 2)).flatten(0, 1)


def _mix_gradient(du_NP: Tensor, h_NR: Tensor, mix_TPR: Tensor, tasks_G: Tensor) -> Tensor:
    if _in_columns(h_NR, mix_TPR, tasks_G):
        sums = du_NP.t() @ _at_tasks(h_NR, tasks_G, len(mix_TPR))
        return sums.unflatten(1, (len(mix_TPR), -1)).transpose(0, 1).to(mix_TPR.dtype)
    sums_GPR = torch.bmm(_in_runs(du_NP, tasks_G).transpose(1, 2), _in_runs(h_NR, tasks_G))
    return sums_GPR.new_zeros(mix_TPR.shape).index_add_(0, tasks_G, sums_GPR).to(mix_TPR.dtype)


def _in_columns(h_NR: Tensor, mix_TPR: Tensor, tasks_G: Tensor) -> bool:
    return len(tasks_G) == len(h_NR) and len(mix_TPR) <= FEW_TASKS


def _in_runs(rows_NR: Tensor, tasks_G: Tensor) -> Tensor:
    return rows_NR.unflatten(0, (len(tasks_G), -1)) if len(tasks_G) else rows_NR.unsqueeze(1)


def _at_tasks(rows_NR: Tensor, tasks_N: Tensor, num_tasks: int) -> Tensor:
    """Each row in its task's columns, zeros elsewhere, `[N, T R]`."""
    wide_NTR = rows_NR.new_zeros(len(rows_NR), num_tasks, rows_NR.shape[1])
    index = tasks_N.view(-1, 1, 1).expand(-1, 1, rows_NR.shape[1])
    return wide_NTR.scatter(1, index, rows_NR.unsqueeze(1)).flatten(1)


# The kernels, each opaque to tracing, so that a compiled or exported graph stays whole. `_RankExperts` differentiates.


@torch.library.custom_op("moe_mtl::rank_down", mutates_args=())
def _down_triton(
    x_ND: Tensor,
    a_RD: Tensor,
    gate_NP: Tensor | None,
    mix_TPR: Tensor | None,
    bias_P: Tensor | None,
    tasks_G: Tensor | None,
    scale: float,
    num_selected: int,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_ranks

    if tasks_G is not None and len(tasks_G) < len(x_ND):
        tasks_G = tasks_G.repeat_interleave(len(x_ND) // len(tasks_G))
    return triton_ranks.down(x_ND, a_RD, gate_NP, mix_TPR, bias_P, tasks_G, scale, num_selected, renormalise)


@_down_triton.register_fake
def _(x_ND, a_RD, gate_NP, mix_TPR, bias_P, tasks_G, scale, num_selected, renormalise):  # type: ignore[no-untyped-def]
    rows, ranks = len(x_ND), len(a_RD) if mix_TPR is None else mix_TPR.shape[1]
    chosen = x_ND.new_empty((rows, ranks) if num_selected else (0,), dtype=torch.bool)
    return x_ND.new_empty(rows, len(a_RD), dtype=torch.float32), x_ND.new_empty(rows, ranks), chosen


@torch.library.custom_op("moe_mtl::rank_up", mutates_args=())
def _up_triton(z_NP: Tensor, b_OP: Tensor, base_NO: Tensor | None) -> Tensor:
    from . import triton_ranks

    return triton_ranks.up(z_NP, b_OP, base_NO)


@_up_triton.register_fake
def _(z_NP, b_OP, base_NO):  # type: ignore[no-untyped-def]
    return z_NP.new_empty(len(z_NP), len(b_OP))


@torch.library.custom_op("moe_mtl::rank_back", mutates_args=())
def _back_triton(
    grad_NO: Tensor,
    b_OP: Tensor,
    u_NP: Tensor,
    gate_NP: Tensor | None,
    chosen_NP: Tensor,
    scale: float,
    selects: bool,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_ranks

    return triton_ranks.back(grad_NO, b_OP, u_NP, gate_NP, chosen_NP if selects else None, scale, renormalise)


@_back_triton.register_fake
def _(grad_NO, b_OP, u_NP, gate_NP, chosen_NP, scale, selects, renormalise):  # type: ignore[no-untyped-def]
    dgate = u_NP.new_empty(u_NP.shape if gate_NP is not None else (0,))
    return u_NP.new_empty(u_NP.shape), u_NP.new_empty(u_NP.shape, dtype=grad_NO.dtype), dgate
