"""Tables of tiles: which rows a kernel's program owns, and which rows of the other side it walks over.

A kernel's program owns one tile of rows and walks over at most two runs of the other side. Tables say which, as int32
rows; they are made with tensor operations alone, in the device's memory or the host's, without ever asking a device
for a value. Their sizes are upper bounds from shapes; the rows beyond what is needed describe empty tiles.

A run is (lo, end, full_lo, full_hi): steps lo, lo + STEP, ... below end, of which those numbered full_lo to full_hi
lie wholly inside the run and are visible as a whole (no mask is needed); all others are border steps.
"""

import torch

QUERY_COLUMNS = 10
KEY_COLUMNS = 9
SHORTEST_PIECE = 8  # steps of one query head below which a key tile's queries are not split further


@torch.library.custom_op("yojo::query_tiles", mutates_args=())
def query_tiles(
    sample_offsets: torch.Tensor,
    prompt_ends: torch.Tensor,
    segment_offsets: torch.Tensor,
    position: torch.Tensor,
    block_span: torch.Tensor | None,
    position_extremes: torch.Tensor | None,
    block_m: int,
    block_n: int,
    window: int,
) -> torch.Tensor:
    """Tiles of at most `block_m` queries of one sample, and the keys they see, heaviest first.

    Args:
        sample_offsets, prompt_ends, segment_offsets, position, block_span: as in `Layout`.
        position_extremes: what the operator of that name makes; None where there is no window.
        block_m: queries of a tile.
        block_n: keys of a step.
        window: sliding window, 0 for none.

    Returns:
        [T // block_m + S, 10] int32: start and end of the tile's queries (equal: an empty tile), then two runs of
        keys, the prompt's and the own branches'. Rows between prompt and own branches are in neither.
    """
    num_tokens, num_samples = position.shape[0], prompt_ends.shape[0]
    starts, ends, segments = sample_offsets[:-1], sample_offsets[1:], segment_offsets
    sample, start_m, end_m = _cut(starts, ends, block_m, num_tokens // block_m + num_samples)
    sample_start, prompt_end = starts[sample], prompt_ends[sample]
    first, last = _segment_of(segments, start_m), _segment_of(segments, end_m - 1)
    branch_start = torch.maximum(segments[first], prompt_end)
    reach, shared = end_m, start_m + 1  # up to the first query's own row, keys come before all queries
    if block_span is not None:
        reach = torch.maximum(end_m, _over_rows(block_span[1], start_m, end_m, block_m).amax(1) + 1)
        run_end = block_span[3, start_m.clamp(max=num_tokens - 1)] + 1
        shared = torch.where(run_end >= end_m, run_end, shared)  # queries of one block see it to its end
    # Only the rows of one branch share keys of a branch.
    alone = (first == last) & (start_m >= prompt_end)
    prompt_lo, branch_lo = sample_start, branch_start
    prompt_full_lo, branch_full_lo = prompt_lo, branch_lo
    if window:
        search = _PositionSearch(segments, position_extremes)
        positions = _over_rows(position, start_m, end_m, block_m)
        earliest, latest = positions.amin(1) - window + 1, positions.amax(1) - window + 1
        prompt = _segment_of(segments, prompt_end - 1)
        has_prompt = prompt_end > sample_start
        prompt_lo = torch.where(has_prompt, search.first_up_to(prompt, earliest), sample_start)
        prompt_full_lo = torch.where(has_prompt, search.last_from(prompt, latest), sample_start)
        # With several branches in the tile the run starts in the first and is masked throughout.
        branch_lo = torch.where(alone, search.first_up_to(first, earliest), branch_start)
        branch_full_lo = torch.where(alone, search.last_from(first, latest), branch_start)
    prompt_run = _run(
        prompt_lo, torch.minimum(prompt_end, reach), prompt_full_lo, torch.minimum(prompt_end, shared), block_n
    )
    branch_end = torch.where(end_m > prompt_end, reach, branch_lo)
    branch_full_hi = torch.where(alone, shared, branch_lo)
    branch_run = _run(branch_lo, branch_end, branch_full_lo, branch_full_hi, block_n)
    table = torch.stack([start_m, end_m, *prompt_run, *branch_run], dim=1)
    table = torch.where((end_m > start_m)[:, None], table, 0)
    steps = _steps(table[:, 2], table[:, 3], block_n) + _steps(table[:, 6], table[:, 7], block_n)
    return table[steps.argsort(descending=True, stable=True)].to(torch.int32).contiguous()


@query_tiles.register_fake
def _(sample_offsets, prompt_ends, segment_offsets, position, block_span, position_extremes, block_m, block_n, window):
    tiles = position.shape[0] // block_m + prompt_ends.shape[0]
    return position.new_empty((tiles, QUERY_COLUMNS), dtype=torch.int32)


@torch.library.custom_op("yojo::key_tiles", mutates_args=())
def key_tiles(
    sample_offsets: torch.Tensor,
    prompt_ends: torch.Tensor,
    segment_offsets: torch.Tensor,
    position: torch.Tensor,
    block_span: torch.Tensor | None,
    position_extremes: torch.Tensor | None,
    block_m: int,
    block_n: int,
    extra: int,
    group: int,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of at most `block_n` keys of one prompt, or of one sample's branches, and the queries that see them.

    A program takes the steps of all query heads that share its keys, one head after the other. Every response listens
    to the prompt, whose keys would keep a few programs busy long after all others are done: a tile with more than its
    share of the steps is split into pieces, each an item of its own, whose sums are added up afterwards in a fixed
    order.

    Args:
        sample_offsets, prompt_ends, segment_offsets, position, block_span: as in `Layout`.
        position_extremes: what the operator of that name makes; None where there is no window.
        block_m: queries of a step.
        block_n: keys of a tile.
        extra: a piece is at most 1 / extra of all steps (and never fewer than `SHORTEST_PIECE` steps).
        group: query heads that share one head of keys.
        window: sliding window, 0 for none.

    Returns:
        items: [T // block_n + 2 S + E, 9] int32, heaviest first: start and end of the tile's keys (equal: an empty
            item), the run of queries, first and last step of this piece, counted over all heads of the group, and the
            slot of its sums, -1 where the tile is in one piece. E is `extra`, or less for a short row (`_pieces`).
        sums: [E, 4] int32: start and end of a split tile's keys, its first slot (2 E at most) and its number of pieces.
    """
    num_tokens, num_samples = position.shape[0], prompt_ends.shape[0]
    segments, sample_ends = segment_offsets, sample_offsets[1:].contiguous()
    parts = torch.stack([sample_offsets[:-1], prompt_ends], dim=1).flatten()
    part_ends = torch.stack([prompt_ends, sample_ends], dim=1).flatten()
    part, start_n, end_n = _cut(parts, part_ends, block_n, num_tokens // block_n + 2 * num_samples)
    in_prompt = part % 2 == 0
    sample_end = sample_ends[part // 2]
    first, last = _segment_of(segments, start_n), _segment_of(segments, end_n - 1)
    lo, end = start_n, torch.where(in_prompt, sample_end, segments[last + 1])
    # From the last key's own row on, queries come after all keys.
    full_lo, full_hi = end_n - 1, torch.where(first == last, end, lo)
    if block_span is not None:
        lo = torch.minimum(lo, _over_rows(block_span[0], start_n, end_n, block_n).amin(1))
        run_start = block_span[2, (end_n - 1).clamp(min=0)].to(torch.int64)
        full_lo = torch.where(run_start <= start_n, run_start, full_lo)  # keys of one block are seen from its start on
    if window:
        search = _PositionSearch(segments, position_extremes)
        positions = _over_rows(position, start_n, end_n, block_n)
        earliest, latest = positions.amin(1) + window, positions.amax(1) + window
        full_hi = torch.where(first == last, search.first_up_to(first, earliest), lo)
        last_seen = torch.maximum(search.last_from(last, latest), end_n)
        # A prompt's keys are heard in the branches too, wherever one starts within the window.
        owner = torch.searchsorted(sample_ends, segments[:-1], right=True).clamp(max=num_samples - 1)
        is_branch = (segments[:-1] >= prompt_ends[owner]) & (segments[1:] > segments[:-1])
        nearest = torch.where(is_branch, search.least(), FAR)
        nearest = nearest.new_full((num_samples,), FAR).scatter_reduce(0, owner, nearest, "amin")
        heard = in_prompt & (nearest[part // 2] < latest)
        end = torch.where(heard, sample_end, last_seen)
    run = _run(lo, end, full_lo, full_hi, block_m)
    table = torch.where((end_n > start_n)[:, None], torch.stack([start_n, end_n, *run], dim=1), 0)

    extra = _pieces(extra, num_tokens, num_samples, block_m, block_n, group)
    steps = _steps(table[:, 2], table[:, 3], block_m) * group
    longest = torch.clamp((steps.sum() + extra - 1) // extra, min=SHORTEST_PIECE)
    pieces = (steps + longest - 1) // longest
    piece_ends = pieces.cumsum(0)
    item = torch.arange(table.shape[0] + extra, device=position.device)
    tile = torch.searchsorted(piece_ends, item, right=True)
    used = tile < table.shape[0]
    tile = tile.clamp(max=table.shape[0] - 1)
    piece = item - (piece_ends - pieces)[tile]
    slots = torch.where(pieces > 1, pieces, 0)
    first_slot = slots.cumsum(0) - slots
    from_step = piece * longest
    to_step = torch.minimum(from_step + longest, steps[tile])
    slot = torch.where(pieces[tile] > 1, first_slot[tile] + piece, -1)
    items = torch.cat([table[tile], torch.stack([from_step, to_step, slot], dim=1)], dim=1)
    items = torch.where(used[:, None], items, 0)
    order = torch.where(used, to_step - from_step, -1).argsort(descending=True, stable=True)
    split = slots.argsort(descending=True, stable=True)[:extra]
    sums = torch.stack([table[split, 0], table[split, 1], first_slot[split], slots[split]], dim=1)
    sums = torch.nn.functional.pad(sums, (0, 0, 0, extra - sums.shape[0]))
    return items[order].to(torch.int32).contiguous(), sums.to(torch.int32).contiguous()


@key_tiles.register_fake
def _(sample_offsets, prompt_ends, segment_offsets, position, block_span, position_extremes, block_m, block_n, extra,
      group, window):  # fmt: skip
    tiles = position.shape[0] // block_n + 2 * prompt_ends.shape[0]
    extra = _pieces(extra, position.shape[0], prompt_ends.shape[0], block_m, block_n, group)
    return (
        position.new_empty((tiles + extra, KEY_COLUMNS), dtype=torch.int32),
        position.new_empty((extra, 4), dtype=torch.int32),
    )


def _pieces(extra, num_tokens, num_samples, block_m, block_n, group):
    """How many pieces more than tiles there can be: `extra`, or where a row has fewer, as many as its size allows."""
    tiles = num_tokens // block_n + 2 * num_samples
    steps = tiles * ((num_tokens + block_m - 1) // block_m) * group
    most = torch.sym_max(1, (steps + SHORTEST_PIECE - 1) // SHORTEST_PIECE)
    return torch.sym_min(extra, most)  # without asking which it is


def _cut(starts, ends, size, count):
    """Cut ranges into tiles of at most `size` rows: (range, start, end) of `count` tiles, empty ones behind."""
    tiles = (ends - starts + size - 1) // size
    tile_ends = tiles.cumsum(0)
    index = torch.arange(count, device=starts.device)
    owner = torch.searchsorted(tile_ends, index, right=True)
    used = owner < starts.shape[0]
    owner = owner.clamp(max=starts.shape[0] - 1)
    start = starts[owner].to(torch.int64) + (index - (tile_ends - tiles)[owner]) * size
    end = torch.minimum(start + size, ends[owner])
    start = torch.where(used, start, starts[owner])
    return owner, start, torch.where(used, end, start)


def _segment_of(segment_offsets, rows):
    """Index of the segment that holds each row; empty segments hold none."""
    rows = rows.clamp(min=0).to(segment_offsets.dtype)
    return (torch.searchsorted(segment_offsets, rows, right=True) - 1).clamp(max=segment_offsets.shape[0] - 2)


def _over_rows(values, start, end, size):
    """[tiles, size] int64: the values of each tile's rows, the last one's again where there are fewer than `size`."""
    last = torch.maximum(end - 1, start).clamp(max=values.shape[0] - 1)
    rows = torch.minimum(start[:, None] + torch.arange(size, device=values.device), last[:, None])
    return values[rows].to(torch.int64)


def _run(lo, end, full_lo, full_hi, step):
    """(lo, end, first full step, step behind the last full one)."""
    end = torch.maximum(end, lo)
    first = (full_lo - lo + step - 1) // step
    behind = (torch.minimum(full_hi, end) - lo) // step
    return lo, end, first, torch.maximum(first, behind)


def _steps(lo, end, step):
    return (end - lo + step - 1) // step


FAR = 2**32  # beyond every position and window
SEGMENT = 2 * FAR  # keeps segments apart in one sorted sequence


@torch.library.custom_op("yojo::position_extremes", mutates_args=())
def position_extremes(segment_offsets: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Positions made searchable: they need not ascend within a segment, their running extremes do.

    Args:
        segment_offsets, position: as in `Layout`.

    Returns:
        [2, T] int64, ascending: the largest position of the segment up to each row, and the smallest from each row
        on, each plus `SEGMENT` times the number of the segment.
    """
    ends = segment_offsets[1:].to(torch.int64)
    ended = ends.new_zeros(position.shape[0] + 1).scatter_add(0, ends, torch.ones_like(ends))
    keys = torch.add(position, ended.cumsum(0)[:-1], alpha=SEGMENT)
    # cummin is many times slower than cummax on a CPU.
    return torch.stack([keys.cummax(0).values, keys.neg().flip(0).cummax(0).values.flip(0).neg()])


@position_extremes.register_fake
def _(segment_offsets, position):
    return position.new_empty((2, position.shape[0]), dtype=torch.int64)


class _PositionSearch:
    """Finds rows by logical position in segments whose positions need not ascend."""

    def __init__(self, segment_offsets, extremes):
        self.offsets = segment_offsets
        self.ceiling, self.floor = extremes

    def least(self):
        """The smallest position of each segment; of an empty one, anything."""
        segment = torch.arange(self.offsets.shape[0] - 1, device=self.offsets.device)
        return self.floor[self.offsets[:-1].clamp(max=self.floor.shape[0] - 1)] - segment * SEGMENT

    def first_up_to(self, segment, position):
        """The first row of the segment at or above the position: all rows before it are below."""
        return self._search(self.ceiling, segment, position)

    def last_from(self, segment, position):
        """The first row of the segment from which on all are at or above the position."""
        return self._search(self.floor, segment, position)

    def _search(self, keys, segment, position):
        target = segment * SEGMENT + position.clamp(min=-FAR, max=FAR - 1)
        found = torch.searchsorted(keys, target)
        return torch.minimum(torch.maximum(found, self.offsets[segment]), self.offsets[segment + 1])
