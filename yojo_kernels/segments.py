"""Multi-response attention through torch's scaled_dot_product_attention, prompt and branches apart: what runs on CPUs.

The reference makes the scores of every query and every key of a sample, those of the pairs that nobody sees among them.
Here a prompt attends to itself, and the branches of a sample, filled up to the longest, to the prompt and themselves: one
call each, in which torch's own kernel never makes the scores as a whole. There is no second derivative.

Torch's kernel multiplies what is not seen with 0, which makes NaN of what is not finite: a sample that holds such tokens
is computed by the reference, and such gradients of outputs are kept apart from the others.
"""

import itertools

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from yojo_kernels import reference
from yojo_kernels.layout import visible_to

GATHER_BYTES = 64 * 2**20  # of keys and values that are put behind each other for the branches of one call


def takes(call):
    """Whether an `AttentionCall` can run here: it wants no log-sum-exp and has no soft cap.

    Under torch.compile nothing in the graph may depend on how long each segment is: there it is the reference.
    """
    return call.device.type == "cpu" and not (call.lse or call.softcap or torch.compiler.is_compiling())


def multi_response_attention(query, key, value, layout, *, scale, window=None, softcap=None):
    """As `yojo_kernels.multi_response_attention`, whose checked arguments it takes; returns (output, None)."""
    query, scale = with_positive_scale(query, scale)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        query, key, value, link = _Inputs.apply(query, key, value, layout, window)
        output, _ = _forward(query, key, value, layout, scale, window)
        return _Outputs.apply(output, link), None
    return _forward(query, key, value, layout, scale, window)


def _forward(query, key, value, layout, scale, window):
    pieces = []
    for number, ((start, stop), prompt, lengths) in enumerate(
        zip(layout.sample_spans(), layout.prompt_lengths, layout.branch_lengths, strict=True)
    ):
        whole = slice(start, stop)
        if not all(_is_finite(tensor[whole]) for tensor in (query, key, value)):
            rows, counts = torch.arange(start, stop), [0] * layout.num_samples
            counts[number] = stop - start
            output, _ = reference.attention_of_rows(
                query[whole], key, value, layout, rows, counts, scale=scale, window=window
            )
            pieces.append(output)
            continue
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


def with_positive_scale(query, scale):
    """The same scores with a scale above 0: torch's kernels look for the largest score, and mask, before they scale."""
    if scale > 0:
        return query, scale
    return (-query, -scale) if scale else (query * 0.0, 1.0)


def _is_finite(tensor):
    """Whether all entries are; False also where their sum is beyond float32, which costs time alone."""
    return bool(tensor.sum(dtype=reference.accumulation_dtype(tensor.dtype)).isfinite())


class _Inputs(torch.autograd.Function):
    """Hands on query, key and value; in the backward, puts NaN where a gradient of outputs that is not finite leads.

    `_Outputs` has taken those gradients out, and says which they were: as the gradient of `link` [T, Hq].
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, window):
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.window = layout, window
        return query, key, value, query.new_zeros(query.shape[:2])

    @staticmethod
    def backward(ctx, grad_query, grad_key, grad_value, broken):
        if broken is None:
            return grad_query, grad_key, grad_value, None, None
        asked = broken.unflatten(1, (grad_key.shape[1], -1)).amax(dim=2)  # [T, Hkv], of a group of query heads
        heard = torch.cat(
            [
                ctx.layout.visible(ctx.window, span=span).t().to(asked.dtype) @ asked[slice(*span)]
                for span in ctx.layout.sample_spans()
            ]
        )
        nan = float("nan")
        grad_key, grad_value = (grad.masked_fill(heard[..., None] > 0, nan) for grad in (grad_key, grad_value))
        return grad_query.masked_fill(broken[..., None] > 0, nan), grad_key, grad_value, None, None


class _Outputs(torch.autograd.Function):
    """Hands on the output; in the backward, rows of gradients that are not finite are 0, and `_Inputs` is told."""

    @staticmethod
    def forward(ctx, output, link):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        if _is_finite(gradient):
            return gradient, None
        broken = ~gradient.isfinite().all(dim=-1)  # [T, Hq]
        return gradient.masked_fill(broken[..., None], 0.0), broken.to(gradient.dtype)


def _has_blocks(layout, start, stop):
    return layout.block is not None and bool((layout.block[start:stop] >= 0).any())


def _extent(position):
    """How far the logical positions of some tokens lie apart."""
    return int(position.max() - position.min()) if len(position) else 0


def _branches(query, key, value, layout, start, prompt, lengths, masked, scale):
    """Outputs of the branches of a sample, a list of [tokens, Hq, D]; `masked`: (window,) where a mask is to be made."""
    stops = list(itertools.accumulate(lengths, initial=start + prompt))
    rows = [slice(first, stop) for first, stop in itertools.pairwise(stops) if stop > first]
    shared = slice(start, start + prompt)
    outputs = [None] * len(rows)
    for group in _groups(rows, prompt, 2 * key.shape[1] * key.shape[2] * key.element_size()):
        own = [_filled(tensor, [rows[n] for n in group]) for tensor in (query, key, value)]
        # The prompt is taken once for all: its gradients are summed in a fixed order, whatever the number of threads.
        keys, values = (
            torch.cat([tensor[shared].expand(len(group), -1, -1, -1), filled], dim=1)
            for tensor, filled in zip((key, value), own[1:], strict=True)
        )
        longest = own[0].shape[1]
        if masked is None:
            # What fills up comes behind every token that is there.
            visible = torch.ones(longest, prompt + longest, dtype=torch.bool).tril(prompt)
        else:
            visible = torch.stack([_visible(layout, shared, rows[n], longest, masked[0]) for n in group])[:, None]
        for n, output in zip(group, _attend(own[0], keys, values, visible, scale), strict=True):
            outputs[n] = output[: rows[n].stop - rows[n].start]
    return outputs


def _filled(tensor, rows):
    """[B, R, ...] of a tensor's branches, filled up with zeros to the longest."""
    first, last = rows[0].start, rows[-1].stop
    if {one.stop - one.start for one in rows} == {(last - first) / len(rows)}:  # of one length, behind each other
        return tensor[first:last].unflatten(0, (len(rows), -1))
    return pad_sequence([tensor[one] for one in rows], batch_first=True)


def _groups(rows, prompt, token_bytes):
    """Lists of numbers of branches for one call each: none more than twice as long as another, keys within bounds."""
    lengths = [one.stop - one.start for one in rows]
    group = []
    for n in sorted(range(len(rows)), key=lambda n: -lengths[n]):
        longest = lengths[group[0]] if group else lengths[n]
        if group and (2 * lengths[n] < longest or (len(group) + 1) * (prompt + longest) * token_bytes > GATHER_BYTES):
            yield group
            group = []
        group.append(n)
    if group:
        yield group


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


def _visible(layout, shared, own, longest, window):
    """[R, P + R] bool: which keys of prompt and branch the queries of a branch see, filled up to `longest` queries.

    Queries that fill up see the first key, so that their softmax, which nobody reads, is one.
    """
    ids = (layout.sample, layout.branch, layout.position, layout.block)
    tokens = [None if one is None else torch.cat([one[shared], one[own]]) for one in ids]
    before, count = shared.stop - shared.start, own.stop - own.start
    seen = visible_to(torch.arange(before, before + count), *tokens, window)
    filled = F.pad(seen, (0, longest - count, 0, longest - count))
    filled[count:, 0] = True
    return filled
