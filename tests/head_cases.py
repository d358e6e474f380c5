"""Random inputs of the value head and the losses, and the comparison of a kernel with the reference."""

import random

import torch

from yojo_kernels import reference

ACTIVATIONS = tuple(reference.ACTIVATIONS)
KINDS = ("best", "plackett_luce", "bradley_terry", "soft")
NAMES = ("scores", "grad hidden", "grad weight1", "grad bias1", "grad weight2", "grad bias2")


def head_case(seed, hidden_dtype=torch.float32, weight_dtype=torch.float32, most=60, widest=90):
    """Inputs of `score_head`: any sizes, some without biases, some linear, some rows read several times."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    readings, size = rng.choice([1, 2, rng.randint(1, most)]), rng.randint(1, widest)
    width = rng.choice([None, rng.randint(1, widest)])
    tokens = rng.choice([readings + 5, 2 * readings + 3, 3])  # 3: every row is read again and again
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weights = (
        [None, None, make(1, size), make(1)]
        if width is None
        else [make(width, size) / size**0.5, make(width), make(1, width), make(1)]
    )
    if width is not None and rng.random() < 0.3:
        weights[1] = None
    if rng.random() < 0.3:
        weights[3] = None
    return {
        "tensors": [make(tokens, size).to(hidden_dtype), *(w if w is None else w.to(weight_dtype) for w in weights)],
        "rows": torch.randint(tokens, (readings,), generator=generator),
        "grad": make(readings),
        "options": {"activation": rng.choice(ACTIVATIONS), "scale": rng.choice([1.0, 2.5])},
    }


def run_head(function, case, dtype=None):
    """Scores and the gradient of every tensor that is there, computed by `function` (in another dtype, if given)."""
    tensors = [
        t if t is None else (t.detach() if dtype is None else t.detach().to(dtype)).requires_grad_()
        for t in case["tensors"]
    ]
    scores = function(tensors[0], case["rows"], *tensors[1:], **case["options"])
    there = [t for t in tensors if t is not None]
    grads = torch.autograd.grad(scores, there, case["grad"].to(scores.dtype))
    names = [NAMES[0], *(name for name, t in zip(NAMES[1:], tensors, strict=True) if t is not None)]
    return dict(zip(names, (scores.detach(), *grads), strict=True))


def check_head(function, case, cut=False):
    """Fail unless the errors are at most twice the reference's at the same precision, against float64.

    Beyond that a result may be off by one float32 unit of what is added up for it, and by half a unit of the type that
    it is stored in: by a whole one with `cut`, for the interpreter, which cuts bfloat16 off where a GPU rounds.
    """
    exact = run_head(reference.score_head, case, torch.float64)
    peer = run_head(reference.score_head, case)
    ours = run_head(function, case)
    sums = head_sums(case)
    for name, truth in exact.items():
        here, there = ours[name], peer[name]
        assert here.dtype == there.dtype and here.shape == there.shape and here.isfinite().all(), name
        stored = torch.finfo(here.dtype).eps / (1 if cut else 2) * truth.abs()
        compare(name, here, there, truth, sums[name], stored)


def head_sums(case):
    """For each result, the largest of the sums of absolute values that it is made from."""
    x, weight1, bias1, weight2, bias2 = (t if t is None else t.detach().double().abs() for t in case["tensors"])
    grad = case["grad"].double().abs() / case["options"]["scale"]
    rows = case["rows"]
    last = 0 if bias2 is None else bias2.max()
    if weight1 is None:
        each = {"scores": x[rows] @ weight2[0] + last, "grad weight2": grad @ x[rows]}
        through = grad[:, None] * weight2
    else:
        first = x[rows] @ weight1.t() + (0 if bias1 is None else bias1)
        slopes = grad[:, None] * weight2 * (1 + first)
        each = {"scores": first @ weight2[0] + last, "grad weight2": grad @ first}
        each |= {"grad weight1": slopes.t() @ x[rows], "grad bias1": slopes.sum(0)}
        through = slopes @ weight1
    each["scores"] = each["scores"] / case["options"]["scale"]
    each["grad hidden"] = torch.zeros_like(x).index_add(0, rows, through)
    each["grad bias2"] = grad.sum()
    return {name: sums.max() for name, sums in each.items()}


def compare(name, here, there, truth, sums, stored=0.0):
    error, allowed = (here.double() - truth).abs(), (there.double() - truth).abs()
    unit = torch.finfo(torch.float32).eps * sums
    assert (error <= 2 * allowed.max() + unit + stored).all(), (
        f"{name}: error {error.max():.2e}, the reference's {allowed.max():.2e}"
    )


def loss_case(seed, kind, most=40, samples=6, spread=1.0):
    """Scores, rankings or targets, and offsets of ragged samples, some of one response, with many ties."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = [rng.choice([1, 2, 4, rng.randint(1, most)]) for _ in range(rng.randint(1, samples))]
    scores = spread * torch.randn(sum(lengths), generator=generator)
    if kind == "soft":
        rankings = torch.cat([torch.randn(n, generator=generator).softmax(0) for n in lengths])
    else:
        rankings = torch.randint(1, rng.choice([2, 4, 100]), (sum(lengths),), generator=generator)
    return scores, rankings, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def run_loss(function, scores, rankings, offsets, kind, reduction, dtype=torch.float32):
    """Losses, and the gradient of the scores for another weight on every loss."""
    scores = scores.to(dtype, copy=True).requires_grad_()
    if kind == "soft":
        rankings = rankings.to(dtype)
    losses = function(scores, rankings, offsets, kind=kind, reduction=reduction)
    weights = torch.arange(1, losses.numel() + 1, device=losses.device).view(losses.shape)
    (grad,) = torch.autograd.grad(losses, scores, weights.to(losses.dtype))
    return losses.detach(), grad


def check_loss(function, scores, rankings, offsets, kind, reduction):
    """Fail unless the errors of losses and gradient are at most twice the reference's in float32, against float64."""
    case = (scores, rankings, offsets, kind, reduction)
    exact = run_loss(reference.listwise_loss, *case, torch.float64)
    peer = run_loss(reference.listwise_loss, *case)
    ours = run_loss(function, *case)
    weight = ours[0].numel()  # of the last loss, in the gradient
    for name, here, there, truth in zip(("loss", "grad"), ours, peer, exact, strict=True):
        assert here.dtype == torch.float32 and here.shape == there.shape and here.isfinite().all(), name
        # A loss is a difference of scores, a gradient one of probabilities.
        terms = scores.abs().max().double() if name == "loss" else 2 * weight
        compare(name, here, there, truth, truth.abs().max() + terms)
    alone = (offsets[1:] - offsets[:-1]) == 1
    of_one = alone.repeat_interleave(offsets[1:] - offsets[:-1], output_size=scores.shape[0])
    assert not ours[1][of_one].any()  # a response alone has loss 0 and gradient 0, to the bit
    if reduction == "none":
        assert not ours[0][alone].any()
