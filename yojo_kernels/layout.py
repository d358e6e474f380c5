"""The layout of a packed row: which sample, prompt or branch, and position every token has, and who sees whom."""

import dataclasses
import operator

import torch

from yojo_kernels import tiles  # noqa: F401 - registers the operators that make the tables

ALL_FIELDS = "fields"
ALIGNED = 4  # entries of int32: 16 bytes


def _of_one(name):
    """A property: a dict that an object keeps beside its fields."""
    return property(lambda self: self.__dict__.setdefault(name, {}))


@dataclasses.dataclass(frozen=True, eq=False)
class Lengths:
    """The lengths behind a layout, in an object of their own: what copies a layout under a compiler need not look in."""

    prompts: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """Where every token of a packed row stands.

    A packed row holds samples end to end; a sample is one prompt followed by its branches. Built by `Layout.build`. It keeps
    the tables of tiles that are made for it, on the CUDA stream of the call that asks first: a call on another stream must
    come behind that one.

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
    _tables_of_pass: dict | None = None  # tile tables, where a compiler may look; see `for_one_pass`

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

    # What belongs to one object alone: none that is made from it, whoever replaces fields, has it.
    _tables = _of_one("tables")  # tile tables made so far, by what they were made for
    _made = _of_one("made")  # what was made on a GPU, a table or `ALL_FIELDS` -> (raw stream, event) it is there behind
    _plans = _of_one("plans")  # of `segments`: which calls the row takes on a CPU
    _twins = _of_one("twins")  # the layout on other devices, by device

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
        return self.visible_among(slice(*span) if span is not None else slice(0, self.num_tokens), window)

    def visible_among(self, rows, window=None):
        """`visible` for some rows alone, a slice or [P] int64 in ascending order -> [P, P] bool."""
        sample, branch, position = self.sample[rows], self.branch[rows], self.position[rows]
        queries = torch.arange(sample.shape[0], device=sample.device)
        return visible_to(queries, sample, branch, position, None if self.block is None else self.block[rows], window)

    def to(self, device, non_blocking=False):
        """The same layout on another device (itself if it is there already).

        Asked again, it gives the same object: where the layers of a model are spread over devices, each of them has the
        layout moved to its own, and all layers of a device share what it was moved for and the tables made there.

        Args:
            device: a torch device, or its name.
            non_blocking: do not wait for the copies, as for `torch.Tensor.to`.

        Returns:
            `Layout`.
        """
        device = torch.device(device)
        if self.device == device:
            return self
        move = lambda tensor: tensor.to(device, non_blocking=non_blocking)  # noqa: E731
        if torch.compiler.is_compiling() or device.index is None and device.type not in ("cpu", "meta"):
            return self._map(move)  # which device that is may change from call to call
        if device in self._twins:
            self._twins[device]._wait_for(ALL_FIELDS)
            return self._twins[device]
        twin = self._map(move)
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return twin  # what a CUDA graph makes is there only where it is replayed
            for key in (*twin._tables, ALL_FIELDS):
                twin._mark(key)
        self._twins[device] = twin
        return twin

    def pin_memory(self):
        """The same layout in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def plot(self, path, block_m=128, block_n=64, window=None):
        """Draw the mask and the tiles that the attention kernel makes of it: full, border and skipped.

        Args:
            path: file to write; its ending says the format (.png, .svg, ...).
            block_m: tokens of a tile, at least 1. On a Hopper GPU the kernel's own, at head dim 128, are 128 divided by
                the query heads that share a key head, with 128 keys.
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

    def for_one_pass(self, tables=()):
        """The same layout for one pass through a model, whose layers then share their tables under a compiler too.

        A graph must not depend on which tables a layout happens to hold, so a compiled call makes its own. Within one
        pass it may: the first layer makes them, all others find them, and nobody else ever sees them.

        Args:
            tables: which tables to make at once, as `tables_of_pass` of an earlier pass has them. Where each layer is
                compiled by itself, the first one then finds them like all others and needs no graph of its own.
        """
        layout = self.sharing_tables(_tables_of_pass={})
        for name, settings in tables:
            layout._tiles(name, settings)
        return layout

    def sharing_tables(self, **fields):
        """With other fields, none of which a table or plan is made from: each of the two has what the other makes."""
        layout = dataclasses.replace(self, **fields)
        if not torch.compiler.is_compiling():  # there tables are made anew, see `for_one_pass`
            layout.__dict__.update(tables=self._tables, made=self._made, plans=self._plans)
        return layout

    @property
    def tables_of_pass(self):
        """Names and settings of the tables that the layers asked for since `for_one_pass`."""
        return tuple(key for key in self._tables_of_pass or () if key[1])  # not what tables are made from

    def query_tiles(self, block_m, block_n, window=None):
        """The table of query tiles (see `yojo_kernels.tiles.query_tiles`), made on first use and kept."""
        return self._tiles("query_tiles", (block_m, block_n, window or 0))

    def key_tiles(self, block_m, block_n, extra, window=None, group=1):
        """The tables of key tiles and of reductions (see `yojo_kernels.tiles.key_tiles`), made on first use and kept."""
        return self._tiles("key_tiles", (block_m, block_n, extra, group, window or 0))

    def table(self, key):
        """The table that a key of `yojo_kernels.tables.tables_for` names, made on first use and kept."""
        return self._tiles(*key)

    def make_tables(self, keys):
        """Make tables before they are asked for: on the CPU, whence they go to a device with the layout."""
        for key in keys:
            self.table(key)
        for known in (self._tables, self._made):  # larger than the tables, for which alone it is needed
            known.pop(("position_extremes", ()), None)

    def _tiles(self, name, settings):
        known, key = self._tables_of_pass, (name, settings)
        if torch.compiler.is_compiling():
            if known is not None and key in known:
                return known[key]  # a graph that does without what the table was made from
        elif key in self._tables:
            self._wait_for(key)
            if known is not None:
                known[key] = self._tables[key]
            return self._tables[key]
        extremes = None
        if settings[-1]:  # a window
            self._wait_for(("position_extremes", ()))
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
        # What a CUDA graph makes holds nothing before the graph is replayed, and lies in memory that is the graph's own.
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        of_pass = {} if self._tables_of_pass is None else self._tables_of_pass
        tables = self._tables if key in self._tables or not capturing else of_pass
        if key not in tables:
            with torch.inference_mode(False):  # scoring may make what training will save for backward
                tables[key] = make(*tensors, *settings)
            if self.device.type == "cuda" and not capturing:
                self._mark(key)
        if settings:
            of_pass[key] = tables[key]
        return tables[key]

    def _mark(self, key):
        """Note that a table, or all fields, are being made on the current stream."""
        stream = torch.cuda.current_stream(self.device)
        self._made[key] = stream.cuda_stream, stream.record_event()

    def _wait_for(self, key):
        """Have the current stream wait for a table, or all fields, that were made on another one.

        Within a CUDA graph there is nothing to wait for: its capture begins with nothing left to do on any stream.
        """
        if torch.compiler.is_compiling() or key not in self._made:
            return
        made_on, event = self._made[key]
        if torch._C._cuda_getCurrentRawStream(self.device.index) == made_on or torch.cuda.is_current_stream_capturing():
            return
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        made = self._fields().values() if key == ALL_FIELDS else self._tables[key]
        for tensor in (made,) if isinstance(made, torch.Tensor) else made:
            tensor.record_stream(stream)  # its memory is not given to others while this stream reads it

    def _fields(self):
        """The tensors among the fields, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def __getstate__(self):
        state = self.__dict__ | {
            "tables": dict(self._tables),
            "made": {},
            "plans": {},
            "twins": {},
            "whole": (None, {}),
        }
        if self.__dict__.get("whole", (None,))[0] is None:
            return state
        # Views of one buffer would each be written with all of it.
        for key, table in self._tables.items():
            whole = isinstance(table, torch.Tensor)
            state["tables"][key] = table.clone() if whole else tuple(part.clone() for part in table)
        return state | {name: tensor.clone() for name, tensor in self._fields().items()}

    def _map(self, function):
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._map(function)
        of_pass = None if self._tables_of_pass is None else {}  # those made so far lie where the layout was
        if torch.compiler.is_compiling():
            return self._with(function, of_pass)
        for key in self._made:
            self._wait_for(key)
        whole, places = self._whole()
        moved, views = function(whole), {}
        for name, (tensor, start) in places.items():
            size = tensor.numel() * tensor.itemsize // whole.itemsize
            views[name] = moved[start : start + size].view(tensor.dtype).view(tensor.shape)
        fields = {name: views[ALL_FIELDS, name] for name in self._fields()}
        layout = dataclasses.replace(self, **fields, _tables_of_pass=of_pass)
        for key, table in self._tables.items():
            layout._tables[key] = (
                views[key, 0] if isinstance(table, torch.Tensor) else tuple(views[key, i] for i in range(len(table)))
            )
        # What is pinned is moved next, as it stands.
        layout.__dict__["whole"] = moved, {name: (views[name], start) for name, (_, start) in places.items()}
        return layout

    def _whole(self):
        """All fields and tables in one tensor, so that one copy moves them.

        Returns:
            The tensor [n] int32; and a dict, what lies there -> (the field or table, where it begins). Each begins at a
            multiple of 16 bytes, as tensors do that are made alone: kernels are compiled for pointers like that.
        """
        tensors = {(ALL_FIELDS, name): tensor for name, tensor in self._fields().items()}
        for key, table in self._tables.items():
            parts = (table,) if isinstance(table, torch.Tensor) else table
            tensors |= {(key, i): tensor for i, tensor in enumerate(parts)}
        whole, places = self.__dict__.get("whole", (None, {}))
        if places.keys() == tensors.keys() and all(places[name][0] is tensor for name, tensor in tensors.items()):
            return whole, places
        # A compiler takes two numbers for one where they agree in the first row: nothing begins where a size ends, at T
        # or before.
        end = self.num_tokens + -self.num_tokens % ALIGNED + ALIGNED
        places, pieces = {}, [self.position.new_zeros(end)]
        for name, tensor in tensors.items():
            entries = tensor.reshape(-1).view(torch.int32)  # some are of 64 bits
            gap = -len(entries) % ALIGNED
            pieces += [entries, entries.new_zeros(gap)]
            places[name] = tensor, end
            end += len(entries) + gap
        return torch.cat(pieces), places

    def _with(self, function, of_pass=None):
        """With a function of every field that is a tensor in its place; no tables but those of a pass that are given."""
        tensors = {name: function(tensor) for name, tensor in self._fields().items()}
        return dataclasses.replace(self, **tensors, _tables_of_pass=of_pass)

    def __repr__(self):
        branches = sum(map(len, self.branch_lengths))
        return f"Layout({self.num_tokens} tokens, {self.num_samples} samples, {branches} branches, {self.device})"


def fits(query, key, value, layout):
    """Whether query [T, Hq, D], key and value [T, Hkv, D] are as a layout wants them, in as few steps as it takes to know."""
    if not (
        isinstance(query, torch.Tensor)
        and isinstance(key, torch.Tensor)
        and isinstance(value, torch.Tensor)
        and isinstance(layout, Layout)
    ):
        return False
    shape, key_shape, dtype, device = query.shape, key.shape, query.dtype, query.device
    return (
        dtype.is_floating_point
        and key.dtype == dtype == value.dtype
        and key.device == device == value.device
        and layout.device == device
        and len(shape) == 3 == len(key_shape)
        and value.shape == key_shape
        and layout.num_tokens == shape[0] == key_shape[0]
        and shape[2] == key_shape[2] != 0 != key_shape[1]
        and shape[1] % key_shape[1] == 0
    )


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


def count_visible(prompt, branches, window=None, blocks=()):
    """How many (query, key) pairs one sample has, in closed form.

    Args:
        prompt: tokens of the prompt.
        branches: tokens of each branch.
        window: sliding window in the default positions, or None.
        blocks: sizes of the bidirectional blocks, each inside the prompt (or inside one branch).

    Returns:
        int, the same as `Layout.visible(window).sum()`.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None for no window, got {window}")
    # The query at position p sees the p + 1 keys up to itself, or the window's last ones. Keys of a block that come
    # after their query have larger positions, which no window cuts off.
    pairs = _sum_of_keys(prompt, window)
    for length in branches:
        pairs += _sum_of_keys(prompt + length, window) - _sum_of_keys(prompt, window)
    return pairs + sum(size * (size - 1) // 2 for size in blocks)


def _sum_of_keys(length, window):
    """Sum over positions 0 ... length - 1 of min(position + 1, window)."""
    ramp = length if window is None else min(length, window)
    return ramp * (ramp + 1) // 2 + (length - ramp) * (window or 0)


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
