"""N-way losses in Triton: loss and gradient of the scores in one launch.

A program owns one sample and walks over its responses in steps of BLOCK, over pairs of them for the kinds that compare
pairs. Everything is computed relative to the largest score concerned, in float32. The last program to finish adds up
the samples' losses, first to last, so that every launch gives the same bits.
"""

import torch
import triton
import triton.language as tl

from yojo_kernels import eager, launch, tuning

SUM_BLOCK = 256  # losses that are added at a time


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1; without cancellation, unlike log."""
    s = x / (2 + x)
    t = s * s
    series = 1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t * (1 / 15)))))))
    return 2 * s * series


@triton.jit
def _chunk(scores, rankings, start, end, i, BLOCK: tl.constexpr):
    """Scores, ranks (or targets) and presence of responses start + i ...; -inf and 0 beyond the sample."""
    at = start + i + tl.arange(0, BLOCK)
    inside = at < end
    s = tl.load(scores + at, mask=inside, other=float("-inf")).to(tl.float32)
    r = tl.load(rankings + at, mask=inside, other=0)
    return at, inside, s, r


@triton.jit(do_not_specialize=["num_samples", "num_responses"])
def loss_kernel(scores, rankings, offsets, losses, loss, grads, scratch, arrived, num_samples, num_responses,
                KIND: tl.constexpr, REDUCTION: tl.constexpr, BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr):  # fmt: skip
    """Loss of one sample, losses [S], and its gradient, grads [M]; loss [1] by the last, where there is a reduction.

    What cannot be (a sample without responses, a rank below 1, a target below 0, targets that do not sum to 1) gives
    NaN: on a GPU nobody looks at the values before.
    """
    sample = tl.program_id(0)
    start, end = tl.load(offsets + sample), tl.load(offsets + sample + 1)
    start, end = start.to(tl.int32), end.to(tl.int32)
    wrong = (start < 0) | (start >= end) | (end > num_responses)
    end = tl.where(wrong, start, end)
    count = end - start
    weight = 1.0
    if REDUCTION == "mean":
        weight = 1.0 / num_samples
    value = 0.0

    if KIND == "best" or KIND == "soft":
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        lowest = tl.full([BLOCK], 2**63 - 1, tl.int64)
        mass = tl.zeros([BLOCK], tl.float32)
        for i in range(0, count, BLOCK):
            at, inside, s, r = _chunk(scores, rankings, start, end, i, BLOCK)
            highest = tl.maximum(highest, s, propagate_nan=tl.PropagateNan.ALL)
            if KIND == "best":
                lowest = tl.minimum(lowest, tl.where(inside, r.to(tl.int64), 2**63 - 1))
            else:
                wrong |= tl.sum((inside & ((r >= 0) == 0)).to(tl.int32), 0) > 0
                mass += r.to(tl.float32)
        top = tl.max(highest, 0)
        if KIND == "best":
            rank = tl.min(lowest, 0)
            wrong |= rank < 1
        else:
            whole = tl.sum(mass, 0)
            wrong |= tl.abs(whole - 1) > 1e-3
        exps = tl.zeros([BLOCK], tl.float32)
        ties = tl.zeros([BLOCK], tl.float32)
        below = tl.zeros([BLOCK], tl.float32)
        for i in range(0, count, BLOCK):
            at, inside, s, r = _chunk(scores, rankings, start, end, i, BLOCK)
            exps += tl.where(inside, tl.exp(s - top), 0.0)
            if KIND == "best":
                best = inside & (r == rank)
                ties += best.to(tl.float32)
                below += tl.where(best, top - s, 0.0)
            else:
                below += tl.where(inside, r.to(tl.float32) * (top - s), 0.0)
        total = tl.sum(exps, 0)
        if KIND == "best":
            share = 1 / tl.sum(ties, 0)
            value = tl.log(total) + tl.sum(below, 0) * share
        else:
            value = whole * tl.log(total) + tl.sum(below, 0)
        for i in range(0, count, BLOCK):
            at, inside, s, r = _chunk(scores, rankings, start, end, i, BLOCK)
            p = tl.exp(s - top) / total
            if KIND == "best":
                grad = p - tl.where(r == rank, share, 0.0)
            else:
                grad = whole * p - r.to(tl.float32)
            grad = tl.where(wrong, float("nan"), grad * weight)
            tl.store(grads + at, grad, mask=inside)

    if KIND == "plackett_luce":
        terms = tl.zeros([BLOCK], tl.float32)
        for i in range(0, count, BLOCK):
            at, inside, s, r = _chunk(scores, rankings, start, end, i, BLOCK)
            wrong |= tl.sum((inside & (r < 1)).to(tl.int32), 0) > 0
            top = s
            total = tl.zeros([BLOCK], tl.float32)
            for j in range(0, count, BLOCK):
                _, there, s_j, r_j = _chunk(scores, rankings, start, end, j, BLOCK)
                left = there[None, :] & (r_j[None, :] >= r[:, None])  # not yet ranked at i's place
                new = tl.maximum(top, tl.max(tl.where(left, s_j[None, :], float("-inf")), 1), propagate_nan=tl.PropagateNan.ALL)  # fmt: skip
                shift = tl.where(inside, new, 0.0)
                total = total * tl.exp(top - shift) + tl.sum(
                    tl.where(left, tl.exp(s_j[None, :] - shift[:, None]), 0.0), 1
                )
                top = new
            terms += tl.where(inside, tl.log(total) + (top - s), 0.0)
            tl.store(scratch + at, top, mask=inside)
            tl.store(scratch + num_responses + at, 1 / total, mask=inside)
        value = tl.sum(terms, 0)
        tl.debug_barrier()  # what one thread stored, others read
        for j in range(0, count, BLOCK):
            at, inside, s, r = _chunk(scores, rankings, start, end, j, BLOCK)
            grad = tl.full([BLOCK], -1.0, tl.float32)
            for i in range(0, count, BLOCK):
                at_i, there, _, r_i = _chunk(scores, rankings, start, end, i, BLOCK)
                top = tl.load(scratch + at_i, mask=there, other=0.0)
                inverse = tl.load(scratch + num_responses + at_i, mask=there, other=0.0)
                drawn = there[None, :] & (r_i[None, :] <= r[:, None])  # places at which j could have been drawn
                grad += tl.sum(tl.where(drawn, tl.exp(s[:, None] - top[None, :]) * inverse[None, :], 0.0), 1)
            tl.store(grads + at, tl.where(wrong, float("nan"), grad * weight), mask=inside)

    if KIND == "bradley_terry":
        # How many pairs there are is known once all were seen, so it is counted first.
        counts = tl.zeros([BLOCK], tl.int32)
        for i in range(0, count, BLOCK):
            at, inside, s, r = _chunk(scores, rankings, start, end, i, BLOCK)
            wrong |= tl.sum((inside & (r < 1)).to(tl.int32), 0) > 0
            for j in range(0, count, BLOCK):
                _, there, s_j, r_j = _chunk(scores, rankings, start, end, j, BLOCK)
                counts += tl.sum((inside[:, None] & there[None, :] & (r[:, None] < r_j[None, :])).to(tl.int32), 1)
        pairs = tl.maximum(tl.sum(counts, 0), 1).to(tl.float32)
        terms = tl.zeros([BLOCK], tl.float32)
        for i in range(0, count, BLOCK):
            at, inside, s, r = _chunk(scores, rankings, start, end, i, BLOCK)
            grad = tl.zeros([BLOCK], tl.float32)
            for j in range(0, count, BLOCK):
                _, there, s_j, r_j = _chunk(scores, rankings, start, end, j, BLOCK)
                both = inside[:, None] & there[None, :]
                better = both & (r[:, None] < r_j[None, :])
                worse = both & (r[:, None] > r_j[None, :])
                # d: by how much the loser of the pair leads; its softplus is the loss, its sigmoid the slope.
                d = tl.where(better, s_j[None, :] - s[:, None], s[:, None] - s_j[None, :])
                d = tl.where(better | worse, d, 0.0)
                e = tl.exp(-tl.abs(d))
                slope = tl.where(d >= 0, 1.0, e) / (1 + e)
                softplus = tl.maximum(d, 0.0, propagate_nan=tl.PropagateNan.ALL) + _log1p(e)
                terms += tl.sum(tl.where(better, softplus, 0.0), 1)
                grad += tl.sum(tl.where(better, -slope, tl.where(worse, slope, 0.0)), 1)
            tl.store(grads + at, tl.where(wrong, float("nan"), grad / pairs * weight), mask=inside)
        value = tl.sum(terms, 0) / pairs

    value = tl.where(wrong, float("nan"), value)
    tl.store(losses + sample, value)
    if REDUCTION != "none":
        tl.debug_barrier()
        before = tl.atomic_add(arrived, 1, sem="acq_rel")
        tl.debug_barrier()
        if before == num_samples - 1:
            sums = tl.zeros([SUM_BLOCK], tl.float32)
            for i in range(0, num_samples, SUM_BLOCK):
                at = i + tl.arange(0, SUM_BLOCK)
                sums += tl.load(losses + at, mask=at < num_samples, other=0.0, cache_modifier=".cg")
            tl.store(loss, tl.sum(sums, 0) * weight)


# ---- operators ----

obstacle = launch.obstacle  # takes the device and every floating-point dtype


def listwise_loss(scores, rankings, offsets, *, kind, reduction):
    """As `yojo_kernels.listwise_loss`, arguments checked; returns a float32 scalar, or [S]."""
    return _listwise_loss(scores, rankings, offsets, kind, reduction)[0]


@eager.operator("listwise_loss", watched=3)
def _listwise_loss(
    scores: torch.Tensor, rankings: torch.Tensor, offsets: torch.Tensor, kind: str, reduction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    scores, rankings, offsets = scores.contiguous(), rankings.contiguous(), offsets.contiguous()
    num_samples, num_responses = offsets.shape[0] - 1, scores.shape[0]
    new = dict(dtype=torch.float32, device=scores.device)
    losses = torch.empty(num_samples, **new)
    loss = losses if reduction == "none" else torch.empty((), **new)
    grads = torch.empty(num_responses, **new)
    scratch = torch.empty((2, num_responses), **new) if kind == "plackett_luce" else grads
    arrived = offsets if reduction == "none" else torch.zeros(1, dtype=torch.int32, device=scores.device)
    block, num_warps = tuning.loss(kind, num_responses, num_samples, scores.device)
    with launch.on(scores.device):
        loss_kernel[(num_samples,)](
            scores, rankings, offsets, losses, loss, grads, scratch, arrived, num_samples, num_responses,
            KIND=kind, REDUCTION=reduction, BLOCK=block, SUM_BLOCK=SUM_BLOCK, num_warps=num_warps, num_stages=1,
        )  # fmt: skip
    return loss, grads


@_listwise_loss.register_fake
def _(scores, rankings, offsets, kind, reduction):
    loss = scores.new_empty((offsets.shape[0] - 1,) if reduction == "none" else (), dtype=torch.float32)
    return loss, scores.new_empty(scores.shape, dtype=torch.float32)


def _save(ctx, inputs, output):
    scores, _, offsets, _, reduction = inputs
    ctx.save_for_backward(output[1], offsets)
    ctx.dtype, ctx.reduction = scores.dtype, reduction
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, _):
    if grad_loss is None:
        return (None,) * 5
    grads, offsets = ctx.saved_tensors
    if ctx.reduction == "none":
        lengths = offsets[1:] - offsets[:-1]
        grad_loss = grad_loss.repeat_interleave(lengths, output_size=grads.shape[0])
    return (grads * grad_loss).to(ctx.dtype), None, None, None, None


_listwise_loss.register_autograd(_backward, setup_context=_save)
