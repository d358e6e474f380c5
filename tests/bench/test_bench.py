"""The benchmarks run on a CPU at tiny sizes, check what they time, and write result lines that make a report."""

import copy
import functools
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch

from bench import goals, models, points, report, savings, schema, sweeps, timing, ways
from bench import test_train as train
from yojo.costs.profiling import PARTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def the_family_is_there(request):
    """Tests of a backbone are skipped where the installed transformers does not have its family."""
    values = request.node.callspec.params.values() if hasattr(request.node, "callspec") else ()
    for family, reason in tiny.LACKING.items():
        if any(isinstance(value, str) and family in value for value in values):
            pytest.skip(reason)


def run(folder, *options):
    """What a run of benchmarks in a process of its own printed, and its exit status."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        *options,
        "--benchmark-only",
        "--device",
        "cpu",
        "-p",
        "no:cacheprovider",
    ]
    # A worker of pytest-xdist would have pytest-benchmark measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--results", str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.stdout + done.stderr, done.returncode


def test_a_run_measures_and_gives_a_report(tmp_path, monkeypatch):
    """A few benchmarks of the quick run; all of them soak, below."""
    some = ["bench/test_score.py", "bench/test_head_loss.py", "--quick", "--commit", "abc1234"]
    printed, status = run(tmp_path / "results", *some, "-k", "(isolated or single-none) and 4x8 or head")
    assert status == 0, printed[-3000:]
    lines = schema.read(tmp_path / "results" / "cpu.jsonl")
    assert {line["commit"] for line in lines} == {"abc1234"} and {line["gpu"] for line in lines} == {None}
    check_head_and_losses(*([line for line in lines if line["bench"] == name] for name in ("head", "loss")))
    scores = {line["variant"]: line for line in lines if line["bench"] == "score"}
    assert set(scores) == {"single", "yojo_isolated"} and "N single passes" in printed
    assert 0.9 < scores["single"]["flops_counted"] / scores["single"]["flops"] < 1.2
    monkeypatch.setattr(savings, "COUNTS", (1, 4))  # of seven
    monkeypatch.setattr(savings, "count", functools.cache(savings.count.__wrapped__))
    check_report(tmp_path, scores["yojo_isolated"])


def check_report(folder, isolated):
    readme = folder / "README.md"
    readme.write_text("# A project\n\n<!-- benchmarks -->\n<!-- /benchmarks -->\n")
    places = ["--results", str(folder / "results"), "--docs", str(folder / "docs"), "--readme", str(readme)]
    assert report.main(places) == 0
    assert report.main([*places, "--check"]) == 0
    text = (folder / "docs" / "benchmarks.md").read_text()
    assert points.seconds(isolated["seconds"]) in text and "YOJO isolated" in readme.read_text()
    assert "abc1234" in text and text.count("not measured") >= sum(not goal.anywhere for goal in goals.GOALS)
    for picture in re.findall(r"\((benchmarks/[^)]+)\)", text):
        assert (folder / "docs" / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.soak
def test_the_quick_run_measures_everything(tmp_path):
    printed, status = run(tmp_path / "results", "bench", "--quick", "--commit", "abc1234")
    assert status == 0, printed[-3000:]
    lines = schema.read(tmp_path / "results" / "cpu.jsonl")
    assert {line["commit"] for line in lines} == {"abc1234"} and {line["gpu"] for line in lines} == {None}
    by_bench = {name: [line for line in lines if line["bench"] == name] for name in schema.BENCHES}
    check_attention(by_bench["attention"])
    check_head_and_losses(by_bench["head"], by_bench["loss"])
    check_forward([line for line in by_bench["forward"] if line["part"] is None])
    check_breakdown([line for line in by_bench["forward"] if line["part"] is not None])
    check_scores(by_bench["score"])
    check_training(by_bench["train"])
    check_host(by_bench["host"])
    assert "N single passes" in printed and "yojo_isolated reference forward" in printed

    (isolated,) = [line for line in by_bench["score"] if line["variant"] == "yojo_isolated" and line["responses"] == 4]
    check_report(tmp_path, isolated)


def check_attention(lines):
    measured = {(line["variant"], line["impl"], line["pass"]) for line in lines}
    both = [("yojo_isolated", "reference"), ("yojo_comparative", "reference"), ("kv_gather", "sdpa"), ("sdpa", "sdpa")]
    expected = {(*way, direction) for way in both for direction in ("forward", "backward")}
    expected |= {("flex", "flex", "forward"), ("flex", "flex_split", "forward")}
    expected |= {(None, name, None) for name in ("matmul", "flex_mask", "tile_tables", "tile_tables_cpu")}
    assert measured == expected
    (long_row,) = [line for line in lines if line["impl"] == "tile_tables_cpu"]
    tokens = long_row["prompt_tokens"] + 1000 * long_row["response_tokens"]
    assert long_row["responses"] == 1000 and 63_000 < tokens < 65_000


def check_head_and_losses(heads, losses):
    measured = {(line["responses"], line["pass"]) for line in heads}
    assert measured == {(count, direction) for count in (4, 16) for direction in ("forward", "backward", "both")}
    assert all(line["flops"] > 0 for line in heads)
    assert len(losses) == 2 * 4 * 3


def check_forward(lines):
    steps = ("logits_and_states", "backbone", "fused_head", "last_rows", "fused_layers", "graphs")
    measured = [(line["mode"], line["impl"]) for line in lines]
    assert measured == [(mode, step) for mode in ("isolated", "comparative") for step in steps]
    flops = {(line["mode"], line["impl"]): line["flops"] for line in lines}
    for mode in ("isolated", "comparative"):
        # So short a row is computed whole.
        assert 0 < flops[mode, "last_rows"] == flops[mode, "fused_head"] == flops[mode, "backbone"]
    assert {line["fuse"] for line in lines} == {"none"}  # on a CPU


def check_breakdown(lines):
    for mode in ("comparative", "isolated"):
        parts = {line["part"]: line for line in lines if line["mode"] == mode}
        assert {"vision", "attention", "projections", "mlp", "norms", "head"} <= set(parts) <= set(PARTS)
        assert all(parts[name]["flops"] > 0 for name in ("vision", "attention", "projections", "mlp", "head"))


def check_host(lines):
    """Every call with `x.add(1)` beside it, and none as cheap as that; nothing where kernels are interpreted."""
    found = goals.host_times(lines)
    passes = {"a pass of 36 layers": "triton", "a pass of 36 layers, stock": "sdpa"}
    calls = {
        (name, direction)
        for name in ("attention", "head", "loss", "tables of a row", *passes)
        for direction in ("forward", "both")
    }
    assert found.keys() == calls | {("layout of a row", None)}
    for (name, _), times in found.items():
        assert times[passes.get(name, "triton")]["seconds"] > times["add"]["seconds"] > 0


def check_scores(lines):
    """Every way at every point; what is counted beforehand is what torch counts, or less where a mask hides pairs."""
    found = {(line["variant"], line["prompt_tokens"], line["responses"]): line for line in lines}
    sizes = [(point.prompt, point.count) for point in sweeps.QUICK["cpu"]]
    assert found.keys() == {(variant, *size) for variant in ways.WAYS for size in sizes}
    for (variant, *_), line in found.items():
        if variant == "flex":
            assert line["flops_counted"] is None and line["peak_bytes"] is None  # nobody sees into compiled code
            continue
        assert 0.9 < line["flops_counted"] / line["flops"] < (1.6 if "yojo" in variant else 1.2), variant
        assert line["peak_bytes"] > 0
        assert line["permutations"] == (4 if variant == "yojo_permuted" else None)
    for size in sizes:
        flops = {variant: found[(variant, *size)]["flops"] for variant in ways.WAYS}
        assert flops["yojo_isolated"] <= flops["yojo_comparative"] < flops["released"]
        assert flops["yojo_isolated"] == flops["flex"] == flops["prefix_cache"]  # all layers, in rows so short
        assert flops["single"] == flops["single_batch"] >= flops["yojo_isolated"]
    bytes_of = {variant: found[variant, 32, 4]["peak_bytes"] for variant in ways.WAYS}
    assert bytes_of["yojo_comparative"] < bytes_of["released"] and bytes_of["single"] < bytes_of["single_batch"]


def check_training(lines):
    found = {(line["variant"], line["samples"]): line for line in lines}
    assert found.keys() == {("released", 1)} | {(f"yojo_{m}", n) for m in ("comparative", "isolated") for n in (1, 4)}
    for (variant, samples), line in found.items():
        assert line["responses"] == 4 * samples and line["prompt_tokens"] == 32 * samples
        assert 0.9 < line["flops_counted"] / line["flops"] < 1.6, variant
    assert found["released", 1]["flops"] > found["yojo_comparative", 1]["flops"]


@pytest.mark.parametrize(
    "options, problem",
    [
        (
            ["--model-shape", "large"],
            "--model-shape large: on cpu there are small, small-molmo2, small-qwen2.5-vl, and all",
        ),
        pytest.param(["--model-shape", "qwen3-vl-4b"], "on cpu there are small", marks=pytest.mark.soak),
        pytest.param(["--quick", "--full"], "--quick and --full exclude each other", marks=pytest.mark.soak),
    ],
)
def test_wrong_options_are_errors(tmp_path, options, problem):
    printed, status = run(tmp_path, "bench/test_score.py", *options)
    assert status == pytest.ExitCode.USAGE_ERROR and problem in printed, printed


# ---- backbones, prompts and ways ----


@pytest.mark.parametrize("device, name", [(device, name) for device, names in models.SHAPES.items() for name in names])
def test_prompts_have_the_tokens_that_are_asked_for(device, name):
    """Most of them of what is seen; and one pass saves nearly N times the FLOPs behind a long prompt, not a short one."""
    twin = ways.Twin(models.SHAPES[device][name])
    for kind, tokens in sweeps.PROMPTS[device]:
        encoded = twin.encoded(sweeps.Point(kind, tokens, 2, 5))
        assert len(encoded.prompt_ids) == tokens
        seen = (encoded.token_types["mm_token_type_ids"] > 0).sum()
        assert seen == 0 if kind == "text" else 0.5 * tokens < seen < tokens
    for point in (*ways.CALIBRATION[device], train.SMALL[device], train.SAMPLE[device], *sweeps.QUICK[device]):
        assert len(twin.encoded(point).prompt_ids) == point.prompt
    (kind, tokens), count, each = sweeps.MIDDLE[device]
    flops = twin.flops(sweeps.Point(kind, tokens, count, each))
    assert 3.5 < flops["single"] / flops["yojo_isolated"] < 4
    short = twin.flops(sweeps.Point("text", 16, 4, 64))
    assert 1 < short["single"] / short["yojo_isolated"] < 1.5


@pytest.mark.soak
@pytest.mark.parametrize("name", models.SHAPES["cuda"])
@torch.inference_mode()
def test_the_real_shapes_run(name, monkeypatch):
    """At their own widths, with few layers and words."""
    shape = models.SHAPES["cuda"][name]
    config = copy.deepcopy(shape.config)
    small = models.SHAPES["cpu"]["small-molmo2" if shape.family == "Molmo2" else "small"].config
    config |= {key: value for key, value in small.items() if key.endswith("_id")}
    few = ("vocab_size", "additional_vocab_size")
    config["text_config"] |= {"num_hidden_layers": 1} | {k: v for k, v in small["text_config"].items() if k in few}
    if shape.family == "Molmo2":
        config["vision_config"]["num_hidden_layers"] = 1
        config["adapter_config"]["vision_feature_layer"] = [0, 0]
    else:
        config["vision_config"]["depth"] = 1
        layers = {"deepstack_visual_indexes": [0], "fullatt_block_indexes": [0]}
        config["vision_config"] |= {key: value for key, value in layers.items() if key in config["vision_config"]}
    monkeypatch.setitem(models.SHAPES["cpu"], name, models.Shape(shape.family, config, shape.frame))
    # In float64: in float32, rounding alone is as large as the bound here.
    scene, point = ways.Scene(name, torch.device("cpu")).raised(), sweeps.Point("image", 512, 2, 8)
    expected = ways.single(scene, point, "none")()
    assert expected.isfinite().all() and expected.std() > 1e-3
    assert (ways.WAYS["yojo_isolated"](scene, point, "none")() - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize(
    "name, kind",
    [
        ("small-molmo2", "video"),
        ("small-qwen2.5-vl", "image"),
        pytest.param("small-molmo2", "image", marks=pytest.mark.soak),
        pytest.param("small-qwen2.5-vl", "video", marks=pytest.mark.soak),
    ],
)
def test_every_way_scores_alike(name, kind):
    """On the families that the quick run does not measure; FlexAttention apart, which takes long to compile."""
    scene = ways.Scene(name, torch.device("cpu"))
    points = [sweeps.Point(kind, 128, 3, 6)]
    truth = ways.Truth(scene, [(mode, point) for mode in ways.MODES for point in points])
    for variant, make in ways.WAYS.items():
        if variant == "flex":
            continue
        with torch.inference_mode():
            truth.try_out(make, scene, ways.mode_of(variant), "none")
            for point in points:
                truth.check(ways.mode_of(variant), point, make(scene, point, "none")())


@pytest.fixture(scope="module")
def small():
    scene = ways.Scene("small", torch.device("cpu"))
    point = sweeps.Point("image", 32, 4, 8)
    return scene, point, ways.Truth(scene, [("isolated", point), ("comparative", point)])


def test_wrong_scores_are_not_timed(small):
    scene, point, truth = small
    right = truth.scores["isolated", point]
    truth.check("isolated", point, right.float())
    for wrong in (right.roll(1), right + 1e-4, right * float("nan"), truth.scores["comparative", point]):
        with pytest.raises(AssertionError, match="error"):
            truth.check("isolated", point, wrong)


def test_a_way_that_mistakes_one_response_for_another_is_found(small):
    scene, _, truth = small

    def mistaken(scene, point, fuse):
        call = ways.single(scene, point, fuse)
        return lambda: call().flip(0)

    with torch.inference_mode():
        truth.try_out(ways.single, scene, "isolated", "none")
        with pytest.raises(AssertionError, match="error"):
            truth.try_out(mistaken, scene, "isolated", "none")


def test_wrong_gradients_are_not_timed(monkeypatch):
    training = train.Training("small", torch.device("cpu"))
    training.check("released", "none")
    training.check("yojo_isolated", "none")
    loss_of = train.loss_of
    monkeypatch.setattr(
        train,
        "loss_of",
        lambda scene, *rest: lambda: [loss * 1.001 for loss in loss_of(scene, *rest)()],
    )
    with pytest.raises(AssertionError, match="relative error"):
        training.check("yojo_isolated", "none")


def test_what_does_not_fit_is_skipped_with_its_reason():
    cpu = torch.device("cpu")
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate")):
        with pytest.raises(pytest.skip.Exception, match="does not fit into the memory of cpu: .*allocat|out of memory"):
            with timing.skips_what_does_not_fit(cpu):
                raise error
    with pytest.raises(RuntimeError, match="something else"), timing.skips_what_does_not_fit(cpu):
        raise RuntimeError("something else")


def test_what_did_not_fit_is_given_back():
    """Already for the next test: the error, which pytest keeps, holds no tensor of the call."""
    cpu, kept = torch.device("cpu"), []

    def call():
        tensor = torch.zeros(8)
        kept.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(pytest.skip.Exception) as caught, timing.skips_what_does_not_fit(cpu):
        call()
    assert caught.value is not None and kept[0]() is None


def test_a_point_whose_truth_does_not_fit_is_skipped_alone(monkeypatch):
    stock_scores = ways.stock_scores

    def full(scene, mode, point, cached=False):
        if point.count == 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock_scores(scene, mode, point, cached)

    monkeypatch.setattr(ways, "stock_scores", full)
    scene = ways.Scene("small", torch.device("cpu"))
    large, point = sweeps.Point("image", 32, 64, 4), sweeps.Point("image", 32, 3, 4)
    truth = ways.Truth(scene, [("isolated", large), ("isolated", point)])
    truth.check("isolated", point, stock_scores(scene, "isolated", point))
    with pytest.raises(pytest.skip.Exception, match="does not fit into memory"):
        truth.check("isolated", large, torch.zeros(64))


def test_a_wrong_truth_is_found(monkeypatch):
    """Prefix caches that do not give what N passes give."""
    behind_a_cache = ways.behind_a_cache
    monkeypatch.setattr(ways, "behind_a_cache", lambda *args: lambda: behind_a_cache(*args)() + 1e-5)
    with pytest.raises(AssertionError, match="a prefix cache errs by"):
        ways.Truth(ways.Scene("small", torch.device("cpu")), [("isolated", sweeps.Point("image", 32, 3, 4))])


def test_fused_single_passes_are_counted_as_packed_ones():
    twin, point = ways.Twin(models.SHAPES["cuda"]["qwen3-vl-4b"]), sweeps.Point("image", 1024, 1, 100)
    for variant in ("single", "single_batch"):
        assert twin.flops_of(variant, "liger", point) == twin.flops_of("yojo_isolated", "liger", point)
        assert twin.flops_of(variant, "none", point) > twin.flops_of(variant, "liger", point)
    assert twin.flops_of("yojo_isolated", "liger", point) == twin.flops_of("yojo_isolated", "none", point)


def test_a_shape_that_transformers_lacks_is_named(monkeypatch):
    shape = models.Shape("Molmo9", {}, 1)
    with pytest.raises(models.MissingFamily, match="has no Molmo9: install a newer one"):
        models.build(shape, "meta")


def test_sweeps_change_one_thing_at_a_time():
    for device in ("cpu", "cuda"):
        found = sweeps.points_of(device)
        (kind, prompt), count, each = sweeps.MIDDLE[device]
        assert len(set(found)) == len(found)
        assert {p.count for p in found if (p.kind, p.prompt, p.each) == (kind, prompt, each)} == set(sweeps.COUNTS)
        assert [(p.kind, p.prompt) for p in found if (p.count, p.each) == (count, each)] == sorted(
            sweeps.PROMPTS[device], key=lambda one: one[1] != prompt
        )
        assert len(sweeps.points_of(device, full=True)) == 7 * 5 * 4


# ---- result lines ----


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"seconds": None}, "seconds is null"),
        ({"seconds": "1"}, "seconds is '1', not of type float"),
        ({"responses": True}, "responses is True, not of type int"),
        ({"variant": "ours"}, "variant is 'ours'"),
        ({"extra": 1}, "extra is not in the schema"),
        ({"seconds": 3.0}, "seconds is not among seconds_all"),
        ({"seconds_all": [], "seconds": 1.0}, "seconds is not among seconds_all"),
        ({"flops": 1.0, "tflops": None}, "flops without tflops"),
        ({"gpu": "NVIDIA H200", "cpu": None}, "a GPU without its driver"),
        ({"gpu": "NVIDIA H200", "driver": "580.1"}, "either gpu or cpu"),
        ({"cpu": None}, "either gpu or cpu"),
        ({"prompt": "audio"}, "prompt is 'audio'"),
        ({"date": "today"}, "date is 'today'"),
    ],
)
def test_a_wrong_result_line_is_found(tmp_path, capsys, change, problem):
    good = dict.fromkeys(schema.FIELDS) | {
        "bench": "attention",
        "impl": "triton",
        "seconds": 1.5,
        "seconds_all": [1, 2.0],
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "cpu": "a CPU, 2 threads",
        "date": "2026-11-24",
    }
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(good) + "\n")
    assert schema.main([file]) == 0
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n{\n")
    assert schema.main([file]) == 1
    printed = capsys.readouterr().out
    assert f"{file}:2: {problem}" in printed and f"{file}:3: " in printed and f"{file}:1: " not in printed


def test_results_in_the_repository_keep_to_the_schema():
    assert schema.main(sorted((ROOT / "bench" / "results").glob("*.jsonl"))) == 0
