"""Multi-response attention against every other way to compute it, forward and backward, at real sizes on a GPU.

On a CPU the same code runs on tiny rows in float32, so that it is known to work. Every way is checked against a float64
computation before it is timed.
"""

import functools

import pytest
import torch

from bench import attention_peers as peers
from bench.attention_peers import SHAPES, one
from bench.timing import figures, measure, peak_bytes
from yojo_kernels import Layout, gluon_attention, launch, tuning

QUICK = (one(2048, 4, 128), one(8192, 8, 256))  # on a GPU
# variant and impl of a result line -> the layout whose pairs it computes
WAYS = {
    ("yojo_isolated", "triton"): "isolated",
    ("yojo_isolated", "triton_unpacked"): "isolated",
    ("yojo_isolated", "gluon"): "isolated",
    ("yojo_comparative", "triton"): "comparative",
    ("flex", "flex"): "isolated",
    ("flex", "flex_tuned"): "isolated",
    ("flex", "flex_split"): "isolated",
    ("kv_gather", "varlen"): "isolated",
    ("sdpa", "sdpa"): "dense",
}


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        shapes = SHAPES[metafunc.config.getoption("--device")]
        if metafunc.config.getoption("--quick"):
            shapes = [shape for shape in shapes if shape in QUICK] or shapes
        metafunc.parametrize("shape", shapes, ids=lambda shape: str(shape).replace(", ", "-").replace(" ", "_"))


@functools.lru_cache(maxsize=1)
def case_of(shape, dtype, device):
    """The case of a shape; the last one is kept, since the tests of a shape follow each other."""
    return peers.Case(shape, dtype, device)


def make(case, variant, impl):
    """(call, name of what computes it)."""
    if impl == "gluon":
        reason = gluon_attention.obstacle(case.device, case.query.dtype, case.shape.head_dim)
        if reason is not None:
            pytest.skip(f"the Gluon forward cannot run: {reason}")
        return peers.yojo(case, WAYS[variant, impl], impl), impl
    if impl == "triton_unpacked":
        if not (case.device.type == "cuda" or launch.INTERPRETED):
            pytest.skip("no kernel runs on a CPU")
        group = case.shape.heads // case.shape.kv_heads
        tile = tuning.attention("forward", case.shape.head_dim, case.query.dtype, case.device)
        if tuning.packed_heads(group, tile.block_m) == 1:
            pytest.skip("no heads are packed")
        return peers.unpacked(case), impl
    if variant.startswith("yojo"):
        name = "triton" if case.device.type == "cuda" or launch.INTERPRETED else "reference"
        return peers.yojo(case, WAYS[variant, impl], name), name
    if variant == "kv_gather":
        return peers.gathered(case)
    if variant == "sdpa":
        return peers.dense_sdpa(case), "sdpa"
    if impl == "flex_split":
        return peers.flex_split(case), impl
    if impl == "flex_tuned":
        if case.device.type != "cuda":
            pytest.skip("FlexAttention has nothing to tune on a CPU")
        dim = case.shape.head_dim
        return peers.flex(case, peers.tuned_options(dim, case.query.dtype, case.device, one(8192, 8, 256, head_dim=dim))), impl  # fmt: skip
    return peers.flex(case), impl


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("variant, impl", WAYS, ids=[f"{v}-{i}" for v, i in WAYS])
def test_attention(benchmark, device, record, shape, variant, impl, direction):
    if variant == "flex" and direction == "backward" and device.type != "cuda":
        pytest.skip("FlexAttention has no backward on a CPU")
    if impl in ("triton_unpacked", "gluon") and direction == "backward":
        pytest.skip("the backward is that of the other Triton kernels")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        case = case_of(shape, dtype, device)
        inputs = (case.query, case.key, case.value)
        if variant == "flex" and device.type != "cuda":
            inputs = tuple(tensor.detach() for tensor in inputs)
        call, impl_name = make(case, variant, impl)
        layout_name = WAYS[variant, impl]
        run = functools.partial(call, *inputs)
        output = run()
        case.check(layout_name, [output], ["output"])
        if direction == "forward":
            del output
            timed = torch.no_grad()(run)
            # On a CPU nobody sees into FlexAttention.
            peak = None if variant == "flex" and device.type != "cuda" else peak_bytes(timed, device)
        else:
            grads = torch.autograd.grad(output, inputs, case.grad, retain_graph=True)
            case.check(layout_name, grads, ["grad query", "grad key", "grad value"])
            del grads
            timed = functools.partial(torch.autograd.grad, output, inputs, case.grad, retain_graph=True)
            peak = peak_bytes(lambda: torch.autograd.grad(run(), inputs, case.grad), device)
        seconds = measure(timed, device)
    except torch.OutOfMemoryError:
        pytest.skip(f"does not fit into the memory of {device}")
    benchmark.group = f"attention {direction}, {shape}"
    benchmark.pedantic(lambda: (timed(), device.type == "cuda" and torch.cuda.synchronize()), rounds=3)
    record(
        bench="attention",
        variant=variant,
        impl=impl_name,
        mode={"isolated": "isolated", "comparative": "comparative", "dense": None}[layout_name],
        dtype=str(dtype).removeprefix("torch."),
        peak_bytes=peak,
        **shape.fields(),
        **figures(seconds, case.flops(layout_name, direction)),
        **{"pass": direction},
    )


def test_flex_mask(benchmark, device, record, shape):
    """What FlexAttention's block mask of a row costs, once per batch, apart from the attention itself."""
    case = case_of(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    _record_preparation(benchmark, device, record, lambda: peers.isolated_mask(case), "flex_mask", shape.fields())


def test_tiles(benchmark, device, record, shape):
    """What our tile tables of a row cost, once per batch: forward and backward, in the device's memory."""
    layout = case_of(shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device).isolated
    _record_preparation(benchmark, device, record, _tables(layout, device), "tile_tables", shape.fields())


def test_tiles_of_a_long_row(benchmark, record):
    """64,000 tokens and 1,000 branches, on the CPU, as a collator would make them: meant to take under 2 ms."""
    shape = peers.Shape((14_000, 6_000, 24_000, 4_000, 500), ((16,) * 200,) * 4 + ((12,) * 200,))
    layout = Layout.build(shape.prompts, shape.responses)
    cpu = torch.device("cpu")
    _record_preparation(benchmark, cpu, record, _tables(layout, cpu), "tile_tables_cpu", shape.fields())


def _tables(layout, device):
    tiles = {
        kernel: tuning.tile(kernel, 128, torch.bfloat16, tuning.chip_of(device) if device.type == "cuda" else 90)
        for kernel in ("forward", "query_grad", "key_grad")
    }

    def make_tables():
        layout._tables.clear()
        forward = tiles["forward"]
        layout.query_tiles(forward.block_m // tuning.packed_heads(4, forward.block_m), forward.block_n)  # 32:8 heads
        layout.query_tiles(*tiles["query_grad"][:2])
        return layout.key_tiles(*tiles["key_grad"][:2], 66, group=4)

    return make_tables


def _record_preparation(benchmark, device, record, call, name, fields):
    seconds = measure(call, device, rounds=20)
    benchmark.group = "once per batch"
    benchmark.pedantic(call, rounds=5)
    record(bench="attention", variant=None, impl=name, mode="isolated", **fields, **figures(seconds))


def test_matmul(benchmark, device, record):
    """The rate of a large matrix product: the ceiling of everything above."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    seconds = measure(lambda: a @ b, device)
    benchmark.group = "matrix product"
    benchmark.pedantic(lambda: (a @ b, device.type == "cuda" and torch.cuda.synchronize()), rounds=3)
    record(
        bench="attention",
        variant=None,
        impl="matmul",
        dtype=str(dtype).removeprefix("torch."),
        **figures(seconds, 2.0 * size**3),
    )
