"""Scoring N responses to one prompt: every way that people do it today, and YOJO, on one backbone in memory.

`--model-shape` picks the backbone, `--quick` few points and rounds, `--full` every combination instead of the sweeps.
Before a way is timed it must score as the stock model does (`bench.ways.Truth`).
"""

import pytest
import torch

from bench import ways
from bench.counting import flop_counter
from bench.sweeps import points_of
from bench.timing import clocked, figures, peak_bytes, skips_what_does_not_fit


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device = config.getoption("--device")
    points = points_of(device, config.getoption("--quick"), config.getoption("--full"))
    # All ways of a point behind each other, so that a clock that drifts is the same for all; but what is compiled once
    # for a way is used at all its points.
    order = [(variant, "none", point) for point in points for variant in ways.WAYS]
    if device == "cuda":
        order += [(variant, "auto", point) for variant in ways.FUSED for point in points]
    cases = [
        pytest.param(shape, variant, fuse, point, id=f"{shape}-{variant}-{fuse}-{point}")
        for shape in config.model_shapes
        for variant, fuse, point in order
    ]
    metafunc.parametrize("shape, variant, fuse, point", cases)


def prepare(request, device, shape):
    """(`ways.Scene`, `ways.Truth` of all points that were chosen, the ways that were tried out)."""
    wanted = [
        (ways.mode_of(item.callspec.params["variant"]), item.callspec.params["point"])
        for item in request.session.items
        if item.path == request.path and item.callspec.params["shape"] == shape
    ]
    # As users build models: not under the inference mode that the test runs in.
    with torch.inference_mode(False), torch.no_grad():
        scene = ways.Scene(shape, device)
        return scene, ways.Truth(scene, wanted), set()


@torch.inference_mode()
def test_score(benchmark, in_memory, device, record, request, shape, variant, fuse, point):
    scene, truth, tried = in_memory(shape, lambda: prepare(request, device, shape))
    make, mode = ways.WAYS[variant], ways.mode_of(variant)
    with skips_what_does_not_fit(device):
        how = scene.how(variant, fuse)
        if how is None:
            pytest.skip("the stock model's layers are fused by Liger-Kernel alone, which is not installed")
        if (variant, fuse) not in tried:
            truth.try_out(make, scene, mode, fuse)
            tried.add((variant, fuse))
        call = make(scene, point, fuse)
        counted = None
        for _ in range(1 if fuse == "none" else 3):  # the first passes compile
            scores = call()
        if fuse == "none" and variant != "flex":  # nobody sees into compiled code
            with flop_counter() as counter:
                scores = call()
            counted = float(counter.get_total_flops())
        benchmark.extra_info["error"] = truth.check(mode, point, scores)
        benchmark.group = f"{shape}: {point}"
        quick = {"seconds": 0.2, "fewest": 2, "most": 5} if request.config.getoption("--quick") else {}
        seconds = clocked(benchmark, call, device, **quick)
        if seconds is None:
            return
        peak = None if variant == "flex" and device.type != "cuda" else peak_bytes(call, device)
    record(
        bench="score",
        variant=variant,
        impl=ways.impl_of(scene, variant, fuse),
        fuse=how,
        mode="comparative" if mode == "permuted" else mode,
        permutations=ways.PERMUTATIONS if mode == "permuted" else None,
        **scene.fields(),
        flops_counted=counted,
        peak_bytes=peak,
        **point.fields(),
        **figures(seconds, float(scene.twin.flops_of(variant, fuse, point))),
        **{"pass": "forward"},
    )
