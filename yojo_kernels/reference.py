"""The eager truth of every operation: plain PyTorch, any float dtype, any device, differentiable."""

import math

import torch
import torch.nn.functional as F

from yojo_kernels.layout import visible_to

CHUNK_BYTES = 64 * 2**20  # what `attention_of_rows` makes at a time

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "selu": F.selu,
    "tanh": torch.tanh,
}


def multi_response_attention(query, key, value, layout, *, scale, window=None, softcap=None):
    """softmax(scale * q k^T) v over the keys that `layout.visible(window)` lets each query see.

    Shapes and meaning as in `yojo_kernels.multi_response_attention`; returns the pair (output, lse).
    """
    # A sample never sees another, so each is computed alone; a compiler gets the row in one piece instead, so that
    # nothing in its graph depends on how long each sample is.
    whole_row = torch.compiler.is_compiling() or layout.num_samples == 1
    spans = [(0, query.shape[0])] if whole_row else layout.sample_spans()
    pieces = []
    for start, stop in spans:
        visible = layout.visible(window, span=(start, stop))
        rows = slice(start, stop)
        pieces.append(masked_attention(query[rows], key[rows], value[rows], visible, scale=scale, softcap=softcap))
    output, lse = zip(*pieces, strict=True)
    return torch.cat(output), torch.cat(lse)


def masked_attention(query, key, value, visible, *, scale, softcap=None):
    """Attention under any mask: query [T, Hq, D], key and value [T, Hkv, D], visible [T, T] bool, queries down.

    Returns output [T, Hq, D] in the dtype of query and lse [T, Hq] in float32 (float64 for float64 inputs). A query
    that sees nothing gets output 0, lse -inf and gradient 0.
    """
    group = query.shape[1] // key.shape[1]
    q = query.transpose(0, 1)  # [Hq, T, D]
    k = key.transpose(0, 1).repeat_interleave(group, dim=0)
    v = value.transpose(0, 1).repeat_interleave(group, dim=0)
    if q.dtype == torch.float16:  # whose products can be beyond it where the scaled scores are not
        exponent = max(-40, min(0, math.frexp(scale)[1]))
        scores = _Scores.apply(q, k, visible, exponent).to(torch.float32) * (scale * 2.0**-exponent)
    else:
        scores = _Scores.apply(q, k, visible).to(accumulation_dtype(q.dtype)) * scale  # [Hq, T, T]
    weights, lse = _softmax(scores, visible, softcap)
    return _Mean.apply(weights.to(v.dtype), v, visible).transpose(0, 1), lse.transpose(0, 1)


def _softmax(scores, visible, softcap):
    """(weights, lse) of scores [..., Q, K] over the keys that each query sees; all 0 and -inf where it sees none."""
    unseen = ~visible
    if softcap is not None:
        scores = softcap * torch.tanh(scores.masked_fill(unseen, 0.0) / softcap)
    blind = ~visible.any(dim=1, keepdim=True)  # a row of -inf alone would make NaN
    scores = scores.masked_fill(unseen & ~blind, float("-inf"))
    weights = scores.softmax(dim=-1).masked_fill(unseen, 0.0)  # where one score is NaN, all weights are
    return weights, scores.logsumexp(dim=-1).masked_fill(blind[:, 0], float("-inf"))


# What a token does not see must not change it, and 0 times infinity is NaN: products with weights that are 0 where
# nothing is seen take what is not finite out of the other factor, and put NaN where it was seen.


def _seen_product(weights, values, visible):
    """weights @ values, [B, Q, K] and [B, K, D], as a sum over the pairs of visible [Q, K] alone."""
    broken = ~values.isfinite().all(dim=-1)  # [B, K]
    if _is_asked(values) and not broken.any():
        return weights @ values
    product = weights @ values.masked_fill(broken[..., None], 0.0)
    reached = broken.float() @ visible.float().t() > 0  # [B, Q]
    return product.masked_fill(reached[..., None], float("nan"))


def _is_asked(tensor):
    """Whether to look at values before computing: nowhere but on a CPU, outside of a compiler, does that cost nothing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class _Scores(torch.autograd.Function):
    """query @ key^T 2^exponent, [B, Q, D] and [B, K, D] -> [B, Q, K]; only the pairs of visible have a gradient."""

    @staticmethod
    def forward(ctx, query, key, visible, exponent=0):
        ctx.save_for_backward(query, key, visible)
        ctx.exponent = exponent
        if exponent:
            query, key = query * 2.0 ** (exponent // 2), key * 2.0 ** (exponent - exponent // 2)
        return query @ key.transpose(1, 2)

    @staticmethod
    def backward(ctx, gradient):
        query, key, visible = ctx.saved_tensors
        gradient = gradient.masked_fill(~visible, 0.0).to(key.dtype)  # 0 times a NaN of the softmax's is not yet 0
        if ctx.exponent:
            gradient = gradient * 2.0**ctx.exponent
        return (
            _seen_product(gradient, key, visible),
            _seen_product(gradient.transpose(1, 2), query, visible.t()),
            None,
            None,
        )


class _Mean(torch.autograd.Function):
    """weights @ values, [B, Q, K] and [B, K, D] -> [B, Q, D], for weights that are 0 but for the pairs of visible."""

    @staticmethod
    def forward(ctx, weights, values, visible):
        ctx.save_for_backward(weights, values, visible)
        return _seen_product(weights, values, visible)

    @staticmethod
    def backward(ctx, gradient):
        weights, values, visible = ctx.saved_tensors
        gradient = gradient.to(values.dtype)
        return (
            (gradient @ values.transpose(1, 2)).masked_fill(~visible, 0.0),
            _seen_product(weights.transpose(1, 2), gradient, visible.t()),
            None,
        )


def attention_of_rows(query, key, value, layout, rows, counts, *, scale, window=None, softcap=None):
    """The same for the queries of some rows: query [M, Hq, D], rows [M] and counts as in the public function.

    In float32 (float64 for float64) whatever the dtype, autocast or not; key heads and queries are taken a few at a
    time, so that what is made at a time stays below `CHUNK_BYTES`.
    """
    if counts is None:
        spans, counts = [(0, layout.num_tokens)], (query.shape[0],)
    else:
        spans = layout.sample_spans()
    pieces, first = [], 0
    with torch.autocast(query.device.type, enabled=False):
        for (start, stop), count in zip(spans, counts, strict=True):
            own, keys = slice(first, first + count), slice(start, stop)
            first += count
            if count:
                pieces.append(
                    _few_queries(query[own], key[keys], value[keys], layout, rows[own], start, scale, window, softcap)
                )
    if not pieces:
        return query, query.sum(-1, dtype=accumulation_dtype(query.dtype))  # nothing asked
    output, lse = zip(*pieces, strict=True)
    return torch.cat(output).to(query.dtype), torch.cat(lse)


def _few_queries(query, key, value, layout, rows, start, scale, window, softcap):
    """Attention of the queries of some rows to the keys from `start` on: (output [M, Hq, D], lse [M, Hq]), float32."""
    dtype = accumulation_dtype(query.dtype)
    (num_queries, num_heads, head_dim), (num_keys, num_key_heads, _) = query.shape, key.shape
    group = num_heads // num_key_heads
    span = slice(start, start + num_keys)
    tokens = [
        None if ids is None else ids[span] for ids in (layout.sample, layout.branch, layout.position, layout.block)
    ]
    # Bytes of a key head: its keys and values, and the scores of its group of query heads.
    size = torch.finfo(dtype).bits // 8 * num_keys
    at_a_time = max(1, min(num_queries, (CHUNK_BYTES // size - 2 * head_dim) // group))
    heads = max(1, CHUNK_BYTES // (size * (2 * head_dim + group * at_a_time)))
    outputs, lses = [], []
    for chunk in range(0, num_queries, at_a_time):
        own = slice(chunk, chunk + at_a_time)
        visible = visible_to(rows[own] - start, *tokens, window)  # [m, t]
        visible_to_group = visible.repeat(group, 1)  # [group m, t]
        per_head = []
        for head in range(0, num_key_heads, heads):
            k = key[:, head : head + heads].transpose(0, 1).to(dtype)  # [h, t, D]
            v = value[:, head : head + heads].transpose(0, 1).to(dtype)
            q = query[own, head * group : (head + heads) * group].transpose(0, 1).to(dtype)  # [h group, m, D]
            q = q.reshape(k.shape[0], -1, head_dim)  # the queries of a group meet the same keys
            scores = _Scores.apply(q, k, visible_to_group) * scale  # [h, group m, t]
            weights, lse = _softmax(scores, visible_to_group, softcap)
            output = _Mean.apply(weights, v, visible_to_group).reshape(k.shape[0] * group, -1, head_dim)
            per_head.append((output, lse.reshape(k.shape[0] * group, -1)))
        output, lse = (torch.cat(part).transpose(0, 1) for part in zip(*per_head, strict=True))
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


def score_head(hidden, rows, weight1, bias1, weight2, bias2, *, activation="silu", scale=1.0):
    """(activation(hidden[rows] weight1^T + bias1) weight2^T + bias2) / scale, in float32 (float64 for float64)."""
    dtype = accumulation_dtype(hidden.dtype, weight2.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        x = hidden[rows].to(dtype)
        if weight1 is not None:
            x = ACTIVATIONS[activation](F.linear(x, weight1.to(dtype), None if bias1 is None else bias1.to(dtype)))
        scores = F.linear(x, weight2.to(dtype), None if bias2 is None else bias2.to(dtype))
        return scores[:, 0] / scale


def listwise_loss(scores, rankings, offsets, *, kind="best", reduction="none"):
    """The loss of each sample, [S], or their mean or sum; see `yojo_kernels.listwise_loss` for the four kinds."""
    losses = _losses(scores, rankings, offsets, kind)
    return {"mean": losses.mean, "sum": losses.sum, "none": losses.clone}[reduction]()


def _losses(scores, rankings, offsets, kind):
    scores = scores.to(accumulation_dtype(scores.dtype))
    num_samples = offsets.shape[0] - 1
    lengths = (offsets[1:] - offsets[:-1]).to(torch.int64)
    sample = torch.arange(num_samples, device=scores.device)
    sample = sample.repeat_interleave(lengths, output_size=scores.shape[0])  # [M]
    same = sample[:, None] == sample[None, :]  # [M, M]

    def per_sample(values):
        return values.new_zeros(num_samples).index_add(0, sample, values)

    if kind == "best":
        lowest = rankings.expand_as(same).masked_fill(~same, torch.iinfo(rankings.dtype).max).amin(dim=1)
        best = rankings == lowest
        log_softmax = scores - _logsumexp_over(scores, same)
        return -per_sample(log_softmax.masked_fill(~best, 0.0)) / per_sample(best.to(scores.dtype))
    if kind == "soft":
        log_softmax = scores - _logsumexp_over(scores, same)
        return -per_sample(rankings.to(scores.dtype) * log_softmax)
    if kind == "plackett_luce":
        not_yet_ranked = same & (rankings[None, :] >= rankings[:, None])
        return -per_sample(scores - _logsumexp_over(scores, not_yet_ranked))
    if kind == "bradley_terry":
        better = same & (rankings[:, None] < rankings[None, :])  # [i, j]: i beats j
        # Masked before, too: the slope of softplus at a NaN of another sample, times 0, would be NaN.
        behind = (scores[None, :] - scores[:, None]).masked_fill(~better, 0.0)
        losses = F.softplus(behind).masked_fill(~better, 0.0).sum(dim=1)
        pairs = per_sample(better.sum(dim=1).to(scores.dtype))
        return per_sample(losses) / pairs.clamp(min=1)
    raise AssertionError(f"unknown kind {kind}")


def _logsumexp_over(scores, members):
    """For each row i of members [M, M] bool: log sum over its members j of exp(scores[j])."""
    return scores.expand_as(members).masked_fill(~members, float("-inf")).logsumexp(dim=1)


def accumulation_dtype(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32
