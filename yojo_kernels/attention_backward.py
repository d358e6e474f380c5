"""The backward kernels of multi-response attention.

They follow FlashAttention-2 (Dao, arXiv:2307.08691): one kernel for the gradient of the queries, one for those of keys and
values, each owning its output, so that nothing is added atomically and every launch gives the same bits. Tiles, runs and
sums that are made once more are those of `attention_forward`.
"""

import triton
import triton.language as tl

from yojo_kernels.attention_steps import (
    LOAD_KEY_COLUMNS,
    LOAD_QUERY_COLUMNS,
    LOG2E,
    STEP,
    _careful_start,
    _has_nan,
    _load_ids,
    _load_rows,
    _of_head,
    _sight_of,
    _store_rows,
    _tanh,
    _without_broken,
)


@triton.jit
def _query_grad_step(q, do, k_head, v_head, stride_kt, stride_vt, start_n, end_n, columns, lse, delta, acc, border,
                     own, own_start, own_end, q_row, position_q, block_q, position, block, scale, softcap, window,
                     HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
                     HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                     CAREFUL: tl.constexpr):  # fmt: skip
    """One step; border: whether it needs a mask; own: whether its keys are of the queries' branches, not the prompt."""
    rows = tl.arange(0, BLOCK_N)
    k = _load_rows(k_head, rows, stride_kt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, True)
    v = _load_rows(v_head, rows, stride_vt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, True)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if HAS_SOFTCAP:
        capped = _tanh(s * (1 / (softcap * LOG2E)))
        s = capped * (softcap * LOG2E)
    p = tl.exp2(s - lse[:, None])
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
        p = tl.where(seen, p, 0.0)
    if HAS_SOFTCAP:
        p *= 1 - capped * capped
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
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
        q_row = start + rows
        own_start, own_end, position_q, block_q = _sight_of(
            q_row, q_row < end_m, bounds, position, block, num_tokens, HAS_BLOCKS, HAS_WINDOW
        )
        acc = tl.zeros([STEP, BLOCK_D], tl.float32)
        for i in tl.range(0, steps_a + tl.cdiv(end_b - lo_b, STEP), num_stages=1):
            again = tl.multiple_of(i * zero, 16)  # read at every step, as with RELOAD
            q_tile = _load_rows(q + again, rows, stride_qt, start, end_m, columns, HEAD_DIM, BLOCK_D, True)
            do_tile = _load_rows(do + again, rows, stride_dot, start, end_m, columns, HEAD_DIM, BLOCK_D, True)
            acc = _query_grad_step(
                q_tile, do_tile, k, v, stride_kt, stride_vt, _careful_start(i, lo_a, steps_a, lo_b),
                tl.where(i < steps_a, end_a, end_b), columns, log_sum, sums, acc, True,
                i >= steps_a, own_start, own_end, q_row, position_q, block_q, position, block, scale, softcap, window,
                HEAD_DIM, BLOCK_D, STEP, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True,
            )  # fmt: skip
        _store_rows(dq, acc * scale, rows, stride_dqt, start, end_m, columns, HEAD_DIM)


@triton.jit(
    do_not_specialize=[
        "stride_qh", "stride_kh", "stride_vh", "stride_oh", "stride_doh", "stride_dqh",
        "num_tokens", "num_heads", "group", "window", "zero",
    ]
)  # fmt: skip
def query_grad_kernel(q, k, v, out, do, lse, dlse, dq, stats, tiles, bounds, position, block,
                      stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
                      stride_dot, stride_doh, stride_dqt, stride_dqh, stride_dlset, stride_dlseh,
                      num_tokens, num_heads, group, window, zero, scale, softcap,
                      HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
                      HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                      HAS_LSE_GRAD: tl.constexpr, RELOAD: tl.constexpr):  # fmt: skip
    """Gradient of BLOCK_M queries of one head, and what the other kernel needs of each query.

    stats is [heads, tokens, 2]: lse to base 2, inf where a query sees nothing, so that exp2(score - lse) is 0 there;
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
    q_head, do_head = _of_head(q, head64, stride_qh, UNIT), _of_head(do, head64, stride_doh, UNIT)
    k_head = _of_head(k, head64 // group, stride_kh, UNIT)
    v_head = _of_head(v, head64 // group, stride_vh, UNIT)
    out_head = _of_head(out, head64, stride_oh, UNIT)
    inside = start_m + rows < end_m
    do_tile = _load_rows(do_head, rows, stride_dot, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
    log_sum, sums = _sums_of_queries(
        out_head, do_tile, lse + head64 * num_tokens, dlse + head64 * stride_dlseh, stride_ot,
        stride_dlset, rows, start_m, end_m, columns, HEAD_DIM, BLOCK_D, HAS_LSE_GRAD,
    )  # fmt: skip
    stats += 2 * (head64 * num_tokens + start_m + rows)
    tl.store(stats, log_sum, mask=inside)
    tl.store(stats + 1, sums, mask=inside)
    q_tile = _load_rows(q_head, rows, stride_qt, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    q_row = start_m + rows
    own_start, own_end, position_q, block_q = _sight_of(
        q_row, inside, bounds, position, block, num_tokens, HAS_BLOCKS, HAS_WINDOW
    )
    steps_a = tl.cdiv(end_a - lo_a, BLOCK_N)
    for i in range(0, steps_a + tl.cdiv(end_b - lo_b, BLOCK_N)):
        own = i >= steps_a
        step = tl.where(own, i - steps_a, i)
        start_n, end_n = tl.where(own, lo_b, lo_a) + step * BLOCK_N, tl.where(own, end_b, end_a)
        border = (step < tl.where(own, from_b, from_a)) | (step >= tl.where(own, to_b, to_a))
        if RELOAD:
            again = tl.multiple_of(i * zero, 16)
            q_tile = _load_rows(q_head + again, rows, stride_qt, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
            do_tile = _load_rows(do_head + again, rows, stride_dot, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
        acc = _query_grad_step(
            q_tile, do_tile, k_head, v_head, stride_kt, stride_vt, start_n, end_n, columns, log_sum, sums, acc, border,
            own, own_start, own_end, q_row, position_q, block_q, position, block, scale, softcap, window,
            HEAD_DIM, BLOCK_D, BLOCK_N, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, False,
        )  # fmt: skip
    again = _has_nan(acc)
    dq_head = _of_head(dq, head64, stride_dqh, UNIT)
    end_stored = tl.where(again, start_m, end_m)
    _store_rows(dq_head, acc * scale, rows, stride_dqt, start_m, end_stored, columns, HEAD_DIM)
    if again:
        _query_grad_again(
            q_head, k_head, v_head, out_head, do_head, lse + head64 * num_tokens,
            dlse + head64 * stride_dlseh, dq_head, bounds, position, block,
            stride_qt, stride_kt, stride_vt, stride_ot, stride_dot, stride_dqt, stride_dlset,
            start_m, end_m, lo_a, end_a, lo_b, end_b, num_tokens, zero, scale, softcap, window,
            HEAD_DIM, BLOCK_D, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, HAS_LSE_GRAD,
        )  # fmt: skip


@triton.jit
def _key_grad_step(k, v, q_head, do_head, stats_head, stride_qt, stride_dot, start_m, end_m, columns, acc_k, acc_v,
                   border, k_row, own_start, own_end, heard_end, position_k, block_k, position, block,
                   scale, softcap, window,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
                   HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                   OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr, CAREFUL: tl.constexpr):  # fmt: skip
    # Scores are held transposed, keys down, so that they enter the two sums over queries as they are.
    rows = tl.arange(0, BLOCK_M)
    q = _load_rows(q_head, rows, stride_qt, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
    do = _load_rows(do_head, rows, stride_dot, start_m, end_m, columns, HEAD_DIM, BLOCK_D, True)
    # Behind the end the last row's are read again: the mask makes nothing of them.
    at = 2 * tl.minimum(start_m + rows, end_m - 1)
    lse, delta = tl.split(tl.load(stats_head + at[:, None] + tl.arange(0, 2)[None, :]))
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
    if HAS_SOFTCAP:
        capped = _tanh(s * (1 / (softcap * LOG2E)))
        s = capped * (softcap * LOG2E)
    p = tl.exp2(s - lse[None, :])
    if border:
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
    weight = p
    if HAS_SOFTCAP:
        weight = p * (1 - capped * capped)  # before the products, so that no registers hold the scores across them
    if OF_VALUES:
        acc_v = tl.dot(p.to(do.dtype), do, acc_v, input_precision=PRECISION)
    if OF_KEYS:
        ds = weight * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        if CAREFUL:
            q, broken = _without_broken(q)
            ds = tl.where(seen, tl.where(broken[None, :], float("nan"), ds), 0.0)
        acc_k = tl.dot(ds.to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit
def _hearing_of(start, rows, end_n, end_m, bounds, position, block, num_tokens,
                HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr):  # fmt: skip
    """Keys start + rows, and what their mask is made of; end_m: the row behind the last of their run of queries."""
    k_row, position_k, block_k = _load_ids(position, block, start, rows, end_n, HAS_BLOCKS, HAS_WINDOW)
    heard_end = tl.load(bounds + 2 * num_tokens + k_row, mask=k_row < end_n, other=0)
    if HAS_WINDOW:  # the run of queries then may end before all that hear of the keys
        heard_end = tl.minimum(heard_end, end_m)
    own_start, own_end = k_row, k_row
    if HAS_BLOCKS:
        block_k = tl.where(block_k < 0, -2, block_k)  # tokens without a block are in no block together
        own_start = tl.load(bounds + k_row, mask=k_row < end_n, other=0)
        own_end = tl.load(bounds + num_tokens + k_row, mask=k_row < end_n, other=0)
    return k_row, own_start, own_end, heard_end, position_k, block_k


@triton.jit
def _key_grad_again(q, k, v, do, stats, dk, dv, piece, bounds, position, block,
                    stride_qt, stride_qh, stride_kt, stride_vt, stride_dot, stride_doh, stride_dkt, stride_dvt,
                    start_n, end_n, lo, end, from_step, to_step, steps, slot, num_tokens, scale, softcap, window,
                    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    UNIT: tl.constexpr, PRECISION: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr,
                    HAS_SOFTCAP: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr):  # fmt: skip
    """The gradients of a program's keys and values, carefully.

    Pointers of keys are to the first row of their head, those of queries to the first row of the group's first head.
    """
    rows = tl.arange(0, STEP)
    columns = tl.arange(0, BLOCK_D)
    parts = BLOCK_M // STEP
    for n in tl.range(0, tl.cdiv(end_n - start_n, STEP), num_stages=1):
        start = start_n + n * STEP
        k_tile = _load_rows(k, rows, stride_kt, start, end_n, columns, HEAD_DIM, BLOCK_D, True)
        v_tile = _load_rows(v, rows, stride_vt, start, end_n, columns, HEAD_DIM, BLOCK_D, True)
        k_row, own_start, own_end, heard_end, position_k, block_k = _hearing_of(
            start, rows, end_n, end, bounds, position, block, num_tokens, HAS_BLOCKS, HAS_WINDOW
        )
        acc_k = tl.zeros([STEP, BLOCK_D], tl.float32)
        acc_v = tl.zeros([STEP, BLOCK_D], tl.float32)
        for i in tl.range(from_step * parts, to_step * parts, num_stages=1):
            member = (i // (steps * parts)).to(tl.int64)
            acc_k, acc_v = _key_grad_step(
                k_tile, v_tile, _of_head(q, member, stride_qh, UNIT), _of_head(do, member, stride_doh, UNIT),
                stats + 2 * member * num_tokens, stride_qt, stride_dot, lo + (i % (steps * parts)) * STEP, end,
                columns, acc_k, acc_v, True, k_row, own_start, own_end, heard_end, position_k, block_k, position, block,
                scale, softcap, window,
                HEAD_DIM, BLOCK_D, STEP, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, OF_KEYS, OF_VALUES, True,
            )  # fmt: skip
        at = piece + (start - start_n + rows)[:, None] * BLOCK_D + columns[None, :]
        inside = (start + rows < end_n)[:, None]
        if OF_KEYS:
            if slot < 0:
                _store_rows(dk, acc_k * scale, rows, stride_dkt, start, end_n, columns, HEAD_DIM)
            else:
                tl.store(at, acc_k * scale, mask=inside)
        if OF_VALUES:
            if slot < 0:
                _store_rows(dv, acc_v, rows, stride_dvt, start, end_n, columns, HEAD_DIM)
            else:
                tl.store(at + (BLOCK_N * BLOCK_D if OF_KEYS else 0), acc_v, mask=inside)


@triton.jit(
    do_not_specialize=[
        "stride_qh", "stride_kh", "stride_vh", "stride_doh", "stride_dkh", "stride_dvh",
        "num_tokens", "num_heads", "group", "num_slots", "window",
    ]
)  # fmt: skip
def key_grad_kernel(q, k, v, do, stats, dk, dv, pieces, items, bounds, position, block,
                    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
                    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
                    num_tokens, num_heads, group, num_slots, window, scale, softcap,
                    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
                    HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
                    OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one key head, or the sums of one piece of their queries.

    OF_KEYS, OF_VALUES: which of the two; where both do not fit into registers, each has a launch of its own. pieces is
    [heads, slots, gradients, BLOCK_N, BLOCK_D], keys first.
    """
    head = tl.program_id(0) % num_heads
    item = items + (tl.program_id(0) // num_heads) * LOAD_KEY_COLUMNS
    start_n, end_n = tl.load(item), tl.load(item + 1)
    if start_n >= end_n:
        return
    lo, end, from_full, to_full = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    from_step, to_step, slot = tl.load(item + 6), tl.load(item + 7), tl.load(item + 8)
    rows = tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_D)
    head64 = head.to(tl.int64)
    k_row, own_start, own_end, heard_end, position_k, block_k = _hearing_of(
        start_n, rows, end_n, end, bounds, position, block, num_tokens, HAS_BLOCKS, HAS_WINDOW
    )
    k_head, v_head = _of_head(k, head64, stride_kh, UNIT), _of_head(v, head64, stride_vh, UNIT)
    k_tile = _load_rows(k_head, rows, stride_kt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, True)
    v_tile = k_tile
    acc_k, acc_v = 0.0, 0.0
    if OF_KEYS:
        v_tile = _load_rows(v_head, rows, stride_vt, start_n, end_n, columns, HEAD_DIM, BLOCK_D, True)
        acc_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if OF_VALUES:
        acc_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # The steps of one head of the group after the other, in one loop.
    steps = tl.cdiv(end - lo, BLOCK_M)
    first = head64 * group
    q, do = _of_head(q, first, stride_qh, UNIT), _of_head(do, first, stride_doh, UNIT)
    stats += 2 * first * num_tokens
    member, step = (from_step // steps).to(tl.int64), from_step % steps
    q_head, do_head = _of_head(q, member, stride_qh, UNIT), _of_head(do, member, stride_doh, UNIT)
    stats_head = stats + 2 * member * num_tokens
    for _ in range(from_step, to_step):
        border = (step < from_full) | (step >= to_full)
        acc_k, acc_v = _key_grad_step(
            k_tile, v_tile, q_head, do_head, stats_head, stride_qt, stride_dot, lo + step * BLOCK_M, end,
            columns, acc_k, acc_v, border, k_row, own_start, own_end, heard_end, position_k, block_k, position, block,
            scale, softcap, window,
            HEAD_DIM, BLOCK_D, BLOCK_M, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, OF_KEYS, OF_VALUES, False,
        )  # fmt: skip
        last = step + 1 == steps
        step = tl.where(last, 0, step + 1)
        q_head = _of_head(q_head, last.to(tl.int32), stride_qh, UNIT)
        do_head = _of_head(do_head, last.to(tl.int32), stride_doh, UNIT)
        stats_head += tl.where(last, 2 * num_tokens, 0)
    again = False
    if OF_KEYS:
        again = again | _has_nan(acc_k)
    if OF_VALUES:
        again = again | _has_nan(acc_v)
    end_stored = tl.where(again, start_n, end_n)
    piece = pieces + (head64 * num_slots + tl.maximum(slot, 0)) * ((OF_KEYS + OF_VALUES) * BLOCK_N * BLOCK_D)
    offsets = rows[:, None] * BLOCK_D + columns[None, :]
    inside = (start_n + rows < end_stored)[:, None]
    dk_head, dv_head = _of_head(dk, head64, stride_dkh, UNIT), _of_head(dv, head64, stride_dvh, UNIT)
    if OF_KEYS:
        acc_k = acc_k * scale
        if slot < 0:
            _store_rows(dk_head, acc_k, rows, stride_dkt, start_n, end_stored, columns, HEAD_DIM)
        else:
            tl.store(piece + offsets, acc_k, mask=inside)
    if OF_VALUES:
        if slot < 0:
            _store_rows(dv_head, acc_v, rows, stride_dvt, start_n, end_stored, columns, HEAD_DIM)
        else:
            tl.store(piece + (BLOCK_N * BLOCK_D if OF_KEYS else 0) + offsets, acc_v, mask=inside)
    if again:
        _key_grad_again(
            q, k_head, v_head, do, stats, dk_head, dv_head, piece, bounds, position, block,
            stride_qt, stride_qh, stride_kt, stride_vt, stride_dot, stride_doh, stride_dkt, stride_dvt,
            start_n, end_n, lo, end, from_step, to_step, steps, slot, num_tokens, scale, softcap, window,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, UNIT, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP,
            OF_KEYS, OF_VALUES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_heads", "num_slots"])
def sum_kernel(dk, dv, pieces, sums, stride_dkt, stride_dkh, stride_dvt, stride_dvh, num_heads, num_slots,
               HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
               OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr):  # fmt: skip
    """Adds up, first to last, the pieces of ROWS rows of one split tile and key head."""
    head = tl.program_id(0) % num_heads
    part = tl.program_id(0) // num_heads
    entry = sums + part // (BLOCK_N // ROWS) * 4
    start_n, end_n, slot, count = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
    first = part % (BLOCK_N // ROWS) * ROWS
    if (count == 0) | (start_n + first >= end_n):
        return
    rows = first + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    size = BLOCK_N * BLOCK_D
    head64 = head.to(tl.int64)
    at = pieces + (head64 * num_slots + slot) * ((OF_KEYS + OF_VALUES) * size)
    at += rows[:, None] * BLOCK_D + columns[None, :]
    inside = (start_n + rows < end_n)[:, None]
    acc_k = tl.zeros([ROWS, BLOCK_D], tl.float32)
    acc_v = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for _ in range(0, count):
        if OF_KEYS:
            acc_k += tl.load(at, mask=inside, other=0.0)
        if OF_VALUES:
            acc_v += tl.load(at + (size if OF_KEYS else 0), mask=inside, other=0.0)
        at += (OF_KEYS + OF_VALUES) * size
    if OF_KEYS:
        _store_rows(dk + head64 * stride_dkh, acc_k, rows, stride_dkt, start_n, end_n, columns, HEAD_DIM)
    if OF_VALUES:
        _store_rows(dv + head64 * stride_dvh, acc_v, rows, stride_dvt, start_n, end_n, columns, HEAD_DIM)
