"""The forward kernel of multi-response attention.

A program owns one tile of a table of `yojo_kernels.tiles` (rows of one sample and one head) and walks over at most two
runs of the other side: steps that are visible as a whole without a mask, then the steps at the borders with one. One
online softmax goes over both runs.

At the borders, what is not seen is multiplied by 0, which makes NaN of what is not finite there. A program whose sums came
out as NaN therefore makes them once more, carefully: few rows at a time, in small steps, all of them masked, with what is
not finite taken out of the products and put back as NaN for those who see it.
"""

import triton
import triton.language as tl

from yojo_kernels.attention_steps import (
    LN2,
    LOAD_QUERY_COLUMNS,
    LOG2E,
    STEP,
    _border_start,
    _careful_start,
    _has_nan,
    _load_ids,
    _load_rows,
    _of_head,
    _step_start,
    _store_rows,
    _tanh,
    _without_broken,
)


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


@triton.jit(
    do_not_specialize=[
        "stride_qh", "stride_kh", "stride_vh", "stride_oh", "num_tokens", "num_heads", "group", "window",
    ]
)  # fmt: skip
def forward_kernel(q, k, v, out, lse, tiles, bounds, position, block,
                   stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
                   num_tokens, num_heads, group, window, scale, softcap,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
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
    q_head = _of_head(q, head64, stride_qh, UNIT)
    k_head = _of_head(k, head64 // group, stride_kh, UNIT)
    v_head = _of_head(v, head64 // group, stride_vh, UNIT)
    q_tile = _load_rows(q_head, rows, stride_qt, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
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

    out_head = _of_head(out, head64, stride_oh, UNIT)
    again = _has_nan(acc)
    _finish(acc, m, total, out_head, lse + head64 * num_tokens, stride_ot, rows, columns, start_m,
            tl.where(again, start_m, end_m), HEAD_DIM)  # fmt: skip
    if again:
        _forward_again(
            q_head, k_head, v_head, out_head, lse + head64 * num_tokens, bounds, position, block,
            stride_qt, stride_kt, stride_vt, stride_ot,
            tile, num_tokens, scale, softcap, window,
            HEAD_DIM, BLOCK_D, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
