"""The value head and the losses, fused and in plain PyTorch, forward and backward, launched and replayed from a graph.

The sizes of a value head on a 4B backbone on a GPU (H = 2,560, 1,024 hidden units, 4 to 512 readings); tiny ones on a
CPU, so that the code is known to work. Every way is checked against float64 before it is timed.
"""

import functools

import pytest
import torch

from bench.timing import figures, measure, peak_bytes
from yojo_kernels import launch, listwise_loss, score_head

SIZES = {"cuda": (8192, 2560, 1024), "cpu": (64, 64, 32)}  # tokens, hidden size, hidden units
READINGS = {"cuda": (4, 16, 64, 256, 512), "cpu": (4, 16)}
KINDS = ("best", "plackett_luce", "bradley_terry", "soft")
PER_SAMPLE = 4


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("--device")
    if "readings" in metafunc.fixturenames:
        metafunc.parametrize("readings", READINGS[device][: 2 if metafunc.config.getoption("--quick") else None])
    if "way" in metafunc.fixturenames:
        ways = ["reference", "triton"] if device == "cuda" or launch.INTERPRETED else ["reference"]
        cases = [(way, direction) for way in ways for direction in ("forward", "backward", "both")]
        if device == "cuda":  # a graph holds a forward, or a forward and its backward
            cases += [(f"{way}_graph", direction) for way in ways for direction in ("forward", "both")]
        metafunc.parametrize("way, direction", cases)


@functools.lru_cache(maxsize=1)
def head_case(readings, device):
    tokens, size, width = SIZES[device.type]
    generator = torch.Generator(device).manual_seed(readings)
    make = lambda *shape: torch.randn(*shape, generator=generator, device=device)  # noqa: E731
    hidden = make(tokens, size).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    weights = [make(width, size) * 0.01, make(width) * 0.01, make(1, width) * 0.01, make(1) * 0.01]
    rows = torch.randperm(tokens, generator=generator, device=device)[:readings]
    return [tensor.requires_grad_() for tensor in (hidden, *weights)], rows, make(readings)


@functools.lru_cache(maxsize=1)
def loss_case(readings, kind, device):
    generator = torch.Generator(device).manual_seed(readings)
    scores = torch.randn(readings, generator=generator, device=device, requires_grad=True)
    rankings = torch.randint(1, PER_SAMPLE + 1, (readings,), generator=generator, device=device)
    if kind == "soft":
        rankings = (
            torch.rand(readings // PER_SAMPLE, PER_SAMPLE, generator=generator, device=device).softmax(1).flatten()
        )
    return scores, rankings, torch.arange(0, readings + 1, PER_SAMPLE, dtype=torch.int32, device=device)


def graph_of(call):
    """A function that replays what a call launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def timed(benchmark, record, device, way, forward, inputs, direction, flops, **fields):
    """Time one pass of `forward(impl)` -> (output, its gradient), and record it."""
    impl = way.removesuffix("_graph")
    output, grad = forward(impl)

    def both():
        return torch.autograd.grad(forward(impl)[0], inputs, grad)

    def backward():
        return torch.autograd.grad(output, inputs, grad, retain_graph=True)

    def only_forward():
        with torch.no_grad():
            return forward(impl)[0]

    call = {"forward": only_forward, "backward": backward, "both": both}[direction]
    if way.endswith("_graph"):
        call = graph_of(call)
    benchmark.extra_info["way"] = way
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    seconds = measure(call, device)
    measured = {"peak_bytes": peak_bytes(call, device), **figures(seconds, flops), "pass": direction}
    record(impl=way, **measured, **fields)


def test_head(benchmark, device, record, readings, way, direction):
    tensors, rows, grad = head_case(readings, device)
    tokens, size, width = SIZES[device.type]

    def forward(impl):
        return score_head(tensors[0], rows, *tensors[1:], scale=size**0.5, impl=impl), grad

    exact = score_head(tensors[0].double(), rows, *(t.double() for t in tensors[1:]), scale=size**0.5, impl="reference")
    assert (forward(way.removesuffix("_graph"))[0] - exact).abs().max() <= 1e-5 * exact.abs().max()
    once = 2 * readings * width * (size + 1)
    benchmark.group = f"head, {readings} readings, {direction}"
    timed(benchmark, record, device, way, forward, tensors, direction,
          once * {"forward": 1, "backward": 2, "both": 3}[direction],
          bench="head", prompt_tokens=tokens, responses=readings, model=f"{size}-{width}-1", dtype=str(tensors[0].dtype).removeprefix("torch."))  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_loss(benchmark, device, record, readings, way, kind, direction):
    scores, rankings, offsets = loss_case(readings, kind, device)

    def forward(impl):
        value = listwise_loss(scores, rankings, offsets, kind=kind, impl=impl)
        return value, torch.ones_like(value)

    targets = rankings.double() if kind == "soft" else rankings
    exact = listwise_loss(scores.double(), targets, offsets, kind=kind, impl="reference")
    assert abs(forward(way.removesuffix("_graph"))[0] - exact) <= 1e-5 * exact.abs()
    benchmark.group = f"loss {kind}, {readings} responses, {direction}"
    timed(benchmark, record, device, way, forward, [scores], direction, None,
          bench="loss", model=f"{kind}, samples of {PER_SAMPLE}", dtype="float32", responses=readings)  # fmt: skip
