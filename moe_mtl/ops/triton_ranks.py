"""Kernels of `ranks`, and their launchers. Arguments arrive checked.

Forward is two kernels: the down-projection, with mix, gate and choice in its epilogue, over tiles of tokens; and the
up-projection, with the base's output in its epilogue, over tiles of tokens and outputs. Backward has one: the gradient
at the small side, with the gate's in its epilogue. The other gradients are plain products.

Shapes: `N` tokens, `D` width, `R` ranks of the down-projection, `P` ranks that reach gate and up-projection, `K` of
them chosen per token, `T` tasks, `O` output width. All tensors are contiguous.
"""

# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_configs import Config
from .triton_launch import launch, numerics


@triton.jit
def _project(
    rows_ptr,
    w_ptr,
    n,
    c,
    N,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The tile at rows `n` and columns `c` of `[N, DEPTH]` times `[DEPTH, COLUMNS]`, in float32."""
    acc = tl.zeros([n.shape[0], c.shape[1]], tl.float32)
    for at in range(0, DEPTH, BLOCK_D):
        d = at + tl.arange(0, BLOCK_D)
        d_row = d[None, :]
        d_col = d[:, None]
        rows = tl.load(rows_ptr + n.to(tl.int64) * DEPTH + d_row, mask=(n < N) & (d_row < DEPTH), other=0.0)
        weight = tl.load(w_ptr + d_col * STRIDE_D + c * STRIDE_C, mask=(d_col < DEPTH) & (c < COLUMNS), other=0.0)
        if UPCAST:  # the interpreter multiplies the bits of bfloat16 as integers
            rows = rows.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(rows, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _largest(key, P: tl.constexpr, K: tl.constexpr, COLS: tl.constexpr):
    """Marks each row's `K` largest, the lower rank first among equals."""
    p = tl.arange(0, COLS)[None, :]
    bits = (key + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    none = -(1 << 62)
    packed = tl.where(p < P, order.to(tl.int64) * 256 + (COLS - 1 - p), none)  # no two alike
    left = packed
    for _ in range(K):
        best = tl.max(left, 1)
        left = tl.where(left == best[:, None], none, left)
    return left != packed


@triton.jit
def rank_down_kernel(
    x_ptr,
    a_ptr,
    gate_ptr,
    mix_ptr,
    bias_ptr,
    tasks_ptr,
    h_ptr,
    z_ptr,
    chosen_ptr,
    scale,
    N,
    D: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    K: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    p = tl.arange(0, COLS)[None, :]
    at = n.to(tl.int64) * P + p
    inside = (n < N) & (p < P)
    u = _project(x_ptr, a_ptr, n, r, N, D, R, 1, D, BLOCK_D, PRECISION, UPCAST)
    tl.store(h_ptr + n.to(tl.int64) * R + r, u, mask=(n < N) & (r < R))
    if mix_ptr is not None:
        h = u
        u = tl.zeros([ROWS, COLS], tl.float32)
        task = tl.load(tasks_ptr + n, mask=n < N, other=-1)
        r_col = tl.arange(0, BLOCK_R)[:, None]
        for t in range(T):
            own = tl.where(task == t, h, 0.0)
            mix = tl.load(mix_ptr + t * P * R + p * R + r_col, mask=(p < P) & (r_col < R), other=0.0)
            u = tl.dot(own, mix, u, input_precision=PRECISION)
    z = u * scale
    key = tl.abs(u)
    if gate_ptr is not None:
        key = tl.load(gate_ptr + at, mask=inside, other=0.0)
        gate = key
    if K > 0:
        if bias_ptr is not None:
            key += tl.load(bias_ptr + p, mask=p < P, other=0.0)
        chosen = _largest(key, P, K, COLS)
        tl.store(chosen_ptr + at, chosen.to(tl.uint8), mask=inside)
        z *= chosen.to(tl.float32)
        if RENORMALISE:
            total = tl.sum(tl.where(chosen, gate, 0.0), 1)[:, None]
            z /= tl.where(n < N, total, 1.0)
    if gate_ptr is not None:
        z *= gate
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rank_up_kernel(
    z_ptr,
    b_ptr,
    base_ptr,
    out_ptr,
    N,
    O: tl.constexpr,  # noqa: E741
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    o = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    y = _project(z_ptr, b_ptr, n, o, N, P, O, 1, P, BLOCK_D, PRECISION, UPCAST)
    at = n.to(tl.int64) * O + o
    inside = (n < N) & (o < O)
    if base_ptr is not None:
        y += tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rank_back_kernel(
    grad_ptr,
    b_ptr,
    u_ptr,
    gate_ptr,
    chosen_ptr,
    du_ptr,
    z_ptr,
    dgate_ptr,
    scale,
    N,
    O: tl.constexpr,  # noqa: E741
    P: tl.constexpr,
    RENORMALISE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    p = tl.arange(0, COLS)[None, :]
    dz = scale * _project(grad_ptr, b_ptr, n, p, N, O, P, P, 1, BLOCK_D, PRECISION, UPCAST)
    at = n.to(tl.int64) * P + p
    inside = (n < N) & (p < P)
    u = tl.load(u_ptr + at, mask=inside, other=0.0)
    du = dz
    z = u * scale
    dgate = dz * u
    if chosen_ptr is not None:
        chosen = tl.load(chosen_ptr + at, mask=inside, other=0).to(tl.float32)
        du *= chosen
        z *= chosen
        dgate *= chosen
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
        if RENORMALISE:
            total = tl.sum(gate * chosen, 1)[:, None]
            total = tl.where(n < N, total, 1.0)
            gate /= total
            dgate = chosen * (dgate - tl.sum(dgate * gate, 1)[:, None]) / total
        du *= gate
        z *= gate
        tl.store(dgate_ptr + at, dgate, mask=inside)
    tl.store(du_ptr + at, du, mask=inside)
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)


# --- launchers ---


def down(
    x_ND: Tensor,
    a_RD: Tensor,
    gate_NP: Tensor | None,
    mix_TPR: Tensor | None,
    bias_P: Tensor | None,
    tasks_N: Tensor | None,
    scale: float,
    num_selected: int,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (rows, width), ranks = x_ND.shape, len(a_RD)
    tasks, out_ranks = (0, ranks) if mix_TPR is None else mix_TPR.shape[:2]
    if tasks_N is not None:
        torch._assert_async(((tasks_N >= 0) & (tasks_N < tasks)).all(), f"tasks: expected each in [0, {tasks})")
    h_NR = x_ND.new_empty(rows, ranks, dtype=torch.float32)
    z_NP = x_ND.new_empty(rows, out_ranks)
    chosen_NP = x_ND.new_empty((rows, out_ranks) if num_selected else (0,), dtype=torch.bool)
    if rows:
        config = projection(rows, ranks, out_ranks, x_ND.dtype)
        launch(
            rank_down_kernel,
            (triton.cdiv(rows, config.rows),),
            {
                "x_ptr": x_ND.contiguous(),
                "a_ptr": a_RD.contiguous(),
                "gate_ptr": _float(gate_NP),
                "mix_ptr": _float(mix_TPR),
                "bias_ptr": _float(bias_P),
                "tasks_ptr": None if tasks_N is None else tasks_N.contiguous(),
                "h_ptr": h_NR,
                "z_ptr": z_NP,
                "chosen_ptr": chosen_NP.view(torch.uint8),
                "scale": scale,
                "N": rows,
                "D": width,
                "R": ranks,
                "P": out_ranks,
                "T": tasks,
                "K": num_selected,
                "RENORMALISE": renormalise,
                "BLOCK_R": block(ranks),
                **_tile(config, x_ND.dtype),
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return h_NR, z_NP, chosen_NP


def up(z_NP: Tensor, b_OP: Tensor, base_NO: Tensor | None) -> Tensor:
    (rows, ranks), outputs = z_NP.shape, len(b_OP)
    out_NO = z_NP.new_empty(rows, outputs)
    if rows and outputs:
        config = expansion(rows, ranks, z_NP.dtype)
        launch(
            rank_up_kernel,
            (triton.cdiv(rows, config.rows), triton.cdiv(outputs, config.cols)),
            {
                "z_ptr": z_NP.contiguous(),
                "b_ptr": b_OP.contiguous(),
                "base_ptr": None if base_NO is None else base_NO.contiguous(),
                "out_ptr": out_NO,
                "N": rows,
                "O": outputs,
                "P": ranks,
                **_tile(config, z_NP.dtype),
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out_NO


def back(
    grad_NO: Tensor,
    b_OP: Tensor,
    u_NP: Tensor,
    gate_NP: Tensor | None,
    chosen_NP: Tensor | None,
    scale: float,
    renormalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, ranks = u_NP.shape
    du_NP = u_NP.new_empty(rows, ranks)
    z_NP = u_NP.new_empty(rows, ranks, dtype=grad_NO.dtype)
    dgate_NP = u_NP.new_empty((rows, ranks) if gate_NP is not None else (0,))
    if rows:
        config = projection(rows, ranks, ranks, grad_NO.dtype)
        launch(
            rank_back_kernel,
            (triton.cdiv(rows, config.rows),),
            {
                "grad_ptr": grad_NO.contiguous(),
                "b_ptr": b_OP.contiguous(),
                "u_ptr": u_NP.contiguous(),
                "gate_ptr": _float(gate_NP),
                "chosen_ptr": None if chosen_NP is None else chosen_NP.view(torch.uint8),
                "du_ptr": du_NP,
                "z_ptr": z_NP,
                "dgate_ptr": dgate_NP,
                "scale": scale,
                "N": rows,
                "O": len(b_OP),
                "P": ranks,
                "RENORMALISE": renormalise,
                **_tile(config, grad_NO.dtype),
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return du_NP, z_NP, dgate_NP


def projection(rows: int, ranks: int, out_ranks: int, dtype: torch.dtype) -> Config:
    """Tiles of the kernels that read long rows: low ones, so that all processors of a GPU have rows to read."""
    half, narrow = dtype.itemsize == 2, max(ranks, out_ranks) <= 64
    return Config(
        rows=16 if rows <= 2048 or not narrow else 32,
        cols=block(out_ranks),
        depth=128 if half else 32,
        num_warps=4 if half and narrow else 8,
        num_stages=3,
    )


def expansion(rows: int, ranks: int, dtype: torch.dtype) -> Config:
    """Tiles of the kernel that writes long rows; small ones for float32, whose operands stand in registers."""
    half = dtype.itemsize == 2
    return Config(
        rows=16 if rows <= 16 else 64 if half else 32,
        cols=128 if half else 64,
        depth=block(ranks) if half else 16,
        num_warps=8 if half else 4,
        num_stages=1,
    )


def block(ranks: int) -> int:
    return max(16, triton.next_power_of_2(ranks))


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _tile(config: Config, dtype: torch.dtype) -> dict[str, object]:
    return {
        "ROWS": config.rows,
        "COLS": config.cols,
        "BLOCK_D": config.depth,
        **numerics(dtype),
    }
