"""A scoring pass of a whole backbone, and what each measure against waste contributes, one after the other.

On a GPU the backbone has the shape of Qwen3-VL-4B and random weights (right for speed) in bfloat16, and the rows are one
prompt of text with its responses. On a CPU a tiny one runs in float32, so that the code is known to work. The steps:

    logits_and_states  vocabulary logits and every layer's hidden states are computed, as reward code usually does
    backbone           neither of them; head in plain PyTorch
    fused_head         the head's kernel
    last_rows          the last layer for the rows that are read alone
    fused_layers       norms, rotary embeddings and gated MLPs fused (`fuse` of the line says how)
    graphs             short rows replayed from CUDA graphs

The scores of every step are checked against those of the first before it is timed.
"""

import contextlib
import functools

import pytest
import torch
import transformers

import yojo
from bench import models
from bench.timing import figures, measure, peak_bytes
from yojo.costs.flops import scoring_flops
from yojo.patching import head
from yojo.patching.graphs import BUCKET
from yojo.patching.readings import Separators
from yojo_kernels import Layout, score_head

# prompt tokens, responses, response tokens (the separator among them)
ROWS = {"cuda": [(256, 4, 64), (1024, 4, 128), (2048, 16, 128), (6144, 16, 128), (7168, 64, 16)], "cpu": [(20, 3, 6)]}
STEPS = ("logits_and_states", "backbone", "fused_head", "last_rows", "fused_layers", "graphs")
SHORT = 2048  # tokens; rows up to here are replayed from graphs
TINY = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=100.0, mrope_section=[4, 2, 2]))  # fmt: skip
VISION = dict(
    depth=1,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    num_position_embeddings=16,
    deepstack_visual_indexes=[],
)  # fmt: skip; never run: the rows are text


def pytest_generate_tests(metafunc):
    rows = ROWS[metafunc.config.getoption("--device")]
    if metafunc.config.getoption("--quick"):
        rows = rows[:2]
    # Row by row and mode by mode, so that the first step's scores are at hand for the others.
    cases = [
        (row, mode, step)
        for row in rows
        for mode in ("isolated", "comparative")
        for step in STEPS
        if step != "graphs" or tokens_of(row) <= SHORT
    ]
    metafunc.parametrize(
        "row, mode, step", cases, ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part))
    )


def tokens_of(row):
    prompt, responses, each = row
    return prompt + responses * each


@functools.cache
def stock(device_type):
    """The backbone, unpatched."""
    text = models.QWEN3_VL_4B["text_config"] if device_type == "cuda" else TINY
    config = transformers.Qwen3VLConfig(
        text_config=text, vision_config=VISION | {"out_hidden_size": text["hidden_size"]}, tie_word_embeddings=True
    )
    dtype = torch.bfloat16 if device_type == "cuda" else torch.float32
    with torch.device(device_type):
        model = transformers.Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
    return model.eval()


@functools.lru_cache(maxsize=1)
def model_of(step, mode, device_type):
    """The backbone as a step runs it; patched anew for each, with the same head of scores of order 1."""
    model = yojo.unpatch(stock(device_type))
    number = STEPS.index(step)
    fuse = "auto" if number >= STEPS.index("fused_layers") else "none"
    yojo.patch(model, mode=mode, fuse=fuse, graphs=SHORT if step == "graphs" else 0)
    if number < STEPS.index("last_rows"):
        model.yojo.whole_last_layer = "measured without"
    generator = torch.Generator().manual_seed(0)
    head = model.score
    with torch.no_grad():
        for weight, gain in ((head.weight1, 1.0), (head.weight2, head.scale)):
            weight.copy_(torch.randn(weight.shape, generator=generator) * gain / weight.shape[1] ** 0.5)
    return model


@functools.lru_cache(maxsize=1)
def batch_of(row, mode, device_type, padded):
    """Packed inputs of one prompt and its responses: random ids, filled up to a bucket where `padded`."""
    prompt, responses, each = row
    branches = [responses * each] if mode == "comparative" else [each] * responses
    total = tokens_of(row)
    filling = -total % BUCKET if padded else 0
    generator = torch.Generator().manual_seed(total)
    layout = Layout.build([prompt] + [filling] * (filling > 0), [branches] + [[]] * (filling > 0))
    ids = torch.randint(0, 300, (1, total + filling), generator=generator)
    spans = [[[(prompt + n * each, prompt + (n + 1) * each - 1)] for n in range(responses)]]
    batch = {
        "input_ids": ids,
        "position_ids": layout.position.long()[None, None].expand(3, 1, -1),
        "layout": layout,
        "separators": Separators.build(spans),
    }
    return {name: value.to(device_type) for name, value in batch.items()}


@pytest.fixture(scope="module", autouse=True)
def gone_afterwards():
    """The backbone leaves the device's memory to the benchmarks that come next."""
    yield
    for cached in (first_scores, batch_of, model_of, stock):
        cached.cache_clear()


@contextlib.contextmanager
def head_of(step):
    """The value head in plain PyTorch before the step that fuses it."""
    impl = "reference" if STEPS.index(step) < STEPS.index("fused_head") else "auto"
    head.score_head = functools.partial(score_head, impl=impl)
    try:
        yield
    finally:
        head.score_head = score_head


def call_of(step, row, mode, device_type):
    """A function that makes the [N] scores of one row as a step does."""
    model = model_of(step, mode, device_type)
    batch = batch_of(row, mode, device_type, padded=step == "graphs")

    def with_logits():
        mask = torch.full((1, 1, 1, 1), float("nan"), dtype=model.dtype, device=device_type)
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        layout = batch["layout"].for_one_pass()
        output = type(model).forward(
            model, **inputs, layout=layout, attention_mask=mask, output_hidden_states=True, use_cache=False
        )
        assert output.logits.shape[1] == layout.num_tokens
        return model.score(output.hidden_states[-1][0], batch["separators"].read)

    return with_logits if step == "logits_and_states" else lambda: model(**batch).scores[0]


@functools.lru_cache(maxsize=1)
def first_scores(row, mode, device_type):
    """What the first step scores, which all others must."""
    with torch.inference_mode(), head_of(STEPS[0]):
        return call_of(STEPS[0], row, mode, device_type)().clone()


def test_forward(benchmark, device, record, row, mode, step):
    expected = first_scores(row, mode, device.type)
    with torch.inference_mode(), head_of(step):
        call = call_of(step, row, mode, device.type)
        for _ in range(3):  # compiles, captures
            scores = call()
        model = model_of(step, mode, device.type)
        # Of scores of order 1: float32 to rounding, bfloat16 to what 36 layers make of it in another order.
        allowed = 1e-5 if model.dtype == torch.float32 else 5e-2
        assert (scores - expected).abs().max() <= allowed * expected.abs().max() and expected.std() > 0.01
        graphs = model.yojo.fusion.graphs
        if step == "graphs" and device.type == "cuda":
            assert any(frame.graphs for frame in graphs.frames.values()), "nothing was captured"
        seconds = measure(call, device)
        benchmark.group = f"forward {mode}, {row[0]} + {row[1]} x {row[2]}"
        benchmark.pedantic(lambda: (call(), device.type == "cuda" and torch.cuda.synchronize()), rounds=3)
        text = model.config.get_text_config()
        fused = model.yojo.fusion.choose(device)[0]
        record(
            bench="forward",
            variant=f"yojo_{mode}",
            impl=step,
            fuse="none" if graphs is not None and fused == "compile" else fused,
            mode=mode,
            model="Qwen3-VL-4B shape" if device.type == "cuda" else "tiny",
            dtype=str(model.dtype).removeprefix("torch."),
            responses=row[1],
            prompt_tokens=row[0],
            response_tokens=row[2],
            head_dim=text.head_dim,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            peak_bytes=peak_bytes(call, device),
            **figures(seconds, float(scoring_flops(model, row[0], [row[2] - 1] * row[1], mode=mode).total)),
            **{"pass": "forward"},
        )
