"""What the attention kernels are put together from: rows read and stored, where the steps of a tile start."""

import math

import triton
import triton.language as tl

from yojo_kernels.tiles import KEY_COLUMNS, QUERY_COLUMNS

CAREFUL_STEP = 16  # rows of either side at a time where sums are made once more
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
LOAD_QUERY_COLUMNS = tl.constexpr(QUERY_COLUMNS)
LOAD_KEY_COLUMNS = tl.constexpr(KEY_COLUMNS)
STEP = tl.constexpr(CAREFUL_STEP)


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
def _of_head(pointer, head, stride, UNIT: tl.constexpr):
    """The first row of a head; UNIT divides the entries from head to head, whether they are a constant or not."""
    return pointer + tl.multiple_of(head * stride, UNIT)


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
def _packed(pointer, rows, start, stride_t, stride_h, PACK: tl.constexpr, UNIT: tl.constexpr):
    """Where rows of a packed tile begin: from token `start` on, PACK heads of each, a pointer to the first head given."""
    at = pointer + start.to(tl.int64) * stride_t + (rows // PACK) * stride_t
    if PACK == 1:
        return at
    return _of_head(at, (rows % PACK).to(tl.int64), stride_h, UNIT)


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
def _sight_of(q_row, inside, bounds, position, block, num_tokens, HAS_BLOCKS: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """What the mask of queries is made of: their branch's first row and, of blocks, last; logical position; block."""
    own_start = tl.load(bounds + q_row, mask=inside, other=0)
    own_end, position_q, block_q = q_row, q_row, q_row
    if HAS_WINDOW:
        position_q = tl.load(position + q_row, mask=inside, other=0)
    if HAS_BLOCKS:
        own_end = tl.load(bounds + num_tokens + q_row, mask=inside, other=0)
        block_q = tl.load(block + q_row, mask=inside, other=-1)
        block_q = tl.where(block_q < 0, -2, block_q)  # tokens without a block are in no block together
    return own_start, own_end, position_q, block_q


@triton.jit
def _step_start(i, lo_a, first_a, count_a, lo_b, first_b, STEP: tl.constexpr):
    """First row of the i-th full step: those of run a, then those of run b."""
    return tl.where(i < count_a, lo_a + (first_a + i) * STEP, lo_b + (first_b + i - count_a) * STEP)


@triton.jit
def _flat_step(i, full_a, full, lo_a, end_a, from_a, to_a, border_a, lo_b, end_b, from_b, to_b, STEP: tl.constexpr):
    """First row of the i-th step and the row behind its last: the full steps, `full` in all, then those at borders."""
    whole = _step_start(i, lo_a, from_a, full_a, lo_b, from_b, STEP)
    start, end = _border_start(i - full, lo_a, end_a, from_a, to_a, border_a, lo_b, end_b, from_b, to_b, STEP)
    return tl.where(i < full, whole, start), tl.where(i < full, whole + STEP, end)


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
