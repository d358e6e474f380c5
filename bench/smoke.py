"""One row through every kernel, against float64: the first thing to run on a GPU.

    python -m bench.smoke [--json FILE] [--only NAME ...] [--list]

Each check prints a line: what is largest of its results' errors over what is allowed (twice the reference's own error at
the same precision, and the rounding of a unit), and how long it took, compiling included. Every kernel runs twice and must give
the same bits. The status is 1 where a check failed. With --json, lines are appended as they come, and checks that FILE
holds already are not run again: where an error leaves the GPU unusable (status 3), the next run goes on behind it.
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
import typing

import torch

from bench import lines
from bench.pretended_driver import pretended
from yojo_kernels import Layout, gluon_attention, listwise_loss, multi_response_attention, score_head

PROMPTS, BRANCHES = (300, 40), ((70, 100, 33), (25,))
UNUSABLE = 3  # exit status
GLUON = "gluon attention"
KINDS = ("attention", "head", "linear head", "loss", "a reward model")  # how the names of all other checks begin


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the checks run.

    Attributes:
        device: torch device.
        scale: what sizes of rows are divided by; 1 on a GPU.
        compares: False where kernels are launched into nothing (`bench.pretended_driver`): then nothing is compared.
        bfloat16: False for the interpreter, which has no products of it.
    """

    device: torch.device
    scale: int = 1
    compares: bool = True
    bfloat16: bool = True


class Check(typing.NamedTuple):
    name: str
    run: typing.Callable  # (place) -> list of (what, error, allowed)


def checks(place):
    """All of them, what is most likely to fail and matters most first."""
    half = torch.bfloat16 if place.bfloat16 else torch.float16
    found = []
    for dtype, dim in ((half, 128), (torch.float32, 64), (torch.float16, 64), (half, 256), (half, 72), (torch.float32, 128)):  # fmt: skip
        found.append(_attention(dtype, dim, (8, 2)))
    found.append(_attention(half, 64, (3, 3)))
    found.append(_attention(half, 128, (14, 2), storage="heads first"))
    for name, options in (
        ("window", {"window": 37}),
        ("blocks", {"blocks": True}),
        ("softcap", {"softcap": 20.0}),
        ("window, blocks and softcap", {"window": 50, "blocks": True, "softcap": 20.0, "scale": -0.3}),
    ):
        found.append(_attention(half, 128, (8, 2), name=name, **options))
    found.append(Check("attention, one response is not a number", functools.partial(_apart, half)))
    for dtype, readings, linear in ((half, 4, False), (half, 300, False), (torch.float32, 20, False), (half, 20, True)):
        name = f"{'linear head' if linear else 'head'} of {readings} readings, {_name(dtype)}"
        found.append(Check(name, functools.partial(_head, dtype, readings, linear)))
    for kind in ("best", "plackett_luce", "bradley_terry", "soft"):
        found.append(Check(f"loss {kind}", functools.partial(_loss, kind)))
    if place.device.type == "cuda":
        found.append(Check("attention from a CUDA graph", functools.partial(_graph, half)))
        found.append(Check("a reward model on the GPU and on the CPU", _model))
    for dim in (128, 64):  # last: what it may break, all else has been seen without
        if _has_gluon(place, half, dim):
            found.append(_attention(half, dim, (8, 2), impl="gluon"))
    return found


def _has_gluon(place, dtype, dim):
    """Whether `yojo_kernels.gluon_attention` can run: on a Hopper GPU, with a Triton that has Gluon."""
    is_there = place.device.type != "cuda" or torch.cuda.is_available()
    return is_there and gluon_attention.obstacle(place.device, dtype, dim) is None


# ---- attention ----


def _attention(dtype, dim, heads, name="", storage="tokens first", impl="triton", **options):
    detail = ", ".join(filter(None, (name, storage if storage != "tokens first" else "")))
    title = f"attention {_name(dtype)}, {heads[0]}:{heads[1]} heads of {dim}{', ' + detail if detail else ''}"
    if impl != "triton":
        title = f"{impl} {title}"
    return Check(title, functools.partial(_check_attention, dtype, dim, heads, storage, impl, options))


def _row(place, dtype, dim, heads, storage="tokens first", blocks=False):
    """(layout, query, key, value, gradients of the output and of the log-sum-exp)."""
    prompts = [n // place.scale for n in PROMPTS]
    branches = [[max(1, n // place.scale) for n in lengths] for lengths in BRANCHES]
    size = sum(prompts) + sum(map(sum, branches))
    ids = [(row // 7) % 3 - 1 for row in range(size)] if blocks else None
    layout = Layout.build(prompts, branches, bidirectional=ids, device=place.device)
    generator = torch.Generator().manual_seed(dim)

    def make(*shape):
        return torch.randn(size, *shape, generator=generator).to(place.device, dtype)

    tensors = [make(heads[0], dim), make(heads[1], dim), make(heads[1], dim), make(heads[0], dim)]
    if storage == "heads first":
        tensors = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in tensors]
    return layout, *tensors, make(heads[0]).float()


def _run_attention(layout, tensors, grad, grad_lse, dtype, impl, options):
    query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors)
    output, lse = multi_response_attention(query, key, value, layout, return_lse=True, impl=impl, **options)
    grads = torch.autograd.grad([output, lse], [query, key, value], [grad.to(output.dtype), grad_lse.to(lse.dtype)])
    return [output.detach(), lse.detach(), *grads]


def _check_attention(dtype, dim, heads, storage, impl, options, place):
    options = dict(options)
    layout, *tensors, grad, grad_lse = _row(place, dtype, dim, heads, storage, options.pop("blocks", False))
    run = functools.partial(_run_attention, layout, tensors, grad, grad_lse)
    names = ("output", "lse", "grad query", "grad key", "grad value")
    return _compared(place, names, functools.partial(run, options=options), dtype, impl)


def _apart(dtype, place):
    """NaN in one response: the others of its sample are what they were, its own outputs are NaN."""
    layout, query, key, value, *_ = _row(place, dtype, 128, (8, 2))
    with torch.no_grad():
        clean = multi_response_attention(query, key, value, layout, impl="triton")
        start = layout.prompt_lengths[0]
        own = slice(start, start + layout.branch_lengths[0][0])
        for tensor in (key, value):
            tensor[own] = float("nan")
        got = multi_response_attention(query, key, value, layout, impl="triton")
    if not place.compares:
        return []
    others = torch.ones(len(got), dtype=torch.bool, device=got.device)
    others[own] = False
    spread = (got[others].float() - clean[others].float()).abs().max().item()
    missed = (~got[own].isnan()).sum().item()
    return [("the other responses", spread, 2e-2), ("entries that should be NaN", missed, 0)]


def _graph(dtype, place):
    layout, query, key, value, *_ = _row(place, dtype, 128, (8, 2))
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = multi_response_attention(query, key, value, layout, impl="triton")
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = multi_response_attention(query, key, value, layout, impl="triton")
        captured.zero_()
        graph.replay()
    return [("output", (captured.float() - expected.float()).abs().max().item(), 0)]


# ---- value head, losses, a model ----


def _head(dtype, readings, linear, place):
    generator = torch.Generator().manual_seed(readings)
    tokens, size, width = 2000 // place.scale, 2560 // place.scale, 1024 // place.scale

    def make(*shape):
        return torch.randn(*shape, generator=generator).to(place.device)

    rows = torch.randint(tokens, (readings,), generator=generator).to(place.device)
    hidden = make(tokens, size).to(dtype)
    weights = [make(1, size) * 0.02, make(1)]
    if not linear:
        weights = [make(width, size) * 0.02, make(width) * 0.02, make(1, width) * 0.02, make(1)]
    grad = make(readings)

    def run(dtype, impl):
        exact = dtype == torch.float64
        inputs = [t.detach().to(torch.float64 if exact else t.dtype).requires_grad_() for t in (hidden, *weights)]
        head = [None, None, *inputs[1:]] if linear else inputs[1:]
        scores = score_head(inputs[0], rows, *head, impl=impl)
        return [scores.detach(), *torch.autograd.grad(scores, inputs, grad.to(scores.dtype))]

    names = ("scores", "grad hidden", *(f"grad of weight {n}" for n in range(len(weights))))
    return _compared(place, names, run, dtype)


def _loss(kind, place):
    generator = torch.Generator().manual_seed(len(kind))
    counts = [4, 1, 7, 30, 2]
    scores = torch.randn(sum(counts), generator=generator).to(place.device)
    rankings = torch.randint(1, 4, (sum(counts),), generator=generator)
    if kind == "soft":
        rankings = torch.cat([torch.rand(n, generator=generator).softmax(0) for n in counts])
    rankings = rankings.to(place.device)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32).to(place.device)

    def run(dtype, impl):
        own = scores.detach().to(dtype).requires_grad_()
        targets = rankings.to(dtype) if kind == "soft" else rankings
        loss = listwise_loss(own, targets, offsets, kind=kind, impl=impl)
        return [loss.detach(), *torch.autograd.grad(loss, [own])]

    return _compared(place, ("loss", "grad scores"), run, torch.float32)


def _model(place):
    """The shipped reward model, float32: scores on the GPU and on the CPU."""
    from yojo.demo import digits
    from yojo.demo.reward import load_reward_model, make_examples

    examples = make_examples(digits.load_digits_split()[1], 8, 0)
    model = load_reward_model()
    expected = torch.cat(model.score_many(examples))
    model.model.to(place.device)
    got = torch.cat([scores.cpu() for scores in model.score_many(examples)])
    return [("scores", (got - expected).abs().max().item(), 1e-3)]


# ---- how a check is judged ----


def _compared(place, names, run, dtype, impl="triton"):
    """(what, error, allowed) of each result of `run(dtype, impl)`; AssertionError where two launches disagree."""
    ours = run(dtype, impl)
    again = run(dtype, impl)
    if not place.compares:
        return []
    for name, one, other in zip(names, ours, again, strict=True):
        if not torch.equal(one, other):
            raise AssertionError(f"{name}: two launches on the same input do not agree to the bit")
    exact, peer = run(torch.float64, "reference"), run(dtype, "reference")
    rows = []
    for name, here, there, truth in zip(names, ours, peer, exact, strict=True):
        seen = truth.isfinite()
        if not torch.equal(seen, here.isfinite()):
            raise AssertionError(f"{name}: not finite where it should be, or finite where it should not")
        error, own = (((one.double() - truth)[seen].square().mean().sqrt().item()) for one in (here, there))
        unit = torch.finfo(torch.float32).eps * truth[seen].abs().max().item() if seen.any() else 0.0
        rows.append((name, error, 2 * own + unit))
    return rows


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def attempt(check, place):
    """What came of a check: a dict for a line of the file."""
    line, start = {"check": check.name}, time.perf_counter()
    try:
        rows = check.run(place)
        if place.device.type == "cuda":
            torch.cuda.synchronize(place.device)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other checks are worth running
        text = f"{type(error).__name__}: {error}".strip()
        return line | {"ok": False, "error": text[:2000], "seconds": time.perf_counter() - start}
    worst = max(rows, key=lambda row: _ratio(*row[1:]), default=None)
    ok = all(error <= allowed for _, error, allowed in rows)
    return line | {"ok": ok, "results": rows, "worst": worst and worst[0], "seconds": time.perf_counter() - start}


def _ratio(error, allowed):
    return error / allowed if allowed else (math.inf if error else 0.0)


def usable(device):
    """Whether a device still computes: after an illegal access it does not."""
    try:
        return bool((torch.ones(2, device=device) + 1).sum().item() == 4)
    except RuntimeError:
        return False


def described(line):
    """A line of the file, for people."""
    if "error" in line:
        what = line["error"].splitlines()[0][:150]
    elif line["results"]:
        name, error, allowed = next(row for row in line["results"] if row[0] == line["worst"])
        what = f"{name}: error {error:.1e}, allowed {allowed:.1e}"
    else:
        what = "launched into nothing"
    return f"{'ok  ' if line['ok'] else 'FAIL'} {line['seconds']:7.1f} s  {line['check']:<70} {what}"


def _without(argv, option):
    return [one for one in (sys.argv[1:] if argv is None else argv) if one != option]


def read(path):
    """Check -> its line, of a file that may not be there yet; a check that was begun and never ended has failed."""
    found = {line["check"]: line for line in lines.read(path)} if path is not None else {}
    for line in found.values():
        if "ok" not in line:
            line |= {"ok": False, "error": "the process ended, or was ended, within this check", "seconds": 0.0}
    return found


def main(argv=None, place=None):
    """Run what has not been run; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.smoke", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="append a line for each check; those in it are not run again")
    parser.add_argument("--only", nargs="+", help="checks whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the names of the checks")
    parser.add_argument("--pretended", action="store_true", help="compile and launch into nothing: needs no GPU")
    options = parser.parse_args(argv)
    if options.pretended and place is None:
        with pretended():
            return main([*_without(argv, "--pretended")], Place(torch.device("cpu"), compares=False))
    if place is None:
        if not torch.cuda.is_available() and not options.list:
            parser.error("a GPU is to be checked, and torch finds none")
        place = Place(torch.device("cuda"))
        torch.backends.cuda.matmul.allow_tf32 = False
    chosen = [one for one in checks(place) if options.only is None or one.name.startswith(tuple(options.only))]
    if options.list:
        print("\n".join(one.name for one in chosen))
        return 0
    done = read(options.json)

    def append(line):
        if options.json:
            lines.append(options.json, line)

    failed = False
    for one in chosen:
        line = done.get(one.name)
        if line is None:
            append({"check": one.name})
            line = attempt(one, place)
            append(line)
        print(described(line), flush=True)
        failed |= not line["ok"]
        if not line["ok"] and one.name not in done and place.compares and not usable(place.device):
            return UNUSABLE
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
