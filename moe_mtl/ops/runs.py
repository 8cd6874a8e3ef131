"""A low-rank pair per task, and one that tasks may share, over runs of tokens of one task each.

    y_n = base_n + s B A x_n + s_t B_t A_t x_n,      t = task_n

A run's pairs stand in one product: the tokens are read once, the base's output is read and the sum written once, as
with one pair. What is gathered, the matrices of each run, is small beside the tokens of a run; so the time does not
grow with the number of tasks.

Shapes: `N` tokens, `G` runs of as many tokens each, `L` of them, `D` width, `R` ranks of a task's pair, `S` of the
shared one, `P` of both, `O` output width, `T` tasks.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .experts import under_autocast
from .ranks import no_autocast


def run_pairs(
    x_ND: Tensor,
    base_NO: Tensor,
    a_TRD: Tensor,
    b_TOR: Tensor,
    tasks_G: Tensor,
    *,
    scale: float = 1.0,
    shared: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Adds each run's pair to the output of its base layer. Under autocast in its dtype.

    Args:
        x_ND: tokens, the runs one after the other.
        base_NO: output of the base layer; not written to.
        a_TRD, b_TOR: the pairs of the tasks, cast to the dtype of `x`.
        tasks_G: int64, each in `[0, T)`: the task of each run.
        scale: `s_t`.
        shared: the pair of all tasks, `[S, D]` and `[O, S]`, and its `s`.

    Returns:
        `[N, O]` in the dtype of `x`.

    Raises:
        ValueError: shapes that do not fit.
        IndexError: a task out of range.
    """
    x_ND, base_NO = under_autocast(x_ND, base_NO)
    rows, width = x_ND.shape
    if tasks_G.dim() != 1 or rows % max(1, len(tasks_G)) or (rows and not len(tasks_G)):
        raise ValueError(f"tasks: expected shape [{rows}], or of an equal share of it, found {list(tasks_G.shape)}")
    tasks, ranks, out = len(a_TRD), a_TRD.shape[1], base_NO.shape[1]
    for name, tensor, shape in (
        ("base", base_NO, (rows, out)),
        ("a", a_TRD, (tasks, ranks, width)),
        ("b", b_TOR, (tasks, out, ranks)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
    if tasks == 1:
        tasks_G = tasks_G[:1]  # all of it is one run
    a_SD, b_OS, shared_scale = shared or (a_TRD.new_empty(0, width), b_TOR.new_empty(out, 0), scale)
    a, b = (tuple(t.to(x_ND.dtype) for t in side) for side in ((a_SD, a_TRD), (b_OS, b_TOR)))
    with no_autocast(x_ND.device.type):
        y_NO: Tensor = _RunPairs.apply(x_ND, base_NO, *a, *b, tasks_G, float(shared_scale), float(scale))
    return y_NO


class _RunPairs(torch.autograd.Function):
    """Keeps the tokens, and what stands between the projections."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        base_NO: Tensor,
        a_SD: Tensor,
        a_TRD: Tensor,
        b_OS: Tensor,
        b_TOR: Tensor,
        tasks_G: Tensor,
        shared_scale: float,
        scale: float,
    ) -> Tensor:
        a_GPD, b_GOP = _of_runs(a_SD, a_TRD, tasks_G, 1), _of_runs(b_OS, b_TOR, tasks_G, 2)
        z_GLP = _scaled(torch.bmm(_in_runs(x_ND, tasks_G), a_GPD.transpose(1, 2)), len(a_SD), shared_scale, scale)
        ctx.save_for_backward(x_ND, a_SD, a_TRD, b_OS, b_TOR, tasks_G, z_GLP)
        ctx.scales = shared_scale, scale
        return torch.baddbmm(_in_runs(base_NO, tasks_G), z_GLP, b_GOP.transpose(1, 2)).view_as(base_NO)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_NO,) = grads
        with no_autocast(grad_NO.device.type):
            return _gradients(ctx, grad_NO)


def _gradients(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
    x_ND, a_SD, a_TRD, b_OS, b_TOR, tasks_G, z_GLP = ctx.saved_tensors
    needs_x, needs_base, needs_a, needs_a_T, needs_b, needs_b_T = ctx.needs_input_grad[:6]
    dx_ND = da_SD = da_TRD = db_OS = db_TOR = None
    grad_GLO, shared = _in_runs(grad_NO, tasks_G), len(a_SD)
    dh_GLP = _scaled(torch.bmm(grad_GLO, _of_runs(b_OS, b_TOR, tasks_G, 2)), shared, *ctx.scales)
    if needs_b or needs_b_T:
        db_GOP = torch.bmm(z_GLP.transpose(1, 2), grad_GLO).transpose(1, 2)  # turned, it would take twice as long
        db_OS, db_TOR = db_GOP[..., :shared].sum(0), _of_tasks(db_GOP[..., shared:], b_TOR, tasks_G)
    if needs_a or needs_a_T:
        da_GPD = torch.bmm(dh_GLP.transpose(1, 2), _in_runs(x_ND, tasks_G))
        da_SD, da_TRD = da_GPD[:, :shared].sum(0), _of_tasks(da_GPD[:, shared:], a_TRD, tasks_G)
    if needs_x:
        dx_ND = torch.bmm(dh_GLP, _of_runs(a_SD, a_TRD, tasks_G, 1)).view_as(x_ND)
    return dx_ND, grad_NO if needs_base else None, da_SD, da_TRD, db_OS, db_TOR, None, None, None


def _in_runs(rows_ND: Tensor, tasks_G: Tensor) -> Tensor:
    return rows_ND.reshape(len(tasks_G), len(rows_ND) // max(1, len(tasks_G)), rows_ND.shape[1])


def _of_runs(shared: Tensor, of_tasks: Tensor, tasks_G: Tensor, dim: int) -> Tensor:
    """The matrices of each run, the shared ranks first."""
    of_runs = of_tasks.index_select(0, tasks_G)
    return torch.cat([shared.expand(len(tasks_G), -1, -1), of_runs], dim) if shared.numel() else of_runs


def _of_tasks(of_runs: Tensor, like: Tensor, tasks_G: Tensor) -> Tensor:
    return like.new_zeros(like.shape).index_add_(0, tasks_G, of_runs)


def _scaled(h_GLP: Tensor, shared: int, shared_scale: float, scale: float) -> Tensor:
    """In place."""
    if shared_scale == scale or not shared:
        return h_GLP.mul_(scale)
    h_GLP[..., :shared] *= shared_scale
    h_GLP[..., shared:] *= scale
    return h_GLP
