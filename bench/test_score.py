"""Scoring N responses to one prompt: every way that people do it today, and YOJO, on one backbone in memory.

`--model-shape` picks the backbone, `--quick` few points and rounds, `--full` every combination instead of the sweeps.
Before a way is timed it must score as the stock model does (`bench.ways.Truth`); the cases run way by way, so that what
has been compiled for one is used at all its points.
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench import models, ways
from bench.timing import clocked, figures, peak_bytes, skips_what_does_not_fit
from bench.ways import Point

# By device: prompts (kind, tokens), responses, tokens of a response. The first prompt is the shortest. All sweeps go
# through MIDDLE: on a GPU what the paper speaks of, four responses of 100 tokens to an image.
PROMPTS = {
    "cuda": [("text", 256), ("image", 1024), ("image", 2048), ("video", 8192), ("video", 16384)],
    "cpu": [("text", 32), ("image", 128), ("image", 256), ("video", 1024), ("video", 2048)],
}
COUNTS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = {"cuda": (32, 100, 128, 512), "cpu": (4, 12, 16, 64)}
MIDDLE = {"cuda": (("image", 2048), 4, 100), "cpu": (("image", 256), 4, 12)}
QUICK = {
    "cuda": [Point("text", 256, 4, 512), Point("image", 2048, 1, 100), Point("image", 2048, 4, 100)],
    "cpu": [Point("text", 16, 2, 16), Point("image", 32, 1, 8), Point("image", 32, 4, 8)],
}


def points_of(device_type, quick=False, full=False):
    """The points to measure, in order.

    The sweeps change one of N, prompt and length at a time; short prompts with long responses, where there is little to
    gain, are among them.
    """
    if quick:
        return QUICK[device_type]
    prompts, lengths = PROMPTS[device_type], LENGTHS[device_type]
    (middle, count, each), shortest = MIDDLE[device_type], prompts[0]
    if full:
        chosen = [(*prompt, n, length) for prompt in prompts for length in lengths for n in COUNTS]
    else:
        chosen = [(*middle, n, each) for n in COUNTS]
        chosen += [(*prompt, count, each) for prompt in prompts]
        chosen += [(*middle, count, length) for length in lengths]
        chosen += [(*shortest, count, lengths[-1]), (*shortest, 1, each)]
    return list(dict.fromkeys(Point(*numbers) for numbers in chosen))


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device = config.getoption("--device")
    points = points_of(device, config.getoption("--quick"), config.getoption("--full"))
    ways_to = [(variant, "none") for variant in ways.WAYS]
    if device == "cuda":
        ways_to += [(variant, "auto") for variant in ways.FUSED]
    cases = [
        pytest.param(shape, variant, fuse, point, id=f"{shape}-{variant}-{fuse}-{point}")
        for shape in config.model_shapes
        for variant, fuse in ways_to
        for point in points
    ]
    metafunc.parametrize("shape, variant, fuse, point", cases)


@pytest.fixture(scope="module")
def prepared(request, device):
    """Function (shape) -> (`ways.Scene`, `ways.Truth` of all points that were chosen); one shape at a time in memory."""
    kept = {}

    def prepare(shape):
        if shape not in kept:
            kept.clear()
            with skips_what_does_not_fit(device):
                scene = ways.Scene(shape, device)
                wanted = [
                    (ways.mode_of(item.callspec.params["variant"]), item.callspec.params["point"])
                    for item in request.session.items
                    if item.path == request.path and item.callspec.params["shape"] == shape
                ]
                kept[shape] = scene, ways.Truth(scene, wanted), set()
        return kept[shape]

    return prepare


@torch.inference_mode()
def test_score(benchmark, prepared, device, record, request, shape, variant, fuse, point):
    scene, truth, tried = prepared(shape)
    make, mode = ways.WAYS[variant], ways.mode_of(variant)
    with skips_what_does_not_fit(device):
        if (variant, fuse) not in tried:
            truth.try_out(make, scene, mode, fuse)
            tried.add((variant, fuse))
        call = make(scene, point, fuse)
        counted = None
        for _ in range(1 if fuse == "none" else 3):  # the first passes compile
            scores = call()
        if fuse == "none" and variant != "flex":  # nobody sees into compiled code
            with FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS) as counter:
                scores = call()
            counted = float(counter.get_total_flops())
        benchmark.extra_info["error"] = truth.check(mode, point, scores)
        benchmark.group = f"{shape}: {point}"
        quick = {"seconds": 0.2, "fewest": 2, "most": 5} if request.config.getoption("--quick") else {}
        seconds = clocked(benchmark, call, device, **quick)
        if seconds is None:
            return
        peak = None if variant == "flex" and device.type != "cuda" else peak_bytes(call, device)
        fused = "none" if fuse == "none" else scene.base.yojo.fusion.choose(device)[0]
    text = scene.base.config.get_text_config()
    record(
        bench="score",
        variant=variant,
        impl=ways.impl_of(variant, fuse, device),
        fuse=fused,
        mode="comparative" if mode == "permuted" else mode,
        permutations=min(ways.PERMUTATIONS, math.factorial(point.count)) if mode == "permuted" else None,
        model=shape,
        dtype=str(scene.dtype).removeprefix("torch."),
        head_dim=models.head_dim(text),
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        flops_counted=counted,
        peak_bytes=peak,
        **point.fields(),
        **figures(seconds, float(scene.flops(point)[variant])),
        **{"pass": "forward"},
    )


# torch has no formulas for what its attention on CPUs comes to.
CPU_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, out_shape=None, **__: (
        sdpa_flop_count(query, key, value)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, query, key, value, *_, out_shape=None, **__: sdpa_backward_flop_count(grad, query, key, value)
    ),
}
