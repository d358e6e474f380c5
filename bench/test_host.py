"""What the operations cost the host, each beside `x.add(1)` of eight numbers, which costs it next to nothing but the call.

Where there is no GPU, kernels are compiled for an H100 and launched into nothing (`bench/pretended_driver.py`), without the
3 to 4 us of a real launch. On a GPU they are launched, on a row so short that the GPU is done before the host is.

The least of many short batches counts, the call and `x.add(1)` in turns: what it takes while nobody else wants the core.

Whole passes, on one thread, are those of a decoder as deep as a 4B model's and so narrow, over so few tokens, that what its
matrix products take is little beside the calls; the stock model's pass over as many tokens stands beside them.
"""

import contextlib
import time

import pytest
import torch

import yojo
from bench import models, ways
from yojo_kernels import Layout, listwise_loss, multi_response_attention, score_head

PROMPT, RESPONSES, EACH = 96, 4, 8  # tokens
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SIZE, WIDTH = 2560, 1024  # of a value head
CALLS, ADDS = 3, 100  # of a batch
GROUPS, BATCHES = 5, {False: 100, True: 10}  # with --quick or without
PASSES = {False: 20, True: 1}  # batches of whole passes
FEW = ways.Point("text", 16, 4, 4)  # what they are over
NARROW = models.Shape(
    "Qwen3VL",
    models.SMALL_QWEN3_VL
    | dict(
        text_config=models.SMALL_QWEN3_VL["text_config"]
        | dict(hidden_size=64, intermediate_size=64, num_hidden_layers=36, num_attention_heads=4),
        vision_config=models.SMALL_QWEN3_VL["vision_config"] | dict(out_hidden_size=64),
    ),
    frame=8,
)


@pytest.fixture(scope="module", autouse=True)
def driver(device):
    """A driver to launch with: the GPU's, or one that is not there."""
    pytest.importorskip("triton")
    from yojo_kernels import launch

    if device.type == "cuda":
        yield
    elif launch.INTERPRETED:
        pytest.skip("kernels are interpreted (TRITON_INTERPRET=1): nothing is launched")
    else:
        from bench.pretended_driver import pretended

        with pretended():
            yield


def attention(device):
    """A decoder layer's attention; tables are made once a row, here beforehand."""
    layout = Layout.build([PROMPT], [[EACH] * RESPONSES], device=device)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (
        torch.randn(layout.num_tokens, count, HEAD_DIM, dtype=torch.bfloat16, device=device, requires_grad=True)
        for count in heads
    )
    inputs, grad = (query, key, value), torch.ones_like(query)
    return lambda: multi_response_attention(query, key, value, layout, scale=HEAD_DIM**-0.5), inputs, grad


def head(device):
    """The value head on all responses of the row."""
    make = lambda *shape, **options: torch.randn(*shape, device=device, **options).requires_grad_()  # noqa: E731
    hidden = make(PROMPT + RESPONSES * EACH, SIZE, dtype=torch.bfloat16)
    weights = [make(WIDTH, SIZE), make(WIDTH), make(1, WIDTH), make(1)]
    rows = torch.arange(PROMPT + EACH - 1, PROMPT + RESPONSES * EACH, EACH, device=device)
    inputs = (hidden, *weights)
    return lambda: score_head(hidden, rows, *weights, scale=SIZE**0.5), inputs, torch.ones(RESPONSES, device=device)


def loss(device):
    """The loss of one sample."""
    scores = torch.randn(RESPONSES, device=device, requires_grad=True)
    rankings = torch.arange(1, RESPONSES + 1, device=device)
    offsets = torch.tensor([0, RESPONSES], dtype=torch.int32, device=device)
    return lambda: listwise_loss(scores, rankings, offsets), (scores,), torch.ones((), device=device)


OPERATIONS = {"attention": attention, "head": head, "loss": loss}


def least(call, add, device, batches):
    """(seconds of `call()`, of `add()`) in the fastest of so many batches of each, in turns."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    found = [float("inf")] * 2
    for _ in range(batches):
        for place, (function, count) in enumerate(((call, CALLS), (add, ADDS))):
            wait()
            start = time.perf_counter()
            for _ in range(count):
                function()
            found[place] = min(found[place], (time.perf_counter() - start) / count)
    return found


def compare(benchmark, request, record, device, call, what, impl="triton", batches=BATCHES, **fields):
    """Measure a call beside `x.add(1)`, and record a line of each."""
    x = torch.zeros(8, device=device)
    benchmark.group = "host"
    benchmark.pedantic(call, rounds=3, warmup_rounds=3)
    batches = batches[request.config.getoption("--quick")]
    groups = [least(call, lambda: x.add(1), device, batches) for _ in range(GROUPS)]
    for name, seconds in zip((impl, "add"), zip(*groups, strict=True), strict=True):
        record(bench="host", impl=name, model=what, seconds=min(seconds), seconds_all=list(seconds), **fields)


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(benchmark, request, record, device, name, direction):
    run, inputs, grad = OPERATIONS[name](device)
    call = run if direction == "forward" else lambda: torch.autograd.grad(run(), inputs, grad)
    scoring = torch.no_grad() if direction == "forward" else contextlib.nullcontext()
    sizes = dict(prompt_tokens=PROMPT, responses=RESPONSES, response_tokens=EACH)
    with scoring:
        compare(benchmark, request, record, device, call, name, **sizes, **{"pass": direction})


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_tables(benchmark, request, record, device, direction):
    """The tables of a new row: of tiles of queries where it is scored, of tiles of keys, too, where it is trained on."""
    layout = Layout.build([PROMPT], [[EACH] * RESPONSES], device=device)

    def make():
        layout._tables.clear()
        layout.query_tiles(128, 64)
        if direction == "both":
            layout.key_tiles(32, 128, 64)

    compare(benchmark, request, record, device, make, "tables of a row", prompt_tokens=PROMPT, responses=RESPONSES,
            response_tokens=EACH, **{"pass": direction})  # fmt: skip


def test_layout(benchmark, request, record, device):
    """What a row's layout takes, once a row, on the CPU."""

    def make():
        return Layout.build([PROMPT], [[EACH] * RESPONSES])

    compare(benchmark, request, record, device, make, "layout of a row", prompt_tokens=PROMPT, responses=RESPONSES, response_tokens=EACH)  # fmt: skip


def stock_pass(device, direction):
    """The stock model's pass over one causal row of as many tokens, its vocabulary's logits left out."""
    model = models.build(NARROW, device).model
    ids = torch.ones(1, FEW.prompt + FEW.count * FEW.each, dtype=torch.long, device=device)
    call = lambda: model(input_ids=ids, use_cache=False)[0]  # noqa: E731
    weights = list(model.language_model.parameters())
    return call if direction == "forward" else lambda: torch.autograd.grad(call().sum(), weights)


def scoring_pass(device, direction):
    """YOJO's pass of the same model: isolated responses, their scores, and with gradients their loss."""
    encoded = ways.Twin(NARROW).encoded(FEW, rankings=list(range(1, FEW.count + 1)))
    model = models.build(NARROW, device)
    yojo.patch(model, mode="isolated", fuse="none")
    batch = yojo.Collator(ways.IdsOnly(model.yojo.config, 1200), model).pack([encoded])
    batch = {name: value.to(device) for name, value in batch.items()}
    weights = [*model.model.language_model.parameters(), *model.score.parameters()]
    if direction == "forward":
        return lambda: model(**batch).scores
    return lambda: torch.autograd.grad(model(**batch).loss, weights, allow_unused=True)


PASS = f"a pass of {NARROW.config['text_config']['num_hidden_layers']} layers"


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("make", [scoring_pass, stock_pass])
def test_pass(benchmark, request, record, device, make, direction):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        call = make(device, direction)
        with torch.no_grad() if direction == "forward" else contextlib.nullcontext():
            what, impl = (PASS, "triton") if make is scoring_pass else (f"{PASS}, stock", "sdpa")
            fields = FEW.fields() | {"pass": direction}
            compare(benchmark, request, record, device, call, what, impl, PASSES, **fields)
    finally:
        torch.set_num_threads(threads)
