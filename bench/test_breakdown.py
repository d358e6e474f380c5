"""Where the time of one scoring pass goes, part by part (`yojo profile`), on the backbones of the other benchmarks."""

import pytest

from bench import ways
from bench.sweeps import MIDDLE, QUICK, Point
from bench.timing import figures, skips_what_does_not_fit
from yojo.costs.profiling import profile_pass


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device, quick = config.getoption("--device"), config.getoption("--quick")
    (kind, prompt), count, each = MIDDLE[device]
    points = QUICK[device][-1:] if quick else [Point(kind, prompt, n, each) for n in (count, 4 * count)]
    cases = [
        pytest.param(shape, mode, fuse, point, id=f"{shape}-{mode}-{fuse}-{point}")
        for shape in config.model_shapes
        for fuse in (("none", "auto") if device == "cuda" else ("none",))
        for mode in ("comparative", "isolated")
        for point in points
    ]
    metafunc.parametrize("shape, mode, fuse, point", cases)


def test_breakdown(benchmark, in_memory, device, record, shape, mode, fuse, point):
    scene = in_memory(shape, lambda: ways.Scene(shape, device))
    with skips_what_does_not_fit(device):
        model = scene.patched(mode, fuse)
        how = scene.base.yojo.fusion.choose(device)[0]
        if fuse == "auto" and how == "compile":
            pytest.skip(
                "compiled layers have no parts to tell apart, and there is no Liger-Kernel to fuse them otherwise"
            )
        batch = scene.packed(mode, [scene.encoded(point)])
        benchmark.group = f"{shape}: one pass, {point}"
        result = benchmark.pedantic(profile_pass, (model, batch))
    for part in result.parts:
        if part.seconds > 0:
            record(
                bench="forward",
                variant=f"yojo_{mode}",
                impl="profile",
                part=part.name,
                fuse=how,
                mode=mode,
                **scene.fields(),
                **point.fields(),
                **figures([part.seconds], None if part.flops is None else float(part.flops)),
                **{"pass": "forward"},
            )
