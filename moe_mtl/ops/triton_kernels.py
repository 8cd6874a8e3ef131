"""The kernels of sparse experts; `triton_experts` starts them, and says what scheme they serve.

Shapes: `S` routed copies, `D` width, `E` experts, `H` hidden width, `O` output width. A row of a kernel is a place of
the routing plan; a tile is up to `ROWS` places of one expert.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# Which row of a matrix belongs to a place of the plan: the place's own, its copy's, or its token's.
BY_PLACE, BY_COPY, BY_TOKEN = 0, 1, 2


@triton.jit
def _activate(x, KIND: tl.constexpr):
    if KIND == "silu":
        return x * tl.sigmoid(x)
    elif KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # 0.5 (1 + tanh u) = sigmoid(2 u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(KIND == "relu2")
        positive = tl.maximum(x, 0.0)
        return positive * positive


@triton.jit
def _derivative(x, KIND: tl.constexpr):
    if KIND == "silu":
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif KIND == "gelu":
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(KIND == "relu2")
        return 2.0 * tl.maximum(x, 0.0)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tile(num_row_tiles, num_col_tiles, GROUP: tl.constexpr):
    """Programs walk down `GROUP` row tiles before the next column tile: neighbours then share what the cache holds."""
    program = tl.program_id(0)
    per_group = GROUP * num_col_tiles
    first = program // per_group * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def _row_of(place, copy, MODE: tl.constexpr, SELECTED: tl.constexpr):
    if MODE == 0:
        return place
    elif MODE == 1:
        return copy
    else:
        return copy // SELECTED


@triton.jit
def _product(
    acc,
    a_ptr,
    w_ptr,
    rows,
    cols,
    expert,
    width,
    stride_a,
    stride_we,
    stride_wd,
    stride_wc,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`acc += a[rows] @ w[expert]`, of which columns `cols`; `DEPTH` is the width of `a`."""
    depth = tl.arange(0, BLOCK_D)
    a_at = a_ptr + rows[:, None] * stride_a + depth[None, :]
    w_at = w_ptr + expert * stride_we + depth[:, None].to(tl.int64) * stride_wd + cols[None, :].to(tl.int64) * stride_wc
    for d in range(0, DEPTH, BLOCK_D):
        if EVEN:
            a = tl.load(a_at)
            w = tl.load(w_at)
        else:
            a = tl.load(a_at, mask=depth[None, :] < DEPTH - d, other=0.0)
            w = tl.load(w_at, mask=(depth[:, None] < DEPTH - d) & (cols[None, :] < width), other=0.0)
        acc = _dot(a, w, acc, PRECISION, UPCAST)
        a_at += BLOCK_D
        w_at += BLOCK_D * stride_wd
    return acc


@triton.jit
def first_layer_kernel(
    x_ptr,
    w_gate_ptr,
    w_up_ptr,
    b_gate_ptr,
    b_up_ptr,
    pre_gate_ptr,
    pre_up_ptr,
    h_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    num_experts,
    hidden,
    stride_x,
    stride_we,
    stride_wd,
    stride_wh,
    stride_b,
    stride_pre,
    DEPTH: tl.constexpr,
    SELECTED: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`pre = x[token] W + b` and `h = act(pre)`, or `act(pre_gate) pre_up`, at places."""
    row_tile, col_tile = _tile(num_tiles, tl.cdiv(hidden, COLS), GROUP)
    expert = tl.load(tile_expert_ptr + row_tile).to(tl.int64)
    if expert >= num_experts:
        return
    place = tl.load(tile_start_ptr + row_tile) + tl.arange(0, ROWS)
    valid = place < tl.load(offsets_ptr + expert + 1)
    token = tl.load(order_ptr + place, mask=valid, other=0) // SELECTED
    cols = col_tile * COLS + tl.arange(0, COLS)
    pre_up = tl.zeros([ROWS, COLS], tl.float32)
    if GATED:
        # One loop for both products: the tokens are read once.
        pre_gate = tl.zeros([ROWS, COLS], tl.float32)
        depth = tl.arange(0, BLOCK_D)
        x_at = x_ptr + token[:, None] * stride_x + depth[None, :]
        w_at = expert * stride_we + depth[:, None].to(tl.int64) * stride_wd + cols[None, :].to(tl.int64) * stride_wh
        gate_at = w_gate_ptr + w_at
        up_at = w_up_ptr + w_at
        for d in range(0, DEPTH, BLOCK_D):
            if EVEN:
                x = tl.load(x_at)
                w_gate = tl.load(gate_at)
                w_up = tl.load(up_at)
            else:
                inside = (depth[:, None] < DEPTH - d) & (cols[None, :] < hidden)
                x = tl.load(x_at, mask=depth[None, :] < DEPTH - d, other=0.0)
                w_gate = tl.load(gate_at, mask=inside, other=0.0)
                w_up = tl.load(up_at, mask=inside, other=0.0)
            pre_gate = _dot(x, w_gate, pre_gate, PRECISION, UPCAST)
            pre_up = _dot(x, w_up, pre_up, PRECISION, UPCAST)
            x_at += BLOCK_D
            gate_at += BLOCK_D * stride_wd
            up_at += BLOCK_D * stride_wd
        if BIASED:
            bias = tl.load(b_gate_ptr + expert * stride_b + cols, mask=cols < hidden, other=0.0)
            pre_gate += bias[None, :].to(tl.float32)
    else:
        pre_up = _product(
            pre_up,
            x_ptr,
            w_up_ptr,
            token,
            cols,
            expert,
            hidden,
            stride_x,
            stride_we,
            stride_wd,
            stride_wh,
            DEPTH,
            BLOCK_D,
            EVEN,
            PRECISION,
            UPCAST,
        )
    if BIASED:
        bias = tl.load(b_up_ptr + expert * stride_b + cols, mask=cols < hidden, other=0.0)
        pre_up += bias[None, :].to(tl.float32)
    inside = valid[:, None] & (cols[None, :] < hidden)
    at = place[:, None] * stride_pre + cols[None, :]
    if GATED:
        h = _activate(pre_gate, KIND) * pre_up
        if KEEP:
            tl.store(pre_gate_ptr + at, pre_gate.to(pre_gate_ptr.dtype.element_ty), mask=inside)
    else:
        h = _activate(pre_up, KIND)
    if KEEP:
        tl.store(pre_up_ptr + at, pre_up.to(pre_up_ptr.dtype.element_ty), mask=inside)
    tl.store(h_ptr + place[:, None] * hidden + cols[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    a_ptr,
    w_ptr,
    second_a_ptr,
    second_w_ptr,
    b_ptr,
    y_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    num_experts,
    width,
    stride_a,
    stride_we,
    stride_wd,
    stride_wc,
    stride_b,
    stride_y,
    DEPTH: tl.constexpr,
    SELECTED: tl.constexpr,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    TWO: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`y = a W + b`, or `a W + a' W'`; rows of `a` and `y` by place, copy or token."""
    row_tile, col_tile = _tile(num_tiles, tl.cdiv(width, COLS), GROUP)
    expert = tl.load(tile_expert_ptr + row_tile).to(tl.int64)
    if expert >= num_experts:
        return
    start = tl.load(tile_start_ptr + row_tile)
    place = start + tl.arange(0, ROWS)
    valid = place < tl.load(offsets_ptr + expert + 1)
    copy = tl.load(order_ptr + place, mask=valid, other=0)
    # Rows past the expert's last are computed on some row that exists, and not stored.
    rows = _row_of(tl.where(valid, place, start), copy, FROM, SELECTED)
    cols = col_tile * COLS + tl.arange(0, COLS)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    acc = _product(
        acc,
        a_ptr,
        w_ptr,
        rows,
        cols,
        expert,
        width,
        stride_a,
        stride_we,
        stride_wd,
        stride_wc,
        DEPTH,
        BLOCK_D,
        EVEN,
        PRECISION,
        UPCAST,
    )
    if TWO:
        acc = _product(
            acc,
            second_a_ptr,
            second_w_ptr,
            rows,
            cols,
            expert,
            width,
            stride_a,
            stride_we,
            stride_wd,
            stride_wc,
            DEPTH,
            BLOCK_D,
            EVEN,
            PRECISION,
            UPCAST,
        )
    if BIASED:
        acc += tl.load(b_ptr + expert * stride_b + cols, mask=cols < width, other=0.0)[None, :].to(tl.float32)
    to = _row_of(place, copy, TO, SELECTED)
    tl.store(
        y_ptr + to[:, None] * stride_y + cols[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=valid[:, None] & (cols[None, :] < width),
    )


@triton.jit
def _through_activation(
    dh,
    weight,
    place,
    valid,
    cols,
    hidden,
    stride_pre,
    pre_gate_ptr,
    pre_up_ptr,
    dpre_gate_ptr,
    dpre_up_ptr,
    weighted_h_ptr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
):
    """Stores the gradient of what entered the activation, and `weight h`; returns `h . dh` over `cols`."""
    inside = valid[:, None] & (cols[None, :] < hidden)
    at = place[:, None] * stride_pre + cols[None, :]
    pre_up = tl.load(pre_up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        pre_gate = tl.load(pre_gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
        activated = _activate(pre_gate, KIND)
        h = activated * pre_up
        dpre_gate = weight * dh * pre_up * _derivative(pre_gate, KIND)
        tl.store(dpre_gate_ptr + at, dpre_gate.to(dpre_gate_ptr.dtype.element_ty), mask=inside)
        dpre_up = weight * dh * activated
    else:
        h = _activate(pre_up, KIND)
        dpre_up = weight * dh * _derivative(pre_up, KIND)
    tl.store(dpre_up_ptr + at, dpre_up.to(dpre_up_ptr.dtype.element_ty), mask=inside)
    at = place[:, None] * hidden + cols[None, :]
    tl.store(weighted_h_ptr + at, (weight * h).to(weighted_h_ptr.dtype.element_ty), mask=inside)
    return tl.sum(h * dh, 1)


@triton.jit
def hidden_grad_kernel(
    grad_ptr,
    w_down_ptr,
    pre_gate_ptr,
    pre_up_ptr,
    weights_ptr,
    dpre_gate_ptr,
    dpre_up_ptr,
    weighted_h_ptr,
    dweights_ptr,
    order_ptr,
    offsets_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_tiles,
    num_experts,
    hidden,
    stride_grad,
    stride_we,
    stride_wo,
    stride_wh,
    stride_pre,
    DEPTH: tl.constexpr,
    SELECTED: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """With `dh = grad[token] W_down`: the first layer's gradients, `weight h`, and `h . dh` by column tile."""
    num_col_tiles = tl.cdiv(hidden, COLS)
    row_tile, col_tile = _tile(num_tiles, num_col_tiles, GROUP)
    expert = tl.load(tile_expert_ptr + row_tile).to(tl.int64)
    if expert >= num_experts:
        return
    place = tl.load(tile_start_ptr + row_tile) + tl.arange(0, ROWS)
    valid = place < tl.load(offsets_ptr + expert + 1)
    copy = tl.load(order_ptr + place, mask=valid, other=0)
    cols = col_tile * COLS + tl.arange(0, COLS)
    dh = tl.zeros([ROWS, COLS], tl.float32)
    dh = _product(
        dh,
        grad_ptr,
        w_down_ptr,
        copy // SELECTED,
        cols,
        expert,
        hidden,
        stride_grad,
        stride_we,
        stride_wo,
        stride_wh,
        DEPTH,
        BLOCK_D,
        EVEN,
        PRECISION,
        UPCAST,
    )
    weight = tl.load(weights_ptr + copy, mask=valid, other=0.0).to(tl.float32)[:, None]
    if HALVES:  # one half of the columns after the other: both at once do not fit the registers
        left, right = tl.split(tl.permute(tl.reshape(dh, (ROWS, 2, COLS // 2)), (0, 2, 1)))
        half = col_tile * COLS + tl.arange(0, COLS // 2)
        dweight = _through_activation(
            *(left, weight, place, valid, half, hidden, stride_pre, pre_gate_ptr, pre_up_ptr),
            *(dpre_gate_ptr, dpre_up_ptr, weighted_h_ptr, KIND, GATED),
        )
        dweight += _through_activation(
            *(right, weight, place, valid, half + COLS // 2, hidden, stride_pre, pre_gate_ptr, pre_up_ptr),
            *(dpre_gate_ptr, dpre_up_ptr, weighted_h_ptr, KIND, GATED),
        )
    else:
        dweight = _through_activation(
            *(dh, weight, place, valid, cols, hidden, stride_pre, pre_gate_ptr, pre_up_ptr),
            *(dpre_gate_ptr, dpre_up_ptr, weighted_h_ptr, KIND, GATED),
        )
    # Per column tile, summed outside: an atomic sum would differ from run to run.
    tl.store(dweights_ptr + copy * num_col_tiles + col_tile, dweight, mask=valid)


@triton.jit
def outer_kernel(
    a_ptr,
    b_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    a_width,
    b_width,
    stride_a,
    stride_b,
    stride_oe,
    stride_oa,
    stride_ob,
    SELECTED: tl.constexpr,
    A_BY: tl.constexpr,
    B_BY: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Per expert `a^T b` over its places; 0 for an expert without any."""
    a_tile, b_tile = _tile(tl.cdiv(a_width, ROWS), tl.cdiv(b_width, COLS), GROUP)
    expert = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    a_cols = a_tile * ROWS + tl.arange(0, ROWS)
    b_cols = b_tile * COLS + tl.arange(0, COLS)
    step = tl.arange(0, BLOCK_S)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for s in range(start, end, BLOCK_S):
        place = s + step
        valid = place < end
        copy = tl.load(order_ptr + place, mask=valid, other=0)
        a_rows = _row_of(place, copy, A_BY, SELECTED)
        b_rows = _row_of(place, copy, B_BY, SELECTED)
        a = tl.load(
            a_ptr + a_rows[None, :] * stride_a + a_cols[:, None],
            mask=valid[None, :] & (a_cols[:, None] < a_width),
            other=0.0,
        )
        b = tl.load(
            b_ptr + b_rows[:, None] * stride_b + b_cols[None, :],
            mask=valid[:, None] & (b_cols[None, :] < b_width),
            other=0.0,
        )
        acc = _dot(a, b, acc, PRECISION, UPCAST)
    at = expert * stride_oe + a_cols[:, None].to(tl.int64) * stride_oa + b_cols[None, :].to(tl.int64) * stride_ob
    tl.store(
        out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(a_cols[:, None] < a_width) & (b_cols[None, :] < b_width)
    )


@triton.jit
def sum_kernel(
    a_ptr,
    weights_ptr,
    out_ptr,
    order_ptr,
    offsets_ptr,
    width,
    stride_a,
    stride_oe,
    SELECTED: tl.constexpr,
    FROM: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Per expert the (weighted) sum of its places' rows."""
    expert = tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_ptr + expert)
    end = tl.load(offsets_ptr + expert + 1)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for s in range(start, end, ROWS):
        place = s + tl.arange(0, ROWS)
        valid = place < end
        copy = tl.load(order_ptr + place, mask=valid, other=0)
        rows = _row_of(place, copy, FROM, SELECTED)
        inside = valid[:, None] & (cols[None, :] < width)
        a = tl.load(a_ptr + rows[:, None] * stride_a + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            a *= tl.load(weights_ptr + copy, mask=valid, other=0.0).to(tl.float32)[:, None]
        acc += a
    tl.store(out_ptr + expert * stride_oe + cols, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=cols < width)


@triton.jit
def combine_kernel(
    y_ptr,
    weights_ptr,
    indices_ptr,
    out_ptr,
    num_tokens,
    num_experts,
    width,
    SELECTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """`out_n = sum_k weight_nk y_nk`, without the copies that nobody here computed."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for k in tl.static_range(SELECTED):
        copy = token * SELECTED + k
        expert = tl.load(indices_ptr + copy, mask=token < num_tokens, other=num_experts)
        here = (expert >= 0) & (expert < num_experts)
        inside = here[:, None] & (cols[None, :] < width)
        y = tl.load(y_ptr + copy[:, None] * width + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            y *= tl.load(weights_ptr + copy, mask=here, other=0.0).to(tl.float32)[:, None]
        acc += y
    tl.store(
        out_ptr + token[:, None] * width + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(token < num_tokens)[:, None] & (cols[None, :] < width),
    )
