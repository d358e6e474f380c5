"""The forward of multi-response attention for Hopper, in Gluon: loads, products and softmax each in warps of their own.

A program owns a tile of queries of one head, as in `yojo_kernels.attention_forward`. One warp lets the tensor memory
accelerator copy keys and values into rings of buffers; two warp groups of 64 queries each multiply them, in turns:
while the tensor cores work for one, the other makes its softmax. Within a group the values of a step are multiplied
while the softmax of the next one is made. The scheme is that of FlashAttention-3 (Shah et al., 2024).

Copies take whole steps, so rows behind the end of a run are rows of others, and what is not seen is multiplied by 0.
That makes NaN of what is not finite there: queries whose sums came out as NaN have NaN for their log-sum-exp, and
`gluon_again_kernel`, launched behind, makes the sums of their tile once more, as the Triton kernel does.

It has not run on a GPU yet.
"""

import math

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from yojo_kernels.attention_forward import _forward_again
from yojo_kernels.attention_steps import LOAD_QUERY_COLUMNS, _of_head
from yojo_kernels.tiles import QUERY_COLUMNS

GROUP_M = gl.constexpr(64)  # queries of a warp group: those of one matrix instruction
LOG2E = gl.constexpr(math.log2(math.e))
LN2 = gl.constexpr(math.log(2))
COLUMNS = gl.constexpr(QUERY_COLUMNS)
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)
BLOCK_M = 128  # queries of a tile: two warp groups
HEADS = 8  # that a program of `gluon_again_kernel` looks at


@gluon.jit
def step_range(i, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b, BLOCK_N: gl.constexpr):
    """First row of the i-th step, the end of its run, and whether that is the prompt's.

    Full steps come first, those of run a before those of run b, then the border steps in the same order.
    """
    full_a = to_a - from_a
    full = full_a + to_b - from_b
    border_a = (end_a - lo_a + BLOCK_N - 1) // BLOCK_N - full_a
    whole = i < full
    in_a = i < full_a if whole else i - full < border_a
    j = (i if in_a else i - full_a) if whole else (i - full if in_a else i - full - border_a)
    first = from_a if in_a else from_b
    behind = to_a if in_a else to_b
    j += first if whole else (behind - first if j >= first else 0)
    return (lo_a if in_a else lo_b) + j * BLOCK_N, end_a if in_a else end_b, in_a


@gluon.jit
def step_counts(start_m, end_m, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b, BLOCK_N: gl.constexpr):
    """(full steps, all steps) of a tile. One that has queries makes a step, even where they see nothing."""
    steps = (end_a - lo_a + BLOCK_N - 1) // BLOCK_N + (end_b - lo_b + BLOCK_N - 1) // BLOCK_N
    steps = 1 if steps == 0 else steps
    return to_a - from_a + to_b - from_b, steps if start_m < end_m else 0


@gluon.jit
def _tanh(x):
    size = gl.abs(x)
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = gl.exp2(size * (-2 * LOG2E))
    far = (1 - decay) / (1 + decay)
    return gl.where(size < 0.25, series, gl.where(x < 0, -far, far))


@gluon.jit
def _produce(q_desc, k_desc, v_desc, q_buffer, k_buffers, v_buffers, q_full, k_full, k_empty, v_full, v_empty,
             head, key_head, start_m, end_m, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b,
             HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Copies the tile's queries, then keys and values of each step, once the warp groups are done with a buffer."""
    BYTES: gl.constexpr = 2 * HEAD_DIM
    full, steps = step_counts(start_m, end_m, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b, BLOCK_N)
    for group in gl.static_range(2):
        first = start_m + group * GROUP_M
        mbarrier.expect(q_full.index(group), GROUP_M * BYTES, pred=first < end_m)
        tma.async_copy_global_to_shared(
            q_desc, [head, first, 0], q_full.index(group), q_buffer.index(group), pred=first < end_m
        )
    key_n, end_n, in_a = step_range(0, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b, BLOCK_N)
    mbarrier.expect(k_full.index(0), BLOCK_N * BYTES, pred=steps > 0)
    tma.async_copy_global_to_shared(
        k_desc, [key_head, key_n, 0], k_full.index(0), k_buffers.index(0), pred=steps > 0
    )  # fmt: skip
    # In the order in which they are multiplied: the keys of a step before the values of the one before it.
    for i in range(0, steps):
        value_n = key_n
        key_n, end_n, in_a = step_range(i + 1, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b, BLOCK_N)
        stage = (i + 1) % STAGES
        more = i + 1 < steps
        # A fresh barrier lets the first round pass.
        mbarrier.wait(k_empty.index(stage), (((i + 1) // STAGES) & 1) ^ 1, pred=more)
        mbarrier.expect(k_full.index(stage), BLOCK_N * BYTES, pred=more)
        tma.async_copy_global_to_shared(
            k_desc, [key_head, key_n, 0], k_full.index(stage), k_buffers.index(stage), pred=more
        )  # fmt: skip
        stage = i % STAGES
        mbarrier.wait(v_empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(v_full.index(stage), BLOCK_N * BYTES)
        tma.async_copy_global_to_shared(v_desc, [key_head, value_n, 0], v_full.index(stage), v_buffers.index(stage))


@gluon.jit
def _softmax(s, m, total, start_n, end_n, low, q_row, own_end, position_q, block_q, position, block,
             scale, softcap, window, OF_SCORES: gl.constexpr, BLOCK_N: gl.constexpr, HAS_BLOCKS: gl.constexpr,
             HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr, BORDER: gl.constexpr):  # fmt: skip
    """One step of the online softmax: (p, what sums so far shrink by, largest score, sum)."""
    factor = scale * LOG2E
    if HAS_SOFTCAP:
        s = _tanh(s * (scale / softcap))
        factor = softcap * LOG2E
    if BORDER:
        k_row = start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, OF_SCORES))
        if HAS_BLOCKS:
            block_k = gl.load(block + k_row, mask=k_row < end_n, other=-1)
            together = (block_k[None, :] == block_q[:, None]) & (k_row[None, :] < own_end[:, None])
            seen = ((k_row[None, :] <= q_row[:, None]) | together) & (k_row < end_n)[None, :]
        else:
            seen = k_row[None, :] <= gl.minimum(q_row, end_n - 1)[:, None]
        seen = seen & (k_row[None, :] >= low[:, None])
        if HAS_WINDOW:
            position_k = gl.load(position + k_row, mask=k_row < end_n, other=0)
            seen = seen & (position_q[:, None] - position_k[None, :] < window)
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    shift = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * factor - shift[:, None])
    shrink = gl.exp2(m - shift)
    return p, shrink, m_new, total * shrink + gl.sum(p, 1)


@gluon.jit
def _consume(q_buffer, k_buffers, v_buffers, q_full, k_full, k_empty, v_full, v_empty, turns,
             out, lse, bounds, position, block, head, stride_ot, num_tokens, window, scale, softcap,
             start_m, end_m, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b,
             GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
             HAS_BLOCKS: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr):  # fmt: skip
    """Output and log-sum-exp of the tile's queries from GROUP * 64 on."""
    OF_SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OF_SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    OF_WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OF_SUMS, 2)
    dtype: gl.constexpr = q_buffer.dtype
    full, steps = step_counts(start_m, end_m, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b, BLOCK_N)
    alone = start_m + GROUP_M >= end_m  # the other group has no queries
    first_m = start_m + GROUP * GROUP_M
    if first_m < end_m:
        q_row = first_m + gl.arange(0, GROUP_M, layout=gl.SliceLayout(1, OF_SCORES))
        own_start = gl.load(bounds + q_row.to(gl.uint32), mask=q_row < end_m, other=0)
        own_end, position_q, block_q = q_row, q_row, q_row
        if HAS_BLOCKS:
            own_end = gl.load(bounds + (num_tokens + q_row).to(gl.uint32), mask=q_row < end_m, other=0)
            block_q = gl.load(block + q_row, mask=q_row < end_m, other=-2)
            block_q = gl.where(block_q < 0, -2, block_q)  # tokens without a block are in no block together
        if HAS_WINDOW:
            position_q = gl.load(position + q_row, mask=q_row < end_m, other=0)
        m = gl.full([GROUP_M], float("-inf"), gl.float32, gl.SliceLayout(1, OF_SCORES))
        total = gl.full([GROUP_M], 0.0, gl.float32, gl.SliceLayout(1, OF_SCORES))
        acc = gl.full([GROUP_M, HEAD_DIM], 0.0, gl.float32, OF_SUMS)
        no_scores = gl.full([GROUP_M, BLOCK_N], 0.0, gl.float32, OF_SCORES)
        q = q_buffer.index(GROUP).reshape([GROUP_M, HEAD_DIM])

        # The first step: there are no values to multiply yet.
        mbarrier.wait(q_full.index(GROUP), 0)
        mbarrier.wait(k_full.index(0), 0)
        k = k_buffers.index(0).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
        mbarrier.wait(turns.index(GROUP), 1 - GROUP, pred=alone == 0)
        s = warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
        mbarrier.arrive(turns.index(1 - GROUP))
        s = warpgroup_mma_wait(0, deps=[s])
        mbarrier.arrive(k_empty.index(0))
        start_n, end_n, in_a = step_range(0, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b, BLOCK_N)
        p, shrink, m, total = _softmax(
            s, m, total, start_n, end_n, gl.where(in_a, 0, own_start), q_row, own_end, position_q, block_q,
            position, block, scale, softcap, window, OF_SCORES, BLOCK_N, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True,
        )  # fmt: skip
        p = gl.convert_layout(p.to(dtype), OF_WEIGHTS)
        mbarrier.wait(k_full.index(1 % STAGES), 1 // STAGES, pred=steps > 1)

        for i in range(1, full):
            s, acc = _multiply(q, p, acc, no_scores, i, alone, k_buffers, v_buffers, k_full, k_empty, v_full, turns,
                               GROUP, HEAD_DIM, BLOCK_N, STAGES)  # fmt: skip
            p_new, shrink, m, total = _softmax(
                s, m, total, 0, 0, own_start, q_row, own_end, position_q, block_q, position, block,
                scale, softcap, window, OF_SCORES, BLOCK_N, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, False,
            )  # fmt: skip
            acc, p = _rescale(acc, p, p_new, shrink, i, steps, k_full, v_empty, OF_SUMS, OF_WEIGHTS, STAGES)
        for i in range(gl.maximum(full, 1), steps):
            s, acc = _multiply(q, p, acc, no_scores, i, alone, k_buffers, v_buffers, k_full, k_empty, v_full, turns,
                               GROUP, HEAD_DIM, BLOCK_N, STAGES)  # fmt: skip
            start_n, end_n, in_a = step_range(i, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b, BLOCK_N)
            p_new, shrink, m, total = _softmax(
                s, m, total, start_n, end_n, gl.where(in_a, 0, own_start), q_row, own_end, position_q, block_q,
                position, block, scale, softcap, window, OF_SCORES, BLOCK_N, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP, True,
            )  # fmt: skip
            acc, p = _rescale(acc, p, p_new, shrink, i, steps, k_full, v_empty, OF_SUMS, OF_WEIGHTS, STAGES)
        last = steps - 1
        mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
        v = v_buffers.index(last % STAGES).reshape([BLOCK_N, HEAD_DIM])
        acc = warpgroup_mma(p, v, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

        seeing = total > 0
        inverse = gl.where(seeing, 1 / gl.where(seeing, total, 1.0), gl.where(total == total, 0.0, total))
        acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, OF_SUMS))[:, None]
        sums = gl.convert_layout(gl.sum(acc, 1), gl.SliceLayout(1, OF_SCORES))
        log_sum = (m + gl.log2(gl.where(seeing, total, 1.0))) * LN2
        log_sum = gl.where(seeing, log_sum, gl.where(total == total, float("-inf"), total))
        log_sum = gl.where(sums == sums, log_sum, float("nan"))
        # Places count to 32 bits without a sign: signs would be made at the start and be spilled until they are needed.
        gl.store(lse + (head * num_tokens + q_row).to(gl.uint32), log_sum, mask=q_row < end_m)
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
        row = gl.arange(0, GROUP_M, layout=gl.SliceLayout(1, ROWS))
        column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
        # Through the buffer of the queries, so that whole rows are stored: no one reads it any more.
        q.store(acc.to(dtype))
        start = out + first_m.to(gl.int64) * stride_ot.to(gl.uint32).to(gl.int64) + head * HEAD_DIM
        gl.store(
            start + (row[:, None] * stride_ot + column[None, :]), q.load(ROWS), mask=(first_m + row < end_m)[:, None]
        )


@gluon.jit
def _multiply(q, p, acc, no_scores, i, alone, k_buffers, v_buffers, k_full, k_empty, v_full, turns,
              GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Scores of step i, there on return; and the values of the step before it, on the way into acc."""
    before = i - 1
    k = k_buffers.index(i % STAGES).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
    v = v_buffers.index(before % STAGES).reshape([BLOCK_N, HEAD_DIM])
    mbarrier.wait(turns.index(GROUP), (i + 1 - GROUP) & 1, pred=alone == 0)
    s = warpgroup_mma(q, k, no_scores, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before % STAGES), (before // STAGES) & 1)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    mbarrier.arrive(turns.index(1 - GROUP))
    s, acc = warpgroup_mma_wait(1, deps=[s, acc])
    mbarrier.arrive(k_empty.index(i % STAGES))
    return s, acc


@gluon.jit
def _rescale(acc, p, p_new, shrink, i, steps, k_full, v_empty,
             OF_SUMS: gl.constexpr, OF_WEIGHTS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """acc with the values of the step before i in it, shrunk for those of step i; and p of step i as an operand."""
    # The next keys are waited for here, not where they are used: ptxas moves the wait for acc no further up than to a
    # branch, and would else wait before the softmax.
    mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < steps)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index((i - 1) % STAGES))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, OF_SUMS))[:, None]
    return acc, gl.convert_layout(p_new.to(p.dtype), OF_WEIGHTS)


@gluon.jit(do_not_specialize=["num_tokens", "num_heads", "group", "window"])
def gluon_forward_kernel(q_desc, k_desc, v_desc, out, lse, tiles, bounds, position, block, stride_ot,
                         num_tokens, num_heads, group, window, scale, softcap,
                         HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
                         HAS_BLOCKS: gl.constexpr, HAS_WINDOW: gl.constexpr, HAS_SOFTCAP: gl.constexpr):  # fmt: skip
    """Output and log-sum-exp of 128 queries of one head; one program per tile and query head."""
    head = gl.program_id(0) % num_heads
    tile = tiles + (gl.program_id(0) // num_heads) * COLUMNS
    start_m, end_m = gl.load(tile), gl.load(tile + 1)
    lo_a, end_a, from_a, to_a = gl.load(tile + 2), gl.load(tile + 3), gl.load(tile + 4), gl.load(tile + 5)
    lo_b, end_b, from_b, to_b = gl.load(tile + 6), gl.load(tile + 7), gl.load(tile + 8), gl.load(tile + 9)
    q_buffer = gl.allocate_shared_memory(q_desc.dtype, [2, 1, GROUP_M, HEAD_DIM], q_desc.layout)
    k_buffers = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_buffers = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(q_full.index(j), count=1)
        mbarrier.init(turns.index(j), count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(v_full.index(j), count=1)
    if start_m + GROUP_M >= end_m:  # the second group has no queries, and does not take part
        for j in gl.static_range(STAGES):
            mbarrier.init(k_empty.index(j), count=1)
            mbarrier.init(v_empty.index(j), count=1)
    else:
        for j in gl.static_range(STAGES):
            mbarrier.init(k_empty.index(j), count=2)
            mbarrier.init(v_empty.index(j), count=2)
    fence_async_shared()  # copies, which arrive at barriers past the usual order, find them initialised
    gl.warp_specialize(
        [
            (
                _consume,
                (q_buffer, k_buffers, v_buffers, q_full, k_full, k_empty, v_full, v_empty, turns,
                 out, lse, bounds, position, block, head, stride_ot, num_tokens, window, scale, softcap,
                 start_m, end_m, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b,
                 0, HEAD_DIM, BLOCK_N, STAGES, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP),
            ),
            (
                _consume,
                (q_buffer, k_buffers, v_buffers, q_full, k_full, k_empty, v_full, v_empty, turns,
                 out, lse, bounds, position, block, head, stride_ot, num_tokens, window, scale, softcap,
                 start_m, end_m, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b,
                 1, HEAD_DIM, BLOCK_N, STAGES, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP),
            ),
            (
                _produce,
                (q_desc, k_desc, v_desc, q_buffer, k_buffers, v_buffers, q_full, k_full, k_empty, v_full, v_empty,
                 head, head // group, start_m, end_m, lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b,
                 HEAD_DIM, BLOCK_N, STAGES),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["stride_qh", "stride_kh", "stride_vh", "stride_oh", "num_tokens", "num_heads", "group", "window"]
)
def gluon_again_kernel(q, k, v, out, lse, tiles, bounds, position, block,
                       stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
                       num_tokens, num_heads, group, window, scale, softcap,
                       HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, HEADS: tl.constexpr, UNIT: tl.constexpr,
                       PRECISION: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr,
                       HAS_SOFTCAP: tl.constexpr):  # fmt: skip
    """Makes a tile's sums once more for those heads in which a query's log-sum-exp is NaN; one program per HEADS."""
    tile = tiles + tl.program_id(0) * LOAD_QUERY_COLUMNS
    start_m, end_m = tl.load(tile), tl.load(tile + 1)
    index = tl.arange(0, HEADS)
    heads = tl.program_id(1) * HEADS + index
    rows = start_m + tl.arange(0, BLOCK_M)
    there = (heads < num_heads)[:, None] & (rows < end_m)[None, :]
    sums = tl.load(lse + heads.to(tl.int64)[:, None] * num_tokens + rows[None, :], mask=there, other=0.0)
    broken = tl.max((sums != sums).to(tl.int32), 1)
    if tl.max(broken, 0) > 0:
        for j in range(0, HEADS):
            if tl.sum(tl.where(index == j, broken, 0), 0) > 0:
                head = (tl.program_id(1) * HEADS + j).to(tl.int64)
                _forward_again(
                    _of_head(q, head, stride_qh, UNIT), _of_head(k, head // group, stride_kh, UNIT),
                    _of_head(v, head // group, stride_vh, UNIT), _of_head(out, head, stride_oh, UNIT), lse + head * num_tokens,
                    bounds, position, block, stride_qt, stride_qh, stride_kt, stride_vt, stride_ot, stride_oh,
                    tile, num_tokens, scale, softcap, window,
                    HEAD_DIM, HEAD_DIM, 1, UNIT, PRECISION, HAS_BLOCKS, HAS_WINDOW, HAS_SOFTCAP,
                )  # fmt: skip
