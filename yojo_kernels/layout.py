"""The layout of a packed row: which sample, prompt or branch, and position every token has, and who sees whom."""

import dataclasses
import operator

import torch


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Layout:
    """Where every token of a packed row stands.

    A packed row holds samples end to end; a sample is one prompt followed by its branches. Built by `Layout.build`.

    Attributes:
        sample: [T] int32, the sample each token belongs to, 0, 1, 2, ... in row order.
        branch: [T] int32, the branch of its sample each token belongs to; -1 for the prompt.
        position: [T] int32, logical positions, the ones a sliding window counts in.
        block: [T] int32, bidirectional block of each token, -1 = none; or None where there is no block at all.
        prompt_lengths: S ints, tokens of each prompt.
        branch_lengths: S tuples of ints, tokens of each branch.
    """

    sample: torch.Tensor
    branch: torch.Tensor
    position: torch.Tensor
    block: torch.Tensor | None
    prompt_lengths: tuple[int, ...]
    branch_lengths: tuple[tuple[int, ...], ...]

    @staticmethod
    def build(prompt_lengths, branch_lengths, *, bidirectional=None, positions=None, device=None):
        """Lay samples out end to end: for each sample its prompt, then its branches.

        Args:
            prompt_lengths: S ints >= 0, tokens of each prompt.
            branch_lengths: S lists of ints >= 1, tokens of each branch; an empty list for a prompt alone.
            bidirectional: [T] int32 block ids, -1 = none. Tokens of one sample with the same id >= 0 see each other
                in both directions (as far as prompt and branches allow). None = no blocks.
            positions: [T] integers, logical positions. By default a prompt counts 0, 1, 2, ... and every branch goes
                on from the end of its prompt.
            device: where the tensors go; the CPU by default.

        Returns:
            A `Layout` of T = sum of all lengths tokens.

        Raises:
            TypeError: a length that is not an integer, or block ids or positions that are not integers.
            ValueError: a negative prompt length, a branch length below 1, lists of different lengths, no token at
                all, or block ids or positions whose shape is not [T].

        Example:
            >>> layout = Layout.build([3], [[2, 2]])  # one prompt of 3 tokens, two branches of 2
            >>> layout.num_tokens
            7
            >>> layout.position.tolist()
            [0, 1, 2, 3, 4, 3, 4]
        """
        prompts = tuple(_length(n, "prompt_lengths", 0) for n in prompt_lengths)
        branches = tuple(tuple(_length(n, "branch_lengths", 1) for n in lengths) for lengths in branch_lengths)
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
        num_tokens = int(lengths.sum())
        if num_tokens == 0:
            raise ValueError("prompt_lengths and branch_lengths hold no token: a layout needs at least one")
        sample, branch, length, first = table.repeat_interleave(lengths, dim=0).unbind(1)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        position = first + torch.arange(num_tokens) - starts
        if positions is not None:
            position = _per_token(positions, "positions", num_tokens)
        block = None if bidirectional is None else _per_token(bidirectional, "bidirectional", num_tokens)
        if block is not None and not (block >= 0).any():
            block = None
        layout = Layout(
            sample=sample.to(torch.int32),
            branch=branch.to(torch.int32),
            position=position.to(torch.int32),
            block=None if block is None else block.to(torch.int32),
            prompt_lengths=prompts,
            branch_lengths=branches,
        )
        return layout if device is None else layout.to(device)

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
        start, stop = span if span is not None else (0, self.num_tokens)
        sample, branch, position = self.sample[start:stop], self.branch[start:stop], self.position[start:stop]
        row = torch.arange(sample.shape[0], device=sample.device)
        visible = row[:, None] >= row[None, :]
        if self.block is not None:
            block = self.block[start:stop]
            visible = visible | ((block[:, None] == block[None, :]) & (block[:, None] >= 0))
        visible = visible & (sample[:, None] == sample[None, :])
        visible = visible & ((branch[None, :] < 0) | (branch[:, None] == branch[None, :]))
        if window is not None:
            visible = visible & (position[:, None] - position[None, :] < window)
        return visible

    def to(self, device, non_blocking=False):
        """The same layout on another device (itself if it is there already)."""
        device = torch.device(device)
        if self.device == device:
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """The same layout in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function):
        tensors = {
            name: None if (tensor := getattr(self, name)) is None else function(tensor)
            for name in ("sample", "branch", "position", "block")
        }
        return dataclasses.replace(self, **tensors)

    def __repr__(self):
        branches = sum(map(len, self.branch_lengths))
        return f"Layout({self.num_tokens} tokens, {self.num_samples} samples, {branches} branches, {self.device})"


def _length(value, name, least):
    try:
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must hold integers, got {value!r} of type {type(value).__name__}") from None
    if value < least:
        raise ValueError(f"{name} must hold integers >= {least}, got {value}")
    return value


def _per_token(values, name, num_tokens):
    values = torch.as_tensor(values).detach().cpu()
    if values.dtype.is_floating_point or values.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {values.dtype}")
    if values.shape != (num_tokens,):
        raise ValueError(
            f"{name} must have shape [{num_tokens}], one entry per token of the row, got {list(values.shape)}"
        )
    return values
