"""The forward kernel of multi-response attention.

A program owns one tile of a table of `yojo_kernels.tiles` (tokens of one sample, for PACK query heads that share a key
head) and walks over at most two runs of keys: steps that are visible as a whole without a mask, then the steps at the
borders with one. One loop and one online softmax go over all of them.

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
    _careful_start,
    _flat_step,
    _has_nan,
    _load_ids,
    _load_rows,
    _of_head,
    _packed,
    _sight_of,
    _tanh,
    _without_broken,
)


@triton.jit
def _forward_step(q, k_head, v_head, stride_kt, stride_vt, start_n, end_n, columns, m, total, acc,
                  border, own, own_start, own_end, q_row, position_q, block_q, position, block,
                  scale, softcap, window,
                  HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                  HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                  CAREFUL: tl.constexpr):  # fmt: skip
    """One step of keys; masked where `border`, and then those before the queries' own branches where `own`."""
    rows = tl.arange(0, BLOCK_N)
    k = _load_rows(k_head, rows, stride_kt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, True)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    factor = scale * LOG2E
    if HAS_SOFTCAP:
        s = _tanh(s * (scale / softcap))
        factor = softcap * LOG2E
    if border:
        k_row, position_k, block_k = _load_ids(position, block, start_n, rows, end_n, HAS_BLOCKS, HAS_WINDOW)
        if HAS_BLOCKS:
            together = (block_k[None, :] == block_q[:, None]) & (k_row[None, :] < own_end[:, None])
            seen = ((k_row[None, :] <= q_row[:, None]) | together) & (k_row < end_n)[None, :]
        else:
            seen = k_row[None, :] <= tl.minimum(q_row, end_n - 1)[:, None]
        seen = seen & (k_row[None, :] >= tl.where(own, own_start, 0)[:, None])
        if HAS_WINDOW:
            seen = seen & (position_q[:, None] - position_k[None, :] < window)
        s = tl.where(seen, s, float("-inf"))
    # Only the largest is scaled by itself, all others within the multiply-add below: scale must be above 0.
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * factor - shift[:, None])
    shrink = tl.exp2(m - shift)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    v = _load_rows(v_head, rows, stride_vt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, True)
    if CAREFUL:
        v, broken = _without_broken(v)
        p = tl.where(seen & broken[None, :], float("nan"), p)
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return m_new, total, acc


@triton.jit
def _finish(acc, m, total, out, lse, stride_ot, stride_oh, num_tokens, rows, columns, start, end,
            HEAD_DIM: tl.constexpr, PACK: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Stores output and log-sum-exp of the tokens from start to end, of which rows hold PACK heads each."""
    seeing = total > 0
    acc = acc * tl.where(seeing, 1 / tl.where(seeing, total, 1.0), tl.where(total == total, 0.0, total))[:, None]
    inside = start + rows // PACK < end
    address = _packed(out, rows, start, stride_ot, stride_oh, PACK, UNIT)[:, None] + columns[None, :]
    tl.store(address, acc.to(out.dtype.element_ty), mask=inside[:, None] & (columns < HEAD_DIM)[None, :])
    log_sum = (m + tl.log2(tl.where(seeing, total, 1.0))) * LN2
    log_sum = tl.where(seeing, log_sum, tl.where(total == total, float("-inf"), total))
    tl.store(_packed(lse, rows, start, 1, num_tokens, PACK, 1), log_sum, mask=inside)


@triton.jit
def _load_queries(q, bounds, position, block, stride_qt, stride_qh, num_tokens, rows, columns, start, end,
                  HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PACK: tl.constexpr, UNIT: tl.constexpr,
                  HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr):  # fmt: skip
    """Queries of the tokens from start to end, PACK heads of each, and what their mask is made of."""
    q_row = start + rows // PACK
    inside = q_row < end
    address = _packed(q, rows, start, stride_qt, stride_qh, PACK, UNIT)[:, None] + columns[None, :]
    if BLOCK_D == HEAD_DIM:
        q_tile = tl.load(address, mask=inside[:, None], other=0.0)
    else:
        q_tile = tl.load(address, mask=inside[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    own_start, own_end, position_q, block_q = _sight_of(
        q_row, inside, bounds, position, block, num_tokens, HAS_BLOCKS, HAS_WINDOW
    )
    return q_tile, own_start, own_end, q_row, position_q, block_q


@triton.jit
def _forward_again(q, k, v, out, lse, bounds, position, block,
                   stride_qt, stride_qh, stride_kt, stride_vt, stride_ot, stride_oh,
                   tile, num_tokens, scale, softcap, window,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PACK: tl.constexpr, UNIT: tl.constexpr,
                   PRECISION: tl.constexpr,
                   HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """What a program of the forward does, carefully; pointers are to the first row of its first head."""
    # Read again rather than handed over: the loop before has no register to spare.
    start_m, end_m = tl.load(tile), tl.load(tile + 1)
    lo_a, end_a, lo_b, end_b = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 6), tl.load(tile + 7)
    rows = tl.arange(0, STEP)
    columns = tl.arange(0, BLOCK_D)
    steps_a = tl.cdiv(end_a - lo_a, STEP)
    parts = tl.cdiv(end_m - start_m, STEP)
    for n in tl.range(0, PACK * parts, num_stages=1):
        start = start_m + n % parts * STEP
        member = (n // parts).to(tl.int64)
        q_tile, own_start, own_end, q_row, position_q, block_q = _load_queries(
            _of_head(q, member, stride_qh, UNIT), bounds, position, block, stride_qt, 0, num_tokens, rows, columns,
            start, end_m, HEAD_DIM, BLOCK_D, 1, UNIT, HAS_BLOCKS, HAS_WINDOW,
        )  # fmt: skip
        m = tl.full([STEP], float("-inf"), tl.float32)
        total = tl.zeros([STEP], tl.float32)
        acc = tl.zeros([STEP, BLOCK_D], tl.float32)
        for i in tl.range(0, steps_a + tl.cdiv(end_b - lo_b, STEP), num_stages=1):
            m, total, acc = _forward_step(
                q_tile, k, v, stride_kt, stride_vt, _careful_start(i, lo_a, steps_a, lo_b),
                tl.where(i < steps_a, end_a, end_b), columns, m, total, acc,
                True, i >= steps_a, own_start, own_end, q_row, position_q, block_q, position, block,
                scale, softcap, window,
                HEAD_DIM, BLOCK_D, STEP, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True,
            )  # fmt: skip
        _finish(acc, m, total, _of_head(out, member, stride_oh, UNIT), lse + member * num_tokens,
                stride_ot, 0, num_tokens, rows, columns, start, end_m, HEAD_DIM, 1, UNIT)  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "stride_qh", "stride_kh", "stride_vh", "stride_oh", "num_tokens", "num_heads", "group", "window",
    ]
)  # fmt: skip
def forward_kernel(q, k, v, out, lse, tiles, bounds, position, block,
                   stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
                   num_tokens, num_heads, group, window, scale, softcap,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                   PACK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
                   HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """Output and log-sum-exp of PACK heads of BLOCK_M // PACK tokens; one program per tile and PACK query heads.

    num_heads and group count in packs: the query heads, and those that share a key head, divided by PACK. Rows of a
    program hold PACK heads of one token after the other; where PACK does not divide BLOCK_M, the last ones hold nothing.
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
    q_head = _of_head(q, head64 * PACK, stride_qh, UNIT)
    k_head = _of_head(k, head64 // group, stride_kh, UNIT)
    v_head = _of_head(v, head64 // group, stride_vh, UNIT)
    q_tile, own_start, own_end, q_row, position_q, block_q = _load_queries(
        q_head, bounds, position, block, stride_qt, stride_qh, num_tokens, rows, columns, start_m, end_m,
        HEAD_DIM, BLOCK_D, PACK, UNIT, HAS_BLOCKS, HAS_WINDOW,
    )  # fmt: skip
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full_a = to_a - from_a
    full = full_a + to_b - from_b
    border_a = tl.cdiv(end_a - lo_a, BLOCK_N) - full_a
    for i in range(0, tl.cdiv(end_a - lo_a, BLOCK_N) + tl.cdiv(end_b - lo_b, BLOCK_N)):
        start_n, end_n = _flat_step(
            i, full_a, full, lo_a, end_a, from_a, to_a, border_a, lo_b, end_b, from_b, to_b, BLOCK_N
        )
        m, total, acc = _forward_step(
            q_tile, k_head, v_head, stride_kt, stride_vt, start_n, end_n, columns, m, total, acc,
            i >= full, i >= full + border_a, own_start, own_end, q_row, position_q, block_q, position, block,
            scale, softcap, window,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, False,
        )  # fmt: skip
    again = _has_nan(acc)
    out_head, lse_head = _of_head(out, head64 * PACK, stride_oh, UNIT), lse + head64 * PACK * num_tokens
    _finish(acc, m, total, out_head, lse_head, stride_ot, stride_oh, num_tokens, rows, columns, start_m,
            tl.where(again, start_m, end_m), HEAD_DIM, PACK, UNIT)  # fmt: skip
    if again:
        _forward_again(
            q_head, k_head, v_head, out_head, lse_head, bounds, position, block,
            stride_qt, stride_qh, stride_kt, stride_vt, stride_ot, stride_oh,
            tile, num_tokens, scale, softcap, window,
            HEAD_DIM, BLOCK_D, PACK, UNIT, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP,
        )  # fmt: skip
