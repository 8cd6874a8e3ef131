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


@triton.jit
def _project(
    rows_ptr,
    w_ptr,
    n,
    c,
    N,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIDE_W: tl.constexpr,
    STRIDE_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The tile at rows `n` and columns `c` of `[N, WIDTH]` times `[WIDTH, COLUMNS]`, in float32."""
    acc = tl.zeros([n.shape[0], c.shape[1]], tl.float32)
    for at in range(0, WIDTH, BLOCK_W):
        w = at + tl.arange(0, BLOCK_W)
        w_row = w[None, :]
        w_col = w[:, None]
        rows = tl.load(rows_ptr + n.to(tl.int64) * WIDTH + w_row, mask=(n < N) & (w_row < WIDTH), other=0.0)
        weight = tl.load(w_ptr + w_col * STRIDE_W + c * STRIDE_C, mask=(w_col < WIDTH) & (c < COLUMNS), other=0.0)
        if UPCAST:
            rows = rows.to(tl.float32)
            weight = weight.to(tl.float32)
        acc = tl.dot(rows, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _largest(key, P: tl.constexpr, K: tl.constexpr, BLOCK_P: tl.constexpr):
    """Marks each row's `K` largest, the lower rank first among equals."""
    p = tl.arange(0, BLOCK_P)[None, :]
    bits = (key + 0.0).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers in the order of the floats
    none = -(1 << 62)
    packed = tl.where(p < P, order.to(tl.int64) * 256 + (BLOCK_P - 1 - p), none)  # no two alike
    left = packed
    for _ in range(K):
        best = tl.max(left, 1)
        left = tl.where(left == best[:, None], none, left)
    return left != packed


@triton.jit
def _down_kernel(
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
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    r = tl.arange(0, BLOCK_R)[None, :]
    p = tl.arange(0, BLOCK_P)[None, :]
    at = n.to(tl.int64) * P + p
    inside = (n < N) & (p < P)
    u = _project(x_ptr, a_ptr, n, r, N, D, R, 1, D, BLOCK_W, PRECISION, UPCAST)
    tl.store(h_ptr + n.to(tl.int64) * R + r, u, mask=(n < N) & (r < R))
    if mix_ptr is not None:
        h = u
        u = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
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
        chosen = _largest(key, P, K, BLOCK_P)
        tl.store(chosen_ptr + at, chosen.to(tl.uint8), mask=inside)
        z *= chosen.to(tl.float32)
        if RENORMALISE:
            total = tl.sum(tl.where(chosen, gate, 0.0), 1)[:, None]
            z /= tl.where(n < N, total, 1.0)
    if gate_ptr is not None:
        z *= gate
    tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _up_kernel(
    z_ptr,
    b_ptr,
    base_ptr,
    out_ptr,
    N,
    O: tl.constexpr,  # noqa: E741
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_W: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)[None, :]
    y = _project(z_ptr, b_ptr, n, o, N, P, O, 1, P, BLOCK_W, PRECISION, UPCAST)
    at = n.to(tl.int64) * O + o
    inside = (n < N) & (o < O)
    if base_ptr is not None:
        y += tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _back_kernel(
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
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    dz = scale * _project(grad_ptr, b_ptr, n, p, N, O, P, P, 1, BLOCK_W, PRECISION, UPCAST)
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


INTERPRETED = not isinstance(_up_kernel, triton.JITFunction)


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
        options = projection(rows, max(ranks, out_ranks), x_ND.dtype)
        _down_kernel[(triton.cdiv(rows, options["BLOCK_N"]),)](
            x_ND.contiguous(),
            a_RD.contiguous(),
            _float(gate_NP),
            _float(mix_TPR),
            _float(bias_P),
            None if tasks_N is None else tasks_N.contiguous(),
            h_NR,
            z_NP,
            chosen_NP.view(torch.uint8),
            scale,
            rows,
            D=width,
            R=ranks,
            P=out_ranks,
            T=tasks,
            K=num_selected,
            RENORMALISE=renormalise,
            BLOCK_R=block(ranks),
            BLOCK_P=block(out_ranks),
            **options,
            **_arithmetic(),
        )
    return h_NR, z_NP, chosen_NP


def up(z_NP: Tensor, b_OP: Tensor, base_NO: Tensor | None) -> Tensor:
    (rows, ranks), outputs = z_NP.shape, len(b_OP)
    out_NO = z_NP.new_empty(rows, outputs)
    if rows and outputs:
        options = expansion(rows, ranks, z_NP.dtype)
        _up_kernel[(triton.cdiv(rows, options["BLOCK_N"]), triton.cdiv(outputs, options["BLOCK_O"]))](
            z_NP.contiguous(),
            b_OP.contiguous(),
            None if base_NO is None else base_NO.contiguous(),
            out_NO,
            rows,
            O=outputs,
            P=ranks,
            **options,
            **_arithmetic(),
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
        options = projection(rows, ranks, grad_NO.dtype)
        _back_kernel[(triton.cdiv(rows, options["BLOCK_N"]),)](
            grad_NO.contiguous(),
            b_OP.contiguous(),
            u_NP.contiguous(),
            _float(gate_NP),
            None if chosen_NP is None else chosen_NP.view(torch.uint8),
            du_NP,
            z_NP,
            dgate_NP,
            scale,
            rows,
            O=len(b_OP),
            P=ranks,
            RENORMALISE=renormalise,
            BLOCK_P=block(ranks),
            **options,
            **_arithmetic(),
        )
    return du_NP, z_NP, dgate_NP


def projection(rows: int, ranks: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of the kernels that read long rows: low ones, so that all processors of a GPU have rows to read."""
    half = dtype.itemsize == 2
    return {
        "BLOCK_N": 16 if rows <= 2048 or ranks > 64 else 32,
        "BLOCK_W": 128 if half else 32,
        "num_warps": 4 if half and ranks <= 64 else 8,
        "num_stages": 3,
    }


def expansion(rows: int, ranks: int, dtype: torch.dtype) -> dict[str, int]:
    """Tiles of the kernel that writes long rows; small ones for float32, whose operands stand in registers."""
    half = dtype.itemsize == 2
    return {
        "BLOCK_N": 16 if rows <= 16 else 64 if half else 32,
        "BLOCK_O": 128 if half else 64,
        "BLOCK_W": block(ranks) if half else 16,
        "num_warps": 8 if half else 4,
        "num_stages": 1,
    }


def block(ranks: int) -> int:
    return max(16, triton.next_power_of_2(ranks))


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _arithmetic() -> dict[str, object]:
    """The interpreter multiplies bfloat16 as integers, hence the cast."""
    return {
        "PRECISION": "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        "UPCAST": INTERPRETED,
    }
