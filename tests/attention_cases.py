"""Random rows for the attention kernels, and the bound that their errors are held to."""

import random

import torch

from yojo_kernels import Layout, reference

HEADS = ((1, 1), (2, 2), (1, 3), (2, 1), (1, 4))  # key heads, query heads that share one


def random_case(seed, longest=30, head_dims=(8, 16, 20, 32, 72), heads=HEADS):
    """A dict: layout, options (scale, window, softcap) and float64 tensors q, k, v, grad of output, grad of lse."""
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    prompts = [rng.randint(0, longest) for _ in range(rng.randint(1, 3))]
    branches = [[rng.randint(1, longest) for _ in range(rng.randint(0 if p else 1, 4))] for p in prompts]
    size = sum(prompts) + sum(map(sum, branches))
    blocks = positions = None
    if rng.random() < 0.4:
        blocks = [rng.choice([-1, -1, 0, 1, 2]) for _ in range(size)]
        if rng.random() < 0.5:
            blocks.sort()
    if rng.random() < 0.25:
        positions = [rng.randint(0, size) for _ in range(size)]
    key_heads, group = rng.choice(heads)
    dim = rng.choice(head_dims)
    shapes = [
        (key_heads * group, dim),
        (key_heads, dim),
        (key_heads, dim),
        (key_heads * group, dim),
        (key_heads * group,),
    ]
    return {
        "layout": Layout.build(prompts, branches, bidirectional=blocks, positions=positions),
        "options": {
            "scale": rng.choice([dim**-0.5, 0.4, -0.3]),
            "window": rng.choice([None, None, 1, 5, 23]),
            "softcap": rng.choice([None, None, 2.0, 30.0]),
        },
        "tensors": [torch.randn(size, *shape, generator=generator, dtype=torch.float64) for shape in shapes],
    }


def run(function, case, dtype, compute=None):
    """output, lse and the gradients of q, k and v, of a case rounded to `dtype` and computed in `compute`."""
    inputs = [tensor.detach().to(dtype).to(compute or dtype) for tensor in case["tensors"]]
    q, k, v = (tensor.requires_grad_() for tensor in inputs[:3])
    output, lse = function(q, k, v, case["layout"], **case["options"])
    if lse is None:  # an implementation that has none
        return [output.detach(), None, *torch.autograd.grad(output, [q, k, v], inputs[3])]
    grads = torch.autograd.grad([output, lse], [q, k, v], [inputs[3], inputs[4].to(lse.dtype)])
    return [output.detach(), lse.detach(), *grads]


def rounding(case, dtype):
    """What one rounding to float32 of every term that is summed can amount to, for each result of `run`.

    The reference happens to be exact where all but one term of a sum vanish, so twice its error can be no error at
    all; a kernel that sums in another order is granted the rounding of the terms: of p |v| for the output, and of
    p (|dp| + |delta|) |k| for the gradient of a query.
    """
    layout, options = case["layout"], case["options"]
    q, k, v, grad, grad_lse = (tensor.to(dtype).double() for tensor in case["tensors"])
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = layout.visible(options["window"])[None]
    s = torch.einsum("qhd,khd->hqk", q, k) * options["scale"]
    size = torch.einsum("qhd,khd->hqk", q.abs(), k.abs()) * abs(options["scale"])
    if options["softcap"] is not None:
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    p = s.masked_fill(~visible, float("-inf")).softmax(-1) * (1 + size)
    output, _ = reference.multi_response_attention(q, k, v, layout, **options)
    dp = torch.einsum("qhd,khd->hqk", grad.abs(), v.abs())
    delta = (output.abs() * grad.abs()).sum(-1) + grad_lse.abs()
    ds = p * (dp + delta.t()[:, :, None]) * abs(options["scale"])
    dk = torch.einsum("hqk,qhd->khd", ds, q.abs()).unflatten(1, (-1, group)).sum(2)
    dv = torch.einsum("hqk,qhd->khd", p, grad.abs()).unflatten(1, (-1, group)).sum(2)
    sums = [
        torch.einsum("hqk,khd->qhd", p, v.abs()),
        size.amax(-1).t(),
        torch.einsum("hqk,khd->qhd", ds, k.abs()),
        dk,
        dv,
    ]
    return [torch.finfo(torch.float32).eps * total.max().item() for total in sums]


def check(function, case, dtype):
    """Fail unless the errors are at most twice those of the reference in the same dtype.

    So for the root mean square of each result, but for `rounding`. The worst single entry of a small tensor is a draw
    of luck: it is granted in addition the half unit in the last place that storing it in the dtype may cost.
    """
    exact = run(reference.multi_response_attention, case, dtype, torch.float64)
    peer = run(reference.multi_response_attention, case, dtype)
    ours = run(function, case, dtype)
    for name, truth, there, here, unit in zip(
        ("output", "lse", "grad q", "grad k", "grad v"), exact, peer, ours, rounding(case, dtype), strict=True
    ):
        assert here.isfinite().all(), f"{name} is not finite"
        error, allowed = here.double() - truth, there.double() - truth
        for how, one, other, more in (
            ("root mean square", error.square().mean().sqrt(), allowed.square().mean().sqrt(), 0.0),
            ("largest", error.abs().max(), allowed.abs().max(), torch.finfo(dtype).eps / 2 * truth.abs().max()),
        ):
            assert one <= 2 * other + unit + more, f"{name}: {how} error {one:.2e}, the reference's {other:.2e}"


def check_apart(function, case, dtype, bound, seed=0):
    """Fail unless what is not finite in one row changes nothing for the tokens that do not see it.

    One row of each input in turn is broken. Where NaN was put, all that the mask connects with it must be NaN; all else,
    outputs and gradients, must be what it was.
    """
    layout, rng = case["layout"], random.Random(seed)
    visible = layout.visible(case["options"]["window"])
    clean = run(function, case, dtype)
    nothing = torch.zeros(layout.num_tokens, dtype=torch.bool)
    for place, broken in enumerate(("query", "key", "value", "grad")):
        row, poison = rng.randrange(layout.num_tokens), rng.choice([float("nan"), float("nan"), float("inf")])
        tensors = [tensor.clone() for tensor in case["tensors"]]
        tensors[place][row, :, rng.randrange(tensors[place].shape[2])] = poison
        # The queries whose sums hold the broken row, and the keys that they listen to.
        asking = torch.arange(layout.num_tokens) == row if broken in ("query", "grad") else visible[:, row]
        heard = visible[asking].any(dim=0)
        reached = {
            "output": nothing if broken == "grad" else asking,
            "lse": asking if broken in ("query", "key") else nothing,
            "grad q": asking,
            "grad k": heard,
            "grad v": nothing if broken == "value" else heard,
        }
        got = run(function, {**case, "tensors": tensors}, dtype)
        for (what, changed), one, other in zip(reached.items(), got, clean, strict=True):
            if one is None:
                continue
            same = (one == other) | ((one - other).abs() <= bound * other.abs().clamp(min=1))
            where = f"{broken} of row {row} is {poison}: {what}"
            assert same[~changed].all(), f"{where} of tokens that do not see it"
            assert poison == poison or one[changed].isnan().all(-1).all(), f"{where} of those that see it is not NaN"
