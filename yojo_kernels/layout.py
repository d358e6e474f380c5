"""The layout of a packed row: which sample, prompt or branch, and position every token has, and who sees whom."""

import dataclasses
import operator

import torch


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """The lengths behind a layout, in an object of their own: what copies a layout under a compiler need not look in."""

    prompts: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """Where every token of a packed row stands.

    A packed row holds samples end to end; a sample is one prompt followed by its branches. Built by `Layout.build`.

    Attributes:
        sample: [T] int32, the sample each token belongs to, 0, 1, 2, ... in row order.
        branch: [T] int32, the branch of its sample each token belongs to; -1 for the prompt.
        position: [T] int32, logical positions, the ones a sliding window counts in.
        block: [T] int32, bidirectional block of each token, -1 = none; or None where there is no block at all.
        block_span: [4, T] int32, first and last row of the tokens that share segment and block with each token, then
            first and last row of the unbroken run of them that it stands in (the token's own row where it has no
            block); or None where there is no block at all.
        sample_offsets: [S + 1] int32, sample s owns rows sample_offsets[s] to sample_offsets[s + 1].
        prompt_ends: [S] int32, the row behind each prompt.
        segment_offsets: [G + 1] int32, first row of every prompt and branch in row order, then T.
        bounds: [3, T] int32, for each token: first row of its prompt or branch, the row behind it, and the row behind
            the last token that may see it (of its branch; of the whole sample for a prompt's).
        causal: whether no sample has more than one branch and no token a block, so that the mask without a window is
            that of plain causal attention over each sample.
        prompt_lengths: S ints, tokens of each prompt; known without asking the device.
        branch_lengths: S tuples of ints, tokens of each branch; likewise.
    """

    sample: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor
    block: torch.Tensor | None
    block_span: torch.Tensor | None
    sample_offsets: torch.Tensor
    prompt_ends: torch.Tensor
    segment_offsets: torch.Tensor
    bounds: torch.Tensor
    causal: bool
    _lengths: Lengths
    _tables: dict = dataclasses.field(default_factory=dict)  # tile tables made so far, by what they were made for
    _tables_of_pass: dict | None = None  # likewise, where a compiler may look; see `for_one_pass`

    @staticmethod
    @torch.inference_mode(False)  # a layout made while scoring may be trained on
    def build(prompt_lengths, branch_lengths, *, bidirectional=None, positions=None, device=None):
        """Lay samples out end to end: for each sample its prompt, then its branches.

        Args:
            prompt_lengths: S ints >= 0, tokens of each prompt.
            branch_lengths: S lists of ints >= 1, tokens of each branch; an empty list for a prompt alone.
            bidirectional: [T] int32 block ids, -1 = none. Tokens of one sample with the same id >= 0 see each other
                in both directions (as far as prompt and branches allow). None = no blocks.
            positions: [T] integers, logical positions between -2^30 and 2^30. By default a prompt counts 0, 1, 2, ...
                and every branch goes on from the end of its prompt.
            device: where the tensors go; the CPU by default.

        Returns:
            A `Layout` of T = sum of all lengths tokens.

        Raises:
            TypeError: a length that is not an integer, or block ids or positions that are not integers.
            ValueError: a negative prompt length, a branch length below 1, lists of different lengths, no token at
                all, or block ids or positions whose shape is not [T] or that are out of range.

        Example:
            >>> layout = Layout.build([3], [[2, 2]])  # one prompt of 3 tokens, two branches of 2
            >>> layout.num_tokens
            7
            >>> layout.position.tolist()
            [0, 1, 2, 3, 4, 3, 4]
        """
        prompts = tuple(_length(n, "prompt_lengths", 0) for n in _list(prompt_lengths, "prompt_lengths", "integers"))
        branches = tuple(
            tuple(_length(n, "branch_lengths", 1) for n in _list(lengths, "branch_lengths", "lists of integers"))
            for lengths in _list(branch_lengths, "branch_lengths", "lists of integers")
        )
        if len(prompts) != len(branches):
            raise ValueError(
                f"prompt_lengths names {len(prompts)} samples and branch_lengths {len(branches)}: give one list of "
                "branch lengths per prompt (an empty list for none)"
            )
        pieces = []  # (sample, branch, length, first position), in row order
        for s, (prompt, lengths) in enumerate(zip(prompts, branches, strict=True)):
            pieces.append((s, -1, prompt, 0))
            pieces += [(s, b, length, prompt) for b, length in enumerate(lengths)]
        table = torch.tensor(pieces, dtype=torch.int64).reshape(-1, 4)
        lengths = table[:, 2]
        segment_ends = lengths.cumsum(0)
        num_tokens = int(lengths.sum())
        if num_tokens == 0:
            raise ValueError("prompt_lengths and branch_lengths hold no token: a layout needs at least one")
        sample, branch, length, first = table.repeat_interleave(lengths, dim=0).unbind(1)
        starts, ends = (segment_ends - lengths).repeat_interleave(lengths), segment_ends.repeat_interleave(lengths)
        position = first + torch.arange(num_tokens) - starts
        if positions is not None:
            position = _per_token(positions, "positions", num_tokens, -(2**30), 2**30)
        block = None if bidirectional is None else _per_token(bidirectional, "bidirectional", num_tokens, -1, 2**31 - 1)
        if block is not None and not (block >= 0).any():
            block = None
        segment_offsets = torch.cat([segment_ends.new_zeros(1), segment_ends])
        prompts_at = (table[:, 1] < 0).nonzero()[:, 0]
        sample_ends = segment_ends[torch.cat([prompts_at[1:] - 1, prompts_at.new_tensor([len(pieces) - 1])])]
        layout = Layout(
            sample=sample.to(torch.int32),
            branch=branch.to(torch.int32),
            position=position.to(torch.int32),
            block=None if block is None else block.to(torch.int32),
            block_span=None if block is None else _block_spans(block, lengths).to(torch.int32),
            sample_offsets=torch.cat([sample_ends.new_zeros(1), sample_ends]).to(torch.int32),
            prompt_ends=segment_ends[prompts_at].to(torch.int32),
            segment_offsets=segment_offsets.to(torch.int32),
            bounds=torch.stack([starts, ends, torch.where(branch < 0, sample_ends[sample], ends)]).to(torch.int32),
            causal=block is None and max(map(len, branches)) <= 1,
            _lengths=Lengths(prompts, branches),
        )
        return layout if device is None else layout.to(device)

    @property
    def prompt_lengths(self):
        return self._lengths.prompts

    @property
    def branch_lengths(self):
        return self._lengths.branches

    @property
    def num_tokens(self):
        """T, the tokens of the row."""
        return self.sample.shape[0]

    @property
    def num_samples(self):
        """S, the samples of the row."""
        return len(self.prompt_lengths)

    @property
    def device(self):
        """Where the tensors lie."""
        return self.sample.device

    def sample_spans(self):
        """The rows of each sample: S pairs (start, stop), known without asking the device."""
        spans, start = [], 0
        for prompt, branches in zip(self.prompt_lengths, self.branch_lengths, strict=True):
            stop = start + prompt + sum(branches)
            spans.append((start, stop))
            start = stop
        return spans

    def visible(self, window=None, span=None):
        """The mask rule: which keys each query sees.

        Query q sees key k exactly when both belong to the same sample; k is in the prompt or in q's branch; k does
        not come after q, or both are in the same bidirectional block; and, with a sliding window,
        position(q) - position(k) < window.

        Args:
            window: sliding window in logical positions, at least 1, or None.
            span: (start, stop), rows to look at instead of the whole row.

        Returns:
            [T, T] bool, queries down, keys across; [stop - start, stop - start] with a span.
        """
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, or None for no window, got {window}")
        rows = slice(*span) if span is not None else slice(0, self.num_tokens)
        sample, branch, position = self.sample[rows], self.branch[rows], self.position[rows]
        queries = torch.arange(sample.shape[0], device=sample.device)
        return visible_to(queries, sample, branch, position, None if self.block is None else self.block[rows], window)

    def to(self, device, non_blocking=False):
        """The same layout on another device (itself if it is there already)."""
        device = torch.device(device)
        if self.device == device:
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """The same layout in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def plot(self, path, block_m=128, block_n=64, window=None):
        """Draw the mask and the tiles that the attention kernel makes of it: full, border and skipped.

        Args:
            path: file to write; its ending says the format (.png, .svg, ...).
            block_m: queries of a tile, at least 1; the kernel's own on a Hopper GPU by default.
            block_n: keys of a tile, at least 1.
            window: sliding window in logical positions, at least 1, or None.

        Rows of more than 1,500 tokens are drawn by 1,500 of them. Needs matplotlib (ImportError without it).

        Example:
            >>> Layout.build([40], [[20, 30]]).plot("layout.png", block_m=16, block_n=16)
        """
        from yojo_kernels.picture import plot

        for name, size in (("block_m", block_m), ("block_n", block_n), ("window", 1 if window is None else window)):
            if not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        plot(self, path, block_m, block_n, window)

    def for_one_pass(self):
        """The same layout for one pass through a model, whose layers then share their tables under a compiler too.

        A graph must not depend on which tables a layout happens to hold, so a compiled call makes its own. Within one
        pass it may: the first layer makes them, all others find them, and nobody else ever sees them.
        """
        return dataclasses.replace(self, _tables_of_pass={})

    def query_tiles(self, block_m, block_n, window=None):
        """The table of query tiles (see `query_tiles` below), made on first use and kept."""
        return self._tiles("query_tiles", (block_m, block_n, window or 0))

    def key_tiles(self, block_m, block_n, extra, window=None):
        """The tables of key tiles and of reductions (see `key_tiles` below), made on first use and kept."""
        return self._tiles("key_tiles", (block_m, block_n, extra, window or 0))

    def _tiles(self, name, settings):
        extremes = None
        if settings[-1]:  # a window
            extremes = self._kept("position_extremes", (self.segment_offsets, self.position), ())
        fields = self.sample_offsets, self.prompt_ends, self.segment_offsets, self.position, self.block_span, extremes
        return self._kept(name, fields, settings)

    def _kept(self, name, tensors, settings):
        make, key = getattr(torch.ops.yojo, name), (name, settings)
        if torch.compiler.is_compiling():
            if self._tables_of_pass is None:
                return make(*tensors, *settings)
            if key not in self._tables_of_pass:
                self._tables_of_pass[key] = make(*tensors, *settings)
            return self._tables_of_pass[key]
        if key in self._tables:
            return self._tables[key]
        # What a CUDA graph makes holds nothing before the graph is replayed, and lies in memory that is the graph's own.
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        tables = self._tables if not capturing else {} if self._tables_of_pass is None else self._tables_of_pass
        if key not in tables:
            with torch.inference_mode(False):  # scoring may make what training will save for backward
                tables[key] = make(*tensors, *settings)
        return tables[key]

    def _map(self, function):
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._map(function)
        tensors = {
            field.name: function(value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        tables = {
            name: function(table) if isinstance(table, torch.Tensor) else tuple(map(function, table))
            for name, table in self._tables.items()
        }
        return dataclasses.replace(self, **tensors, _tables=tables)

    def __repr__(self):
        branches = sum(map(len, self.branch_lengths))
        return f"Layout({self.num_tokens} tokens, {self.num_samples} samples, {branches} branches, {self.device})"


def visible_to(queries, sample, branch, position, block, window):
    """[Q, T] bool: which of T tokens each of the queries (rows among them, [Q]) sees; see `Layout.visible`."""
    rows = torch.arange(sample.shape[0], device=sample.device)
    visible = queries[:, None] >= rows[None, :]
    if block is not None:
        visible = visible | ((block[queries][:, None] == block[None, :]) & (block[None, :] >= 0))
    visible = visible & (sample[queries][:, None] == sample[None, :])
    visible = visible & ((branch[None, :] < 0) | (branch[queries][:, None] == branch[None, :]))
    if window:
        visible = visible & (position[queries][:, None] - position[None, :] < window)
    return visible


def _length(value, name, least):
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must hold integers, got {value!r} of type {type(value).__name__}") from None
    if value < least:
        raise ValueError(f"{name} must hold integers >= {least}, got {value}")
    return value


def _list(values, name, of_what):
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{name} must be a list of {of_what}, got {values!r} of type {type(values).__name__}") from None


def _per_token(values, name, num_tokens, least, most):
    try:
        values = torch.as_tensor(values).detach().cpu()
    except (RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must hold integers: {error}") from None
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {values.dtype}")
    if values.shape != (num_tokens,):
        raise ValueError(
            f"{name} must have shape [{num_tokens}], one entry per token of the row, got {list(values.shape)}"
        )
    lowest, highest = int(values.min()), int(values.max())
    if lowest < least or highest > most:
        raise ValueError(f"{name} must lie between {least} and {most}, got {lowest if lowest < least else highest}")
    return values.to(torch.int64)


def _block_spans(block, segment_lengths):
    """[4, T]: first and last row of the tokens with each token's segment and block, and of the run it stands in."""
    rows = torch.arange(len(block))
    segment = torch.arange(len(segment_lengths)).repeat_interleave(segment_lengths)
    own = torch.where(block >= 0, block.to(torch.int64), 0)
    # Tokens without a block are groups of their own, behind all blocks.
    group = torch.where(block >= 0, segment * (own.max() + 1) + own, len(segment_lengths) * (own.max() + 1) + rows)
    _, group = group.unique(return_inverse=True)
    first = torch.full_like(rows, len(block)).scatter_reduce(0, group, rows, "amin")
    last = torch.full_like(rows, -1).scatter_reduce(0, group, rows, "amax")
    run_starts = torch.ones_like(block, dtype=torch.bool)
    run_starts[1:] = group[1:] != group[:-1]
    run = run_starts.cumsum(0) - 1
    run_start = run_starts.nonzero()[:, 0]
    run_last = torch.cat([run_start[1:], run_start.new_tensor([len(block)])]) - 1
    return torch.stack([first[group], last[group], run_start[run], run_last[run]])


# ---- tile tables ----
#
# A kernel's program owns one tile of rows and walks over at most two runs of the other side. Tables say which, as int32
# rows; they are made with tensor operations alone, in the device's memory or the host's, without ever asking a device
# for a value. Their sizes are upper bounds from shapes; the rows beyond what is needed describe empty tiles.
#
# A run is (lo, end, full_lo, full_hi): steps lo, lo + STEP, ... below end, of which those numbered full_lo to full_hi
# lie wholly inside the run and are visible as a whole (no mask is needed); all others are border steps.

QUERY_COLUMNS = 10
KEY_COLUMNS = 9
SHORTEST_PIECE = 16  # steps below which a key tile's queries are not split further


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
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles of at most `block_n` keys of one prompt, or of one sample's branches, and the queries that see them.

    Every response listens to the prompt, whose keys would keep a few programs busy long after all others are done:
    the queries of a tile with more than its share of the steps are split into pieces, each an item of its own, whose
    sums are added up afterwards in a fixed order.

    Args:
        sample_offsets, prompt_ends, segment_offsets, position, block_span: as in `Layout`.
        position_extremes: what the operator of that name makes; None where there is no window.
        block_m: queries of a step.
        block_n: keys of a tile.
        extra: a piece is at most 1 / extra of all steps (and never fewer than `SHORTEST_PIECE` steps).
        window: sliding window, 0 for none.

    Returns:
        items: [T // block_n + 2 S + extra, 9] int32, heaviest first: start and end of the tile's keys (equal: an
            empty item), the run of queries, first and last step of this piece, and the slot of its sums, -1 where
            the tile is in one piece.
        sums: [extra, 4] int32: start and end of a split tile's keys, its first slot and its number of pieces.
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

    steps = _steps(table[:, 2], table[:, 3], block_m)
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
      window):  # fmt: skip
    tiles = position.shape[0] // block_n + 2 * prompt_ends.shape[0]
    return (
        position.new_empty((tiles + extra, KEY_COLUMNS), dtype=torch.int32),
        position.new_empty((extra, 4), dtype=torch.int32),
    )


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
