"""Multi-response attention in Triton: forward, backward, and the torch operators around them.

A program owns one tile of a table of `yojo_kernels.tiles` (rows of one sample and one head) and walks over at most two
runs of the other side: steps that are visible as a whole without a mask, then the steps at the borders with one. One
online softmax goes over both runs. The backward follows FlashAttention-2 (Dao, arXiv:2307.08691): one kernel for the
gradient of the queries, one for those of keys and values, each owning its output, so that nothing is added atomically
and every launch gives the same bits.

At the borders, what is not seen is multiplied by 0, which makes NaN of what is not finite there. A program whose sums came
out as NaN therefore makes them once more, carefully: few rows at a time, in small steps, all of them masked, with what is
not finite taken out of the products and put back as NaN for those who see it.
"""

import math
import weakref

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from yojo_kernels import launch, tuning
from yojo_kernels.layout import visible_to
from yojo_kernels.tiles import KEY_COLUMNS, QUERY_COLUMNS

MAX_HEAD_DIM = 256
SUM_WARPS = 8
CAREFUL_STEP = 16  # rows of either side at a time where sums are made once more
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LOAD_QUERY_COLUMNS = tl.constexpr(QUERY_COLUMNS)
LOAD_KEY_COLUMNS = tl.constexpr(KEY_COLUMNS)
STEP = tl.constexpr(CAREFUL_STEP)


# ---- pieces of the kernels ----


@triton.jit
def _tanh(x):
    # 1 - 2 / (e^2|x| + 1) loses small x to cancellation: there its series, exact to float32 below 1/4, is used.
    size = tl.abs(x)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp2(size * (-2 * LOG2E))
    far = (1 - decay) / (1 + decay)
    return tl.where(size < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def _load_rows(
    pointer, rows, stride, start, end, columns, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUND: tl.constexpr
):
    """Rows start + rows, zero from `end` on (looked at only where BOUND) and beyond the head dim."""
    address = pointer + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if BOUND:
        if BLOCK_D == HEAD_DIM:
            return tl.load(address, mask=(start + rows < end)[:, None], other=0.0)
        return tl.load(address, mask=(start + rows < end)[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    if BLOCK_D == HEAD_DIM:
        return tl.load(address)
    return tl.load(address, mask=(columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(pointer, value, rows, stride, start, end, columns, HEAD_DIM: tl.constexpr):
    address = pointer + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    tl.store(
        address, value.to(pointer.dtype.element_ty), mask=(start + rows < end)[:, None] & (columns < HEAD_DIM)[None, :]
    )


@triton.jit
def _load_ids(position, block, start, rows, end, HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """Logical position and block of rows start + rows; what is not needed is not loaded."""
    row = start + rows
    position_of, block_of = row, row
    if HAS_WINDOW:
        position_of = tl.load(position + row, mask=row < end, other=0)
    if HAS_BLOCKS:
        block_of = tl.load(block + row, mask=row < end, other=-1)
    return row, position_of, block_of


@triton.jit
def _step_start(i, lo_a, first_a, count_a, lo_b, first_b, STEP: tl.constexpr):
    """First row of the i-th full step: those of run a, then those of run b."""
    return tl.where(i < count_a, lo_a + (first_a + i) * STEP, lo_b + (first_b + i - count_a) * STEP)


@triton.jit
def _border_start(i, lo_a, end_a, from_a, to_a, count_a, lo_b, end_b, from_b, to_b, STEP: tl.constexpr):
    """First row of the i-th border step and the end of its run: steps from_ to to_ of each run are full, not here."""
    a = i < count_a
    j = tl.where(a, i, i - count_a)
    first = tl.where(a, from_a, from_b)
    j += tl.where(j >= first, tl.where(a, to_a, to_b) - first, 0)
    return tl.where(a, lo_a, lo_b) + j * STEP, tl.where(a, end_a, end_b)


@triton.jit
def _has_nan(x):
    """Whether an entry of a matrix is NaN: a scalar. True as well where infinities of both signs are added."""
    total = tl.sum(tl.sum(x, 1), 0)
    return total != total


@triton.jit
def _without_broken(x):
    """Rows of x [ROWS, D], 0 where an entry is not finite; and which ones those are, [ROWS]."""
    broken = tl.max((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32) ^ 1, 1) > 0
    return tl.where(broken[:, None], 0.0, x), broken


@triton.jit
def _careful_start(i, lo_a, steps_a, lo_b):
    """First row of the i-th careful step: those of run a, then those of run b, full ones and border steps alike."""
    return tl.where(i < steps_a, lo_a + i * STEP, lo_b + (i - steps_a) * STEP)


# ---- forward ----


@triton.jit
def _forward_step(q, k_head, v_head, stride_kt, stride_vt, start_n, end_n, columns, m, total, acc,
                  low, q_row, own_end, position_q, block_q, position, block,
                  scale, softcap, window,
                  HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                  HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                  BORDER: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    k = _load_rows(k_head, rows, stride_kt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, BORDER)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    factor = scale * LOG2E
    if HAS_SOFTCAP:
        s = _tanh(s * (scale / softcap))
        factor = softcap * LOG2E
    if BORDER:
        k_row, position_k, block_k = _load_ids(position, block, start_n, rows, end_n, HAS_BLOCKS, HAS_WINDOW)
        if HAS_BLOCKS:
            together = (block_k[None, :] == block_q[:, None]) & (k_row[None, :] < own_end[:, None])
            seen = ((k_row[None, :] <= q_row[:, None]) | together) & (k_row < end_n)[None, :]
        else:
            seen = k_row[None, :] <= tl.minimum(q_row, end_n - 1)[:, None]
        seen = seen & (k_row[None, :] >= low[:, None])
        if HAS_WINDOW:
            seen = seen & (position_q[:, None] - position_k[None, :] < window)
        s = tl.where(seen, s * factor, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - shift[:, None])
    else:
        # Only the largest is scaled by itself, all others within the multiply-add below: scale must not be negative.
        m_new = tl.maximum(m, tl.max(s, 1) * factor)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * factor - shift[:, None])
    shrink = tl.exp2(m - shift)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    v = _load_rows(v_head, rows, stride_vt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, BORDER)
    if CAREFUL:
        v, broken = _without_broken(v)
        p = tl.where(seen & broken[None, :], float("nan"), p)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return m_new, total, acc


@triton.jit
def _finish(acc, m, total, out, lse, stride_ot, rows, columns, start, end, HEAD_DIM: tl.constexpr):
    """Stores output and log-sum-exp of rows start + rows below end."""
    seeing = total > 0
    acc = acc * tl.where(seeing, 1 / tl.where(seeing, total, 1.0), tl.where(total == total, 0.0, total))[:, None]
    _store_rows(out, acc, rows, stride_ot, start, end, columns, HEAD_DIM)
    log_sum = (m + tl.log2(tl.where(seeing, total, 1.0))) * LN2
    log_sum = tl.where(seeing, log_sum, tl.where(total == total, float("-inf"), total))
    tl.store(lse + start + rows, log_sum, mask=start + rows < end)


@triton.jit
def _forward_again(q, k, v, out, lse, bounds, position, block, stride_qt, stride_kt, stride_vt, stride_ot,
                   tile, num_tokens, scale, softcap, window,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
                   HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """What a program of the forward does, carefully; pointers are to the first row of its head."""
    # Read again rather than handed over: the loops before have no register to spare.
    start_m, end_m = tl.load(tile), tl.load(tile + 1)
    lo_a, end_a, lo_b, end_b = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 6), tl.load(tile + 7)
    rows = tl.arange(0, STEP)
    columns = tl.arange(0, BLOCK_D)
    steps_a = tl.cdiv(end_a - lo_a, STEP)
    for n in tl.range(0, tl.cdiv(end_m - start_m, STEP), num_stages=1):
        start = start_m + n * STEP
        q_tile = _load_rows(q, rows, stride_qt, start, end_m, columns, HEAD_DIM, BLOCK_D, True)
        q_row, position_q, block_q = _load_ids(position, block, start, rows, end_m, HAS_BLOCKS, HAS_WINDOW)
        block_q = tl.where(block_q < 0, -2, block_q)
        own_start = tl.load(bounds + q_row, mask=q_row < end_m, other=0)
        own_end = q_row
        if HAS_BLOCKS:
            own_end = tl.load(bounds + num_tokens + q_row, mask=q_row < end_m, other=0)
        m = tl.full([STEP], float("-inf"), tl.float32)
        total = tl.zeros([STEP], tl.float32)
        acc = tl.zeros([STEP, BLOCK_D], tl.float32)
        for i in tl.range(0, steps_a + tl.cdiv(end_b - lo_b, STEP), num_stages=1):
            m, total, acc = _forward_step(
                q_tile, k, v, stride_kt, stride_vt, _careful_start(i, lo_a, steps_a, lo_b),
                tl.where(i < steps_a, end_a, end_b), columns, m, total, acc,
                tl.where(i < steps_a, 0, own_start), q_row, own_end, position_q, block_q, position, block,
                scale, softcap, window,
                HEAD_DIM, BLOCK_D, STEP, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True, True,
            )  # fmt: skip
        _finish(acc, m, total, out, lse, stride_ot, rows, columns, start, end_m, HEAD_DIM)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "group", "window"])
def forward_kernel(q, k, v, out, lse, tiles, bounds, position, block,
                   stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
                   num_tokens, num_heads, group, window, scale, softcap,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                   HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """Output and log-sum-exp of BLOCK_M queries of one head; one program per tile and query head."""
    head = tl.program_id(0) % num_heads
    tile = tiles + (tl.program_id(0) // num_heads) * LOAD_QUERY_COLUMNS
    start_m, end_m = tl.load(tile), tl.load(tile + 1)
    if start_m >= end_m:
        return
    lo_a, end_a, from_a, to_a = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    lo_b, end_b, from_b, to_b = tl.load(tile + 6), tl.load(tile + 7), tl.load(tile + 8), tl.load(tile + 9)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    head64 = head.to(tl.int64)
    k_head = k + (head64 // group) * stride_kh
    v_head = v + (head64 // group) * stride_vh
    q_tile = _load_rows(q + head64 * stride_qh, rows, stride_qt, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    full_a, full_b = to_a - from_a, to_b - from_b
    for i in range(0, full_a + full_b):
        start_n = _step_start(i, lo_a, from_a, full_a, lo_b, from_b, BLOCK_N)
        m, total, acc = _forward_step(
            q_tile, k_head, v_head, stride_kt, stride_vt, start_n, start_n, columns, m, total, acc,
            rows, rows, rows, rows, rows, position, block, scale, softcap, window,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, False, False,
        )  # fmt: skip
    q_row, position_q, block_q = _load_ids(position, block, start_m, rows, end_m, HAS_BLOCKS, HAS_WINDOW)
    block_q = tl.where(block_q < 0, -2, block_q)  # tokens without a block are in no block together
    own_start = tl.load(bounds + q_row, mask=q_row < end_m, other=0)
    own_end = q_row
    if HAS_BLOCKS:
        own_end = tl.load(bounds + num_tokens + q_row, mask=q_row < end_m, other=0)
    border_a = tl.cdiv(end_a - lo_a, BLOCK_N) - full_a
    border_b = tl.cdiv(end_b - lo_b, BLOCK_N) - full_b
    for i in range(0, border_a + border_b):
        start_n, end_n = _border_start(i, lo_a, end_a, from_a, to_a, border_a, lo_b, end_b, from_b, to_b, BLOCK_N)
        low = tl.where(i < border_a, 0, own_start)
        m, total, acc = _forward_step(
            q_tile, k_head, v_head, stride_kt, stride_vt, start_n, end_n, columns, m, total, acc,
            low, q_row, own_end, position_q, block_q, position, block, scale, softcap, window,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True, False,
        )  # fmt: skip

    again = _has_nan(acc)
    _finish(acc, m, total, out + head64 * stride_oh, lse + head64 * num_tokens, stride_ot, rows, columns, start_m,
            tl.where(again, start_m, end_m), HEAD_DIM)  # fmt: skip
    if again:
        _forward_again(
            q + head64 * stride_qh, k_head, v_head, out + head64 * stride_oh, lse + head64 * num_tokens,
            bounds, position, block, stride_qt, stride_kt, stride_vt, stride_ot,
            tile, num_tokens, scale, softcap, window,
            HEAD_DIM, BLOCK_D, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip


# ---- backward ----


@triton.jit
def _query_grad_step(q, do, k_head, v_head, stride_kt, stride_vt, start_n, end_n, columns, lse, delta, acc,
                     low, q_row, own_end, position_q, block_q, position, block, scale, softcap, window,
                     HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                     HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                     BORDER: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    rows = tl.arange(0, BLOCK_N)
    k = _load_rows(k_head, rows, stride_kt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, BORDER)
    v = _load_rows(v_head, rows, stride_vt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, BORDER)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if HAS_SOFTCAP:
        capped = _tanh(s * (1 / (softcap * LOG2E)))
        s = capped * (softcap * LOG2E)
    p = tl.exp2(s - lse[:, None])
    if BORDER:
        k_row, position_k, block_k = _load_ids(position, block, start_n, rows, end_n, HAS_BLOCKS, HAS_WINDOW)
        if HAS_BLOCKS:
            together = (block_k[None, :] == block_q[:, None]) & (k_row[None, :] < own_end[:, None])
            seen = ((k_row[None, :] <= q_row[:, None]) | together) & (k_row < end_n)[None, :]
        else:
            seen = k_row[None, :] <= tl.minimum(q_row, end_n - 1)[:, None]
        seen = seen & (k_row[None, :] >= low[:, None])
        if HAS_WINDOW:
            seen = seen & (position_q[:, None] - position_k[None, :] < window)
        p = tl.where(seen, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    if HAS_SOFTCAP:
        ds = ds * (1 - capped * capped)
    if CAREFUL:
        k, broken = _without_broken(k)
        ds = tl.where(seen, tl.where(broken[None, :], float("nan"), ds), 0.0)
    return tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit
def _sums_of_queries(out, do_tile, lse, dlse, stride_ot, stride_dlset, rows, start, end, columns,
                     HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LSE_GRAD: tl.constexpr):  # fmt: skip
    """Of rows start + rows of a head: lse to base 2, inf where nothing is seen; and delta = sum(out * dout) - dlse."""
    inside = start + rows < end
    out_tile = _load_rows(out, rows, stride_ot, start, end, columns, HEAD_DIM, BLOCK_D, True)
    sums = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if HAS_LSE_GRAD:
        at = dlse + start.to(tl.int64) * stride_dlset + rows * stride_dlset
        sums -= tl.load(at, mask=inside, other=0.0)
    log_sum = tl.load(lse + start + rows, mask=inside, other=float("inf")) * LOG2E
    return tl.where(log_sum == float("-inf"), float("inf"), log_sum), sums


@triton.jit
def _query_grad_again(q, k, v, out, do, lse, dlse, dq, bounds, position, block,
                      stride_qt, stride_kt, stride_vt, stride_ot, stride_dot, stride_dqt, stride_dlset,
                      start_m, end_m, lo_a, end_a, lo_b, end_b, num_tokens, zero, scale, softcap, window,
                      HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
                      HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                      HAS_LSE_GRAD: tl.constexpr):  # fmt: skip
    """The gradient of a program's queries, carefully; pointers are to the first row of its head."""
    rows = tl.arange(0, STEP)
    columns = tl.arange(0, BLOCK_D)
    steps_a = tl.cdiv(end_a - lo_a, STEP)
    for n in tl.range(0, tl.cdiv(end_m - start_m, STEP), num_stages=1):
        start = start_m + n * STEP
        do_tile = _load_rows(do, rows, stride_dot, start, end_m, columns, HEAD_DIM, BLOCK_D, True)
        log_sum, sums = _sums_of_queries(
            out, do_tile, lse, dlse, stride_ot, stride_dlset, rows, start, end_m, columns,
            HEAD_DIM, BLOCK_D, HAS_LSE_GRAD,
        )  # fmt: skip
        q_row, position_q, block_q = _load_ids(position, block, start, rows, end_m, HAS_BLOCKS, HAS_WINDOW)
        block_q = tl.where(block_q < 0, -2, block_q)
        own_start = tl.load(bounds + q_row, mask=q_row < end_m, other=0)
        own_end = q_row
        if HAS_BLOCKS:
            own_end = tl.load(bounds + num_tokens + q_row, mask=q_row < end_m, other=0)
        acc = tl.zeros([STEP, BLOCK_D], tl.float32)
        for i in tl.range(0, steps_a + tl.cdiv(end_b - lo_b, STEP), num_stages=1):
            again = i * zero  # read at every step, as with RELOAD
            q_tile = _load_rows(q + again, rows, stride_qt, start, end_m, columns, HEAD_DIM, BLOCK_D, True)
            do_tile = _load_rows(do + again, rows, stride_dot, start, end_m, columns, HEAD_DIM, BLOCK_D, True)
            acc = _query_grad_step(
                q_tile, do_tile, k, v, stride_kt, stride_vt, _careful_start(i, lo_a, steps_a, lo_b),
                tl.where(i < steps_a, end_a, end_b), columns, log_sum, sums, acc,
                tl.where(i < steps_a, 0, own_start), q_row, own_end, position_q, block_q, position, block,
                scale, softcap, window,
                HEAD_DIM, BLOCK_D, STEP, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True, True,
            )  # fmt: skip
        _store_rows(dq, acc * scale, rows, stride_dqt, start, end_m, columns, HEAD_DIM)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "group", "window", "zero"])
def query_grad_kernel(q, k, v, out, do, lse, dlse, dq, stats, tiles, bounds, position, block,
                      stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
                      stride_dot, stride_doh, stride_dqt, stride_dqh, stride_dlset, stride_dlseh,
                      num_tokens, num_heads, group, window, zero, scale, softcap,
                      HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                      HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                      HAS_LSE_GRAD: tl.constexpr, RELOAD: tl.constexpr):  # fmt: skip
    """Gradient of BLOCK_M queries of one head, and what the other kernel needs of each query.

    stats is [2, heads, tokens]: lse to base 2, inf where a query sees nothing, so that exp2(score - lse) is 0 there;
    and delta = sum(out * dout) - dlse.

    With RELOAD, queries and gradients of outputs are read again at every step, at an address that the compiler must
    take to change (zero is 0): multiply-adds without tensor cores hold whole rows of them in registers, which run out.
    """
    head = tl.program_id(0) % num_heads
    tile = tiles + (tl.program_id(0) // num_heads) * LOAD_QUERY_COLUMNS
    start_m, end_m = tl.load(tile), tl.load(tile + 1)
    if start_m >= end_m:
        return
    lo_a, end_a, from_a, to_a = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    lo_b, end_b, from_b, to_b = tl.load(tile + 6), tl.load(tile + 7), tl.load(tile + 8), tl.load(tile + 9)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    head64 = head.to(tl.int64)
    k_head = k + (head64 // group) * stride_kh
    v_head = v + (head64 // group) * stride_vh
    inside = start_m + rows < end_m
    do_tile = _load_rows(do + head64 * stride_doh, rows, stride_dot, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
    log_sum, sums = _sums_of_queries(
        out + head64 * stride_oh, do_tile, lse + head64 * num_tokens, dlse + head64 * stride_dlseh, stride_ot,
        stride_dlset, rows, start_m, end_m, columns, HEAD_DIM, BLOCK_D, HAS_LSE_GRAD,
    )  # fmt: skip
    stats += head64 * num_tokens + start_m + rows
    tl.store(stats, log_sum, mask=inside)
    tl.store(stats + num_heads.to(tl.int64) * num_tokens, sums, mask=inside)
    q_head, do_head = q + head64 * stride_qh, do + head64 * stride_doh
    q_tile = _load_rows(q_head, rows, stride_qt, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    full_a, full_b = to_a - from_a, to_b - from_b
    for i in range(0, full_a + full_b):
        start_n = _step_start(i, lo_a, from_a, full_a, lo_b, from_b, BLOCK_N)
        if RELOAD:
            again = i * zero
            q_tile = _load_rows(q_head + again, rows, stride_qt, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
            do_tile = _load_rows(do_head + again, rows, stride_dot, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
        acc = _query_grad_step(
            q_tile, do_tile, k_head, v_head, stride_kt, stride_vt, start_n, start_n, columns, log_sum, sums, acc,
            rows, rows, rows, rows, rows, position, block, scale, softcap, window,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, False, False,
        )  # fmt: skip
    q_row, position_q, block_q = _load_ids(position, block, start_m, rows, end_m, HAS_BLOCKS, HAS_WINDOW)
    block_q = tl.where(block_q < 0, -2, block_q)  # tokens without a block are in no block together
    own_start = tl.load(bounds + q_row, mask=q_row < end_m, other=0)
    own_end = q_row
    if HAS_BLOCKS:
        own_end = tl.load(bounds + num_tokens + q_row, mask=q_row < end_m, other=0)
    border_a = tl.cdiv(end_a - lo_a, BLOCK_N) - full_a
    border_b = tl.cdiv(end_b - lo_b, BLOCK_N) - full_b
    for i in range(0, border_a + border_b):
        start_n, end_n = _border_start(i, lo_a, end_a, from_a, to_a, border_a, lo_b, end_b, from_b, to_b, BLOCK_N)
        low = tl.where(i < border_a, 0, own_start)
        if RELOAD:
            again = i * zero
            q_tile = _load_rows(q_head + again, rows, stride_qt, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
            do_tile = _load_rows(do_head + again, rows, stride_dot, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
        acc = _query_grad_step(
            q_tile, do_tile, k_head, v_head, stride_kt, stride_vt, start_n, end_n, columns, log_sum, sums, acc,
            low, q_row, own_end, position_q, block_q, position, block, scale, softcap, window,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True, False,
        )  # fmt: skip
    again = _has_nan(acc)
    _store_rows(dq + head64 * stride_dqh, acc * scale, rows, stride_dqt, start_m, tl.where(again, start_m, end_m),
                columns, HEAD_DIM)  # fmt: skip
    if again:
        _query_grad_again(
            q_head, k_head, v_head, out + head64 * stride_oh, do_head, lse + head64 * num_tokens,
            dlse + head64 * stride_dlseh, dq + head64 * stride_dqh, bounds, position, block,
            stride_qt, stride_kt, stride_vt, stride_ot, stride_dot, stride_dqt, stride_dlset,
            start_m, end_m, lo_a, end_a, lo_b, end_b, num_tokens, zero, scale, softcap, window,
            HEAD_DIM, BLOCK_D, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, HAS_LSE_GRAD,
        )  # fmt: skip


@triton.jit
def _key_grad_step(k, v, q_head, do_head, lse_head, delta_head, stride_qt, stride_dot, start_m, end_m, columns,
                   acc_k, acc_v, k_row, own_start, own_end, heard_end, position_k, block_k, position, block,
                   scale, softcap, window,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
                   HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                   BORDER: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    # Scores are held transposed, keys down, so that they enter the two sums over queries as they are.
    rows = tl.arange(0, BLOCK_M)
    q = _load_rows(q_head, rows, stride_qt, start_m, end_m, columns, HEAD_DIM, BLOCK_D, BORDER)
    do = _load_rows(do_head, rows, stride_dot, start_m, end_m, columns, HEAD_DIM, BLOCK_D, BORDER)
    if BORDER:
        lse = tl.load(lse_head + start_m + rows, mask=start_m + rows < end_m, other=float("inf"))
        delta = tl.load(delta_head + start_m + rows, mask=start_m + rows < end_m, other=0.0)
    else:
        lse = tl.load(lse_head + start_m + rows)
        delta = tl.load(delta_head + start_m + rows)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
    if HAS_SOFTCAP:
        capped = _tanh(s * (1 / (softcap * LOG2E)))
        s = capped * (softcap * LOG2E)
    p = tl.exp2(s - lse[None, :])
    if BORDER:
        q_row, position_q, block_q = _load_ids(position, block, start_m, rows, end_m, HAS_BLOCKS, HAS_WINDOW)
        seen = (q_row[None, :] >= k_row[:, None]) & (q_row[None, :] < heard_end[:, None])
        if HAS_BLOCKS:
            together = (block_q[None, :] == block_k[:, None]) & (q_row[None, :] >= own_start[:, None])
            seen = seen | (together & (q_row[None, :] < own_end[:, None]))
        if HAS_WINDOW:
            seen = seen & (position_q[None, :] - position_k[:, None] < window)
        p = tl.where(seen, p, 0.0)
    if CAREFUL:
        do, broken = _without_broken(do)
        p = tl.where(seen & broken[None, :], float("nan"), p)
    acc_v = tl.dot(p.to(do.dtype), do, acc_v, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
    if HAS_SOFTCAP:
        ds = ds * (1 - capped * capped)
    if CAREFUL:
        q, broken = _without_broken(q)
        ds = tl.where(seen, tl.where(broken[None, :], float("nan"), ds), 0.0)
    acc_k = tl.dot(ds.to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def _key_grad_again(q, k, v, do, stats, dk, dv, piece, bounds, position, block,
                    stride_qt, stride_qh, stride_kt, stride_vt, stride_dot, stride_doh, stride_dkt, stride_dvt,
                    start_n, end_n, lo, end, first_head, slot, num_tokens, num_heads, group, scale, softcap, window,
                    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                    HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """The gradients of a program's keys and values from queries lo to end, carefully.

    Pointers of keys are to the first row of their head, those of queries to the first head.
    """
    rows = tl.arange(0, STEP)
    columns = tl.arange(0, BLOCK_D)
    steps = tl.cdiv(end - lo, STEP)
    for n in tl.range(0, tl.cdiv(end_n - start_n, STEP), num_stages=1):
        start = start_n + n * STEP
        k_tile = _load_rows(k, rows, stride_kt, start, end_n, columns, HEAD_DIM, BLOCK_D, True)
        v_tile = _load_rows(v, rows, stride_vt, start, end_n, columns, HEAD_DIM, BLOCK_D, True)
        k_row, position_k, block_k = _load_ids(position, block, start, rows, end_n, HAS_BLOCKS, HAS_WINDOW)
        block_k = tl.where(block_k < 0, -2, block_k)
        heard_end = tl.load(bounds + 2 * num_tokens + k_row, mask=k_row < end_n, other=0)
        own_start, own_end = k_row, k_row
        if HAS_BLOCKS:
            own_start = tl.load(bounds + k_row, mask=k_row < end_n, other=0)
            own_end = tl.load(bounds + num_tokens + k_row, mask=k_row < end_n, other=0)
        acc_k = tl.zeros([STEP, BLOCK_D], tl.float32)
        acc_v = tl.zeros([STEP, BLOCK_D], tl.float32)
        for i in tl.range(0, group * steps, num_stages=1):
            head = first_head + i // steps
            lse_head = stats + head * num_tokens
            acc_k, acc_v = _key_grad_step(
                k_tile, v_tile, q + head * stride_qh, do + head * stride_doh, lse_head,
                lse_head + num_heads.to(tl.int64) * group * num_tokens, stride_qt, stride_dot,
                lo + (i % steps) * STEP, end,
                columns, acc_k, acc_v, k_row, own_start, own_end, heard_end, position_k, block_k, position, block,
                scale, softcap, window,
                HEAD_DIM, BLOCK_D, STEP, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True, True,
            )  # fmt: skip
        acc_k = acc_k * scale
        if slot < 0:
            _store_rows(dk, acc_k, rows, stride_dkt, start, end_n, columns, HEAD_DIM)
            _store_rows(dv, acc_v, rows, stride_dvt, start, end_n, columns, HEAD_DIM)
        else:
            at = piece + (start - start_n + rows)[:, None] * BLOCK_D + columns[None, :]
            inside = (start + rows < end_n)[:, None]
            tl.store(at, acc_k, mask=inside)
            tl.store(at + BLOCK_N * BLOCK_D, acc_v, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "group", "num_slots", "window"])
def key_grad_kernel(q, k, v, do, stats, dk, dv, pieces, items, bounds, position, block,
                    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
                    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
                    num_tokens, num_heads, group, num_slots, window, scale, softcap,
                    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                    HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one key head, or the sums of one piece of their queries."""
    head = tl.program_id(0) % num_heads
    item = items + (tl.program_id(0) // num_heads) * LOAD_KEY_COLUMNS
    start_n, end_n = tl.load(item), tl.load(item + 1)
    if start_n >= end_n:
        return
    lo, end, from_full, to_full = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    from_step, to_step, slot = tl.load(item + 6), tl.load(item + 7), tl.load(item + 8)
    from_full = tl.minimum(tl.maximum(from_full, from_step), to_step)
    to_full = tl.minimum(tl.maximum(to_full, from_full), to_step)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    head64 = head.to(tl.int64)
    k_row, position_k, block_k = _load_ids(position, block, start_n, rows, end_n, HAS_BLOCKS, HAS_WINDOW)
    block_k = tl.where(block_k < 0, -2, block_k)  # tokens without a block are in no block together
    heard_end = tl.load(bounds + 2 * num_tokens + k_row, mask=k_row < end_n, other=0)
    own_start, own_end = k_row, k_row
    if HAS_BLOCKS:
        own_start = tl.load(bounds + k_row, mask=k_row < end_n, other=0)
        own_end = tl.load(bounds + num_tokens + k_row, mask=k_row < end_n, other=0)
    k_tile = _load_rows(k + head64 * stride_kh, rows, stride_kt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, True)
    v_tile = _load_rows(v + head64 * stride_vh, rows, stride_vt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, True)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(0, group):
        q_head = q + (head64 * group + member) * stride_qh
        do_head = do + (head64 * group + member) * stride_doh
        lse_head = stats + (head64 * group + member) * num_tokens
        delta_head = lse_head + num_heads.to(tl.int64) * group * num_tokens
        for i in range(from_full, to_full):
            acc_k, acc_v = _key_grad_step(
                k_tile, v_tile, q_head, do_head, lse_head, delta_head, stride_qt, stride_dot, lo + i * BLOCK_M, end,
                columns, acc_k, acc_v, k_row, own_start, own_end, heard_end, position_k, block_k, position, block,
                scale, softcap, window,
                HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, False, False,
            )  # fmt: skip
        for i in range(from_step, to_step - (to_full - from_full)):
            step = tl.where(i < from_full, i, i + to_full - from_full)
            acc_k, acc_v = _key_grad_step(
                k_tile, v_tile, q_head, do_head, lse_head, delta_head, stride_qt, stride_dot, lo + step * BLOCK_M, end,
                columns, acc_k, acc_v, k_row, own_start, own_end, heard_end, position_k, block_k, position, block,
                scale, softcap, window,
                HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True, False,
            )  # fmt: skip
    again = _has_nan(acc_k) | _has_nan(acc_v)
    acc_k = acc_k * scale
    end_stored = tl.where(again, start_n, end_n)
    size = BLOCK_N * BLOCK_D
    piece = pieces + (head64 * num_slots + tl.maximum(slot, 0)) * (2 * size)
    if slot < 0:
        _store_rows(dk + head64 * stride_dkh, acc_k, rows, stride_dkt, start_n, end_stored, columns, HEAD_DIM)
        _store_rows(dv + head64 * stride_dvh, acc_v, rows, stride_dvt, start_n, end_stored, columns, HEAD_DIM)
    else:
        offsets = rows[:, None] * BLOCK_D + columns[None, :]
        inside = (start_n + rows < end_stored)[:, None]
        tl.store(piece + offsets, acc_k, mask=inside)
        tl.store(piece + size + offsets, acc_v, mask=inside)
    if again:
        _key_grad_again(
            q, k + head64 * stride_kh, v + head64 * stride_vh, do, stats, dk + head64 * stride_dkh,
            dv + head64 * stride_dvh, piece, bounds, position, block,
            stride_qt, stride_qh, stride_kt, stride_vt, stride_dot, stride_doh, stride_dkt, stride_dvt,
            start_n, end_n, lo + from_step * BLOCK_M, tl.minimum(lo + to_step * BLOCK_M, end), head64 * group, slot,
            num_tokens, num_heads, group, scale, softcap, window,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_heads", "num_slots"])
def sum_kernel(dk, dv, pieces, sums, stride_dkt, stride_dkh, stride_dvt, stride_dvh, num_heads, num_slots,
               HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Adds up, first to last, the pieces of one split tile and key head."""
    head = tl.program_id(0) % num_heads
    entry = sums + (tl.program_id(0) // num_heads) * 4
    start_n, end_n, slot, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    if count == 0:
        return
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    offsets = rows[:, None] * BLOCK_D + columns[None, :]
    size = BLOCK_N * BLOCK_D
    head64 = head.to(tl.int64)
    acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(0, count):
        at = pieces + (head64 * num_slots + slot + i) * (2 * size)
        acc_k += tl.load(at + offsets)
        acc_v += tl.load(at + size + offsets)
    _store_rows(dk + head64 * stride_dkh, acc_k, rows, stride_dkt, start_n, end_n, columns, HEAD_DIM)
    _store_rows(dv + head64 * stride_dvh, acc_v, rows, stride_dvt, start_n, end_n, columns, HEAD_DIM)


# ---- operators ----


def obstacle(device, dtype, head_dim):
    """Why the kernels cannot run on such tensors, as half a sentence; None where they can."""
    if head_dim > MAX_HEAD_DIM:
        return f"it takes head dims up to {MAX_HEAD_DIM}, not {head_dim}"
    return launch.obstacle(device, dtype)


def multi_response_attention(query, key, value, layout, *, scale, window=None, softcap=None):
    """As `yojo_kernels.multi_response_attention`, arguments checked; returns (output [T, Hq, D], lse [T, Hq])."""
    head_dim = query.shape[2]
    forward = tuning.attention("forward", head_dim, query.dtype, query.device)
    tables = [layout.query_tiles(forward.block_m, forward.block_n, window), None, None, None]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        by_query = tuning.attention("query_grad", head_dim, query.dtype, query.device)
        by_key = tuning.attention("key_grad", head_dim, query.dtype, query.device)
        extra = max(1, tuning.PIECES_PER_PROCESSOR * tuning.processors(query.device) // key.shape[1])
        tables[1] = layout.query_tiles(by_query.block_m, by_query.block_n, window)
        tables[2:] = layout.key_tiles(by_key.block_m, by_key.block_n, extra, window)
    output, lse = torch.ops.yojo.attention(
        query, key, value, layout.sample, layout.branch, layout.bounds, layout.position, layout.block, *tables,
        float(scale), window or 0, softcap or 0.0,
    )  # fmt: skip
    return output, lse.t()


FARTHEST_ROWS = 2**31 // 512  # entries from row to row, so that they count to 32 bits within any tile


def _rows_apart(tensor):
    """The tensor as the kernels read it: entries of a row side by side; a copy only where they are not."""
    return tensor if tensor.stride(2) == 1 and tensor.stride(0) < FARTHEST_ROWS else tensor.contiguous()


def constants(head_dim, tile, block=None, window=0, softcap=0.0):
    """What the kernels are compiled for, launch options included. Nothing here may change from batch to batch."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tuning.padded(head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PRECISION": "ieee",
        "HAS_BLOCKS": block is not None,
        "HAS_WINDOW": window > 0,
        "HAS_SOFTCAP": softcap > 0,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def reloads(dtype, head_dim):
    """Whether the kernel of query gradients reads its own rows again at every step."""
    return dtype == torch.float32 and head_dim > 128


@torch.library.custom_op("yojo::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sample: torch.Tensor,
    branch: torch.Tensor,
    bounds: torch.Tensor,
    position: torch.Tensor,
    block: torch.Tensor | None,
    tiles: torch.Tensor,
    query_grad_tiles: torch.Tensor | None,
    key_grad_items: torch.Tensor | None,
    key_grad_sums: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = map(_rows_apart, (query, key, value))
    num_tokens, num_heads, head_dim = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=query.device)
    tile = tuning.attention("forward", head_dim, query.dtype, query.device)
    if scale < 0:
        query, scale = -query, -scale
    with launch.on(query.device):
        forward_kernel[(tiles.shape[0] * num_heads,)](
            query, key, value, output, lse, tiles, bounds, position, position if block is None else block,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *output.stride()[:2],
            num_tokens, num_heads, num_heads // key.shape[1], window, scale, softcap,
            **constants(head_dim, tile, block, window, softcap),
        )  # fmt: skip
    return output, lse


@attention.register_fake
def _(query, key, value, sample, branch, bounds, position, block, tiles, query_grad_tiles, key_grad_items, key_grad_sums,
      scale, window, softcap):  # fmt: skip
    return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op("yojo::attention_backward", mutates_args=())
def attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    sample: torch.Tensor,
    branch: torch.Tensor,
    bounds: torch.Tensor,
    position: torch.Tensor,
    block: torch.Tensor | None,
    query_grad_tiles: torch.Tensor,
    key_grad_items: torch.Tensor,
    key_grad_sums: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value, grad_output = map(_rows_apart, (query, key, value, grad_output))
    num_tokens, num_heads, head_dim = query.shape
    num_key_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    # Not empty_like: a query that is a view of one fused projection would get its gaps, too.
    grad_query, grad_key, grad_value = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value)
    )
    stats = torch.empty((2, num_heads, num_tokens), dtype=torch.float32, device=query.device)
    ids = (bounds, position, position if block is None else block)
    by_query = tuning.attention("query_grad", head_dim, query.dtype, query.device)
    by_key = tuning.attention("key_grad", head_dim, query.dtype, query.device)
    num_slots = 2 * key_grad_sums.shape[0]
    pieces = torch.empty(
        (num_key_heads, num_slots, 2, by_key.block_n, tuning.padded(head_dim)), dtype=torch.float32, device=query.device
    )
    with launch.on(query.device):
        query_grad_kernel[(query_grad_tiles.shape[0] * num_heads,)](
            query, key, value, output, grad_output, lse, lse if grad_lse is None else grad_lse, grad_query, stats,
            query_grad_tiles, *ids,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *output.stride()[:2],
            *grad_output.stride()[:2], *grad_query.stride()[:2],
            *((0, 0) if grad_lse is None else reversed(grad_lse.stride())),
            num_tokens, num_heads, group, window, 0, scale, softcap,
            HAS_LSE_GRAD=grad_lse is not None, RELOAD=reloads(query.dtype, head_dim),
            **constants(head_dim, by_query, block, window, softcap),
        )  # fmt: skip
        key_grad_kernel[(key_grad_items.shape[0] * num_key_heads,)](
            query, key, value, grad_output, stats, grad_key, grad_value, pieces, key_grad_items, *ids,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *grad_output.stride()[:2],
            *grad_key.stride()[:2], *grad_value.stride()[:2],
            num_tokens, num_key_heads, group, num_slots, window, scale, softcap,
            **constants(head_dim, by_key, block, window, softcap),
        )  # fmt: skip
        sum_kernel[(key_grad_sums.shape[0] * num_key_heads,)](
            grad_key, grad_value, pieces, key_grad_sums, *grad_key.stride()[:2], *grad_value.stride()[:2],
            num_key_heads, num_slots,
            HEAD_DIM=head_dim, BLOCK_D=tuning.padded(head_dim), BLOCK_N=by_key.block_n, num_warps=SUM_WARPS,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


@attention_backward.register_fake
def _(grad_output, grad_lse, query, key, value, output, lse, sample, branch, bounds, position, block, query_grad_tiles,
      key_grad_items, key_grad_sums, scale, window, softcap):  # fmt: skip
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _save(ctx, inputs, output):
    *tensors, scale, window, softcap = inputs
    query, key, value, sample, branch, bounds, position, block, _, *backward_tables = tensors
    ctx.save_for_backward(query, key, value, *output, sample, branch, bounds, position, block, *backward_tables)
    ctx.options = (scale, window, softcap)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_lse):
    none = (None,) * 12
    if grad_output is None and grad_lse is None:
        return None, None, None, *none
    query, key, value, output, lse, *rest = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    gradients = torch.ops.yojo.attention_backward(
        grad_output, grad_lse, query, key, value, output, lse, *rest, *ctx.options
    )
    return *gradients, *none


attention.register_autograd(_backward, setup_context=_save)


# ---- floating-point operations ----

_pairs_of = WeakTensorKeyDictionary()  # sample tensor of a layout -> {window: (weak position and block, pairs)}


def visible_pairs(sample, branch, position, block, window):
    """How many (query, key) pairs are visible in a row: an int. Asks the device; for counting, not for running."""
    if type(sample) is not torch.Tensor or sample.device.type == "meta":
        return sample.shape[0] * (sample.shape[0] + 1) // 2  # no values to look at: one causal sequence
    known = _pairs_of.setdefault(sample, {})
    of_position, of_block, pairs = known.get(window, (lambda: None, lambda: None, None))
    if of_position() is not position or of_block() is not block:
        pairs = _count_pairs(sample.cpu(), branch.cpu(), position.cpu(), block, window)
        known[window] = weakref.ref(position), weakref.ref(block) if block is not None else lambda: None, pairs
    return pairs


def _count_pairs(sample, branch, position, block, window):
    block = None if block is None else block.cpu()
    total, start = 0, 0
    for length in sample.unique_consecutive(return_counts=True)[1].tolist():
        rows = slice(start, start + length)
        start += length
        if block is None and not window:
            _, segments = branch[rows].unique_consecutive(return_counts=True)
            prompt = int((branch[rows] < 0).sum())
            total += int((segments * (segments + 1) // 2).sum()) + prompt * (length - prompt)
            continue
        for first in range(0, length, 1024):
            queries = torch.arange(first, min(first + 1024, length))
            block_of = None if block is None else block[rows]
            total += int(visible_to(queries, sample[rows], branch[rows], position[rows], block_of, window).sum())
    return total


@register_flop_formula(torch.ops.yojo.attention, get_raw=True)
def _forward_flops(query, key, value, sample, branch, bounds, position, block, *rest, out_val=None, **kwargs):
    window = rest[-2]
    return 4 * query.shape[1] * query.shape[2] * visible_pairs(sample, branch, position, block, window)


@register_flop_formula(torch.ops.yojo.attention_backward, get_raw=True)
def _backward_flops(grad_output, grad_lse, query, key, value, output, lse, sample, branch, bounds, position, block, *rest, out_val=None, **kwargs):  # fmt: skip
    # Five matrix products per pair: scores, dP, dQ, dK, dV (the second recomputation of the scores is not counted).
    window = rest[-2]
    return 10 * query.shape[1] * query.shape[2] * visible_pairs(sample, branch, position, block, window)
