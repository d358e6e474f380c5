"""Multi-response attention through torch's scaled_dot_product_attention, prompt and branches apart: what runs on CPUs.

The reference makes the scores of every query and every key of a sample, those of the pairs that nobody sees among them.
Here a prompt attends to itself, and the branches of a sample, filled up to the longest, to the prompt and themselves: one
call each, in which torch's own kernel never makes the scores as a whole.
"""

import torch
import torch.nn.functional as F

from yojo_kernels.layout import visible_to

GATHER_BYTES = 64 * 2**20  # of keys and values that are put behind each other for the branches of one call


def takes(call):
    """Whether an `AttentionCall` can run here: it wants no log-sum-exp and has no soft cap.

    Under torch.compile nothing in the graph may depend on how long each segment is: there it is the reference.
    """
    return call.device.type == "cpu" and not (call.lse or call.softcap or torch.compiler.is_compiling())


def multi_response_attention(query, key, value, layout, *, scale, window=None, softcap=None):
    """As `yojo_kernels.multi_response_attention`, whose checked arguments it takes; returns (output, None)."""
    if scale < 0:  # torch's kernel looks for the largest score before it scales
        query, scale = -query, -scale
    pieces = []
    for (start, stop), prompt, lengths in zip(
        layout.sample_spans(), layout.prompt_lengths, layout.branch_lengths, strict=True
    ):
        cuts = window is not None and _extent(layout.position[start:stop]) >= window
        window_here = window if cuts else None
        end = start + prompt
        prompt_is_causal, branches_are_causal = (
            window_here is None and not _has_blocks(layout, *span) for span in ((start, end), (end, stop))
        )
        if prompt_is_causal and branches_are_causal and len(lengths) <= 1:
            prompt, lengths, end = stop - start, (), stop  # all of it is causal as it stands
        if prompt:
            rows = slice(start, end)
            visible = None if prompt_is_causal else layout.visible(window_here, span=(start, end))
            pieces.append(_attend(query[rows][None], key[rows][None], value[rows][None], visible, scale)[0])
        masked = None if branches_are_causal else (window_here,)
        pieces += _branches(query, key, value, layout, start, prompt, lengths, masked, scale)
    return (torch.cat(pieces) if pieces else torch.zeros_like(query)), None


def _has_blocks(layout, start, stop):
    return layout.block is not None and bool((layout.block[start:stop] >= 0).any())


def _extent(position):
    """How far the logical positions of some tokens lie apart."""
    return int(position.max() - position.min()) if len(position) else 0


def _branches(query, key, value, layout, start, prompt, lengths, masked, scale):
    """Outputs of the branches of a sample, a list of [tokens, Hq, D]; `masked`: (window,) where a mask is to be made."""
    lengths = torch.tensor([length for length in lengths if length], dtype=torch.int64)
    starts = start + prompt + lengths.cumsum(0) - lengths
    shared = torch.arange(start, start + prompt)
    outputs, first = [], 0
    while first < len(lengths):
        longest = int(lengths[first:].max())
        size = 2 * (prompt + longest) * key.shape[1] * key.shape[2] * key.element_size()
        some = slice(first, first + max(1, GATHER_BYTES // size))
        first = some.stop
        longest = int(lengths[some].max())
        place = torch.arange(longest)
        is_there = place < lengths[some, None]  # [B, R]
        own = starts[some, None] + torch.minimum(place, lengths[some, None] - 1)  # [B, R]; the last one fills up
        keys = torch.cat([shared.expand(len(own), -1), own], dim=1)  # [B, P + R]
        if masked is None:
            # What fills up comes behind every token that is there.
            visible = torch.ones(longest, prompt + longest, dtype=torch.bool).tril(prompt)
        else:
            visible = _visible(layout, start, own, keys, masked[0])
            visible = (visible & torch.cat([is_there.new_ones(len(own), prompt), is_there], dim=1)[:, None])[:, None]
        output = _attend(query[own], key[keys], value[keys], visible, scale)
        outputs.append(output.flatten(0, 1) if bool(is_there.all()) else output[is_there])
    return outputs


def _attend(query, key, value, visible, scale):
    """[B, R, Hq, D] for query [B, R, Hq, D] and key, value [B, K, Hkv, D]; visible: mask, or None for causal."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


def _visible(layout, start, own, keys, window):
    """[B, R, P + R] bool: which of its branch's keys each query of a sample that starts at `start` sees."""
    sample = slice(start, int(own.max()) + 1)
    ids = (layout.sample, layout.branch, layout.position, layout.block)
    tokens = [None if one is None else one[sample] for one in ids]
    seen = visible_to(own.flatten() - start, *tokens, window)
    return seen.view(*own.shape, -1).gather(2, (keys - start)[:, None].expand(-1, own.shape[1], -1))
