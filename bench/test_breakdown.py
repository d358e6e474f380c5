"""Where the time of one scoring pass goes, part by part (`yojo profile`), on the backbones of the other benchmarks."""

import pytest

from bench import models, ways
from bench.sweeps import MIDDLE, QUICK, Point
from bench.timing import figures, skips_what_does_not_fit
from yojo.profiling import profile_pass


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


@pytest.fixture(scope="module")
def scene_of(device):
    """Function (shape) -> `ways.Scene`; one shape at a time in memory."""
    kept = {}

    def prepare(shape):
        if shape not in kept:
            kept.clear()
            kept[shape] = None  # what did not fit once is not tried again
            with skips_what_does_not_fit(device):
                kept[shape] = ways.Scene(shape, device)
        if kept[shape] is None:
            pytest.skip(f"{shape} does not fit into the memory of {device}")
        return kept[shape]

    return prepare


def test_breakdown(benchmark, scene_of, device, record, shape, mode, fuse, point):
    scene = scene_of(shape)
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
    text = scene.base.config.get_text_config()
    for part in result.parts:
        if part.seconds > 0:
            record(
                bench="forward",
                variant=f"yojo_{mode}",
                impl="profile",
                part=part.name,
                fuse=how,
                mode=mode,
                model=shape,
                dtype=str(scene.dtype).removeprefix("torch."),
                head_dim=models.head_dim(text),
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
                **point.fields(),
                **figures([part.seconds], None if part.flops is None else float(part.flops)),
                **{"pass": "forward"},
            )
