"""`yojo profile`: its ranges hold what they are named after, its parts sum up, its command says what is wrong."""

import contextlib
import json
import sys

import pytest
import tiny
import torch
from family_cases import parametrize_families, patched, samples_of
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import yojo
from yojo.cli import app
from yojo.costs import profiling, trace
from yojo.costs.flops import batch_flops
from yojo.demo.backbone import BACKBONE
from yojo.patching import fuse

PARTS = list(profiling.PARTS)
QUICK = ["--prompt-tokens", "40", "--responses", "3", "--response-tokens", "5", "--device", "cpu"]


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    """Pass after pass is for figures, not for tests."""
    monkeypatch.setattr(profiling, "MOST", 3)


# ---- ranges ----


@parametrize_families
@torch.no_grad()
def test_every_part_runs_in_its_range(family, monkeypatch, reference_attention):
    """Count FLOPs by the innermost range: they must be those of the part it is named after."""
    model, collator = patched(family, "eager", mode="isolated")
    counted = {}
    for sample in samples_of(family).values():
        batch = collator.pack([collator.from_processed(*sample)])
        counter, open_ranges = FlopCounterMode(display=False), ["other"]
        counted.clear()
        seen = 0

        def since_last(counter=counter, open_ranges=open_ranges):
            nonlocal seen
            now = counter.get_total_flops()
            counted[open_ranges[-1]] = counted.get(open_ranges[-1], 0) + now - seen
            seen = now

        @contextlib.contextmanager
        def watch(name, open_ranges=open_ranges, since_last=since_last):
            since_last()
            open_ranges.append(name.removeprefix(trace.PREFIX))
            yield
            since_last()
            open_ranges.pop()

        monkeypatch.setattr(profiling, "record_function", watch)
        with profiling.ranges(model), counter:
            model(**batch)
        since_last()
        expected = batch_flops(model, batch, dense=True).to_dict()
        assert {part: count for part, count in counted.items() if count} == {p: n for p, n in expected.items() if n}


def test_ranges_leave_nothing_behind():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, collator = patched("qwen3_vl")
    name = model.config.get_text_config()._attn_implementation
    before, hooks = ALL_ATTENTION_FUNCTIONS[name], hooks_of(model)
    with pytest.raises(RuntimeError, match="stop"), profiling.ranges(model):
        assert ALL_ATTENTION_FUNCTIONS[name] is not before
        raise RuntimeError("stop")
    assert ALL_ATTENTION_FUNCTIONS[name] is before
    assert hooks_of(model) == hooks


def hooks_of(model):
    return {name: [*m._forward_hooks.values(), *m._forward_pre_hooks.values()] for name, m in model.named_modules()}


def annotated(part, start, end):
    return {"cat": "user_annotation", "name": f"yojo: {part}", "ts": start, "dur": end - start, "args": {}}


NESTED = [
    {"cat": "cpu_op", "name": "aten::mm", "ts": 1, "dur": 5, "args": {"correlation": 9}},
    {"cat": "user_annotation", "name": "ProfilerStep#1", "ts": 0, "dur": 900, "args": {}},
    annotated("other", 0, 100),  # a first pass
    annotated("mlp", 10, 60),
    annotated("other", 200, 300),
    annotated("norms", 210, 260),
    annotated("attention", 220, 240),
    annotated("norms", 262, 270),
    annotated("head", 280, 300),
]


def test_time_belongs_to_the_innermost_range():
    expected = {"other": 10 + 2 + 10, "norms": 10 + 20 + 8, "attention": 20, "head": 20}
    got = trace.seconds_by_part(NESTED[::-1], on_gpu=False, skip=1)
    assert got == pytest.approx({part: us * 1e-6 for part, us in expected.items()})
    both = trace.seconds_by_part(NESTED, on_gpu=False)
    assert sum(both.values()) == pytest.approx(200e-6) and both["mlp"] == pytest.approx(50e-6)


def test_kernels_belong_to_the_range_they_are_launched_in():
    """They run later, some when the host has long gone on; the trace of a GPU says which call launched which."""
    events = list(NESTED)
    launches = [(50, "mlp"), (205, "other"), (215, "norms"), (230, "attention"), (239, "attention"), (290, "head")]
    for place, (at, _) in enumerate(launches):
        runtime = ("cuda_driver", "cuLaunchKernelEx") if place % 2 else ("cuda_runtime", "cudaLaunchKernel")
        events.append({"cat": runtime[0], "name": runtime[1], "ts": at, "dur": 1, "args": {"correlation": 100 + place}})
        kernel = {"cat": "kernel", "name": "k", "ts": at + 400, "dur": 2**place, "args": {"correlation": 100 + place}}
        events.append(kernel)
    events[-1]["cat"] = "gpu_memcpy"
    events.append({"cat": "gpu_user_annotation", "name": "yojo: mlp", "ts": 405, "dur": 70, "args": {}})
    events.append({"cat": "kernel", "name": "unlinked", "ts": 900, "dur": 64, "args": {}})
    got = trace.seconds_by_part(events, on_gpu=True, skip=1)
    expected = {"other": 2 + 64, "norms": 4, "attention": 8 + 16, "head": 32}
    assert got == pytest.approx({part: us * 1e-6 for part, us in expected.items()})


# ---- profiles ----


def check(figures):
    """The parts sum up to the pass, the FLOPs to the total, and rates are what they say."""
    parts = {part["part"]: part for part in figures["parts"]}
    assert list(parts) == PARTS
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(figures["seconds"])
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    assert sum(part["flops"] or 0 for part in parts.values()) == figures["flops"] > 0
    assert figures["flops_per_second"] == pytest.approx(figures["flops"] / figures["seconds"])
    assert figures["single_passes_flops"] >= figures["flops"]
    mlp = parts["mlp"]
    assert mlp["share_of_peak"] == pytest.approx(mlp["flops"] / mlp["seconds"] / figures["peak_flops_per_second"])
    assert parts["gaps"]["seconds"] == 0 and parts["norms"]["flops"] is None  # on a CPU nothing waits for launches
    for part in ("attention", "projections", "mlp", "norms", "head"):
        assert parts[part]["seconds"] > 0
    return parts


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mistral3", "gemma2"])
def test_profile_of_a_batch(family):
    model, collator = patched(family, mode="isolated")
    prompt, responses = next(iter(samples_of(family).values()))
    batch = collator.pack([collator.from_processed(prompt, responses, rankings=list(range(1, len(responses) + 1)))])
    result = profiling.profile_pass(model, batch, setting={"model": family}, notes=["a note"])
    figures = json.loads(json.dumps(result.to_dict()))
    parts = check(figures)
    assert (parts["vision"]["seconds"] > 0) == ("pixel_values" in prompt)
    assert figures["model"] == family and figures["notes"] == ["a note"] and figures["mode"] == "isolated"


def test_a_profile_on_a_gpu_counts_what_it_is_idle(monkeypatch):
    model, collator = patched("llama")
    batch = collator.pack([collator.from_processed(*samples_of("llama")["text"])])
    monkeypatch.setattr(profiling, "_median_seconds", lambda call, device: 10.0)
    monkeypatch.setattr(profiling, "_traced_seconds", lambda call, base, device: {"mlp": 6.0, "other": 1.0})
    on_cpu = profiling.profile_pass(model, batch)
    assert {p.name: p.seconds for p in on_cpu.parts if p.seconds} == pytest.approx({"mlp": 60 / 7, "other": 10 / 7})
    assert profiling.attribute({"mlp": 6.0, "other": 1.0}, 10.0, on_gpu=True) == {"mlp": 6, "other": 1, "gaps": 3}
    # A traced pass that took longer than an untraced one leaves no gap.
    slow = profiling.attribute({"mlp": 9.0, "other": 3.0}, 10.0, on_gpu=True)
    assert slow == pytest.approx({"mlp": 7.5, "other": 2.5})


# ---- the command ----


def invoke(*arguments):
    return CliRunner().invoke(app, ["profile", *QUICK, *map(str, arguments)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """dict: kind -> model folder."""
    root = tmp_path_factory.mktemp("models")
    found = {"plain": root / "plain", "config": root / "config", "reward": root / "reward", "empty": root / "empty"}
    tiny.build("qwen3").save_pretrained(found["plain"])
    tiny.build("qwen2_5_vl").config.save_pretrained(found["config"])
    model, collator = patched("llama", tokenizer=tiny.tokenizer(), mode="isolated")
    yojo.RewardModel(model, collator.processor).save_pretrained(found["reward"])
    found["empty"].mkdir()
    return found


@pytest.mark.parametrize(
    "kind, mode, notes",
    [
        ("plain", "comparative", ["the value head is random"]),
        ("config", "comparative", ["no weights: they are random, at the sizes of its config.json", "head is random"]),
        ("reward", "isolated", []),
    ],
)
def test_command_on_each_kind_of_folder(folders, tmp_path, kind, mode, notes):
    result = invoke("--model", folders[kind], "--json", tmp_path / "new" / "p.json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "new" / "p.json").read_text())
    check(figures)
    assert figures["mode"] == mode and figures["tokens"] == 40 + 3 * 6 and figures["model"] == kind
    assert len(figures["notes"]) == len(notes)
    for got, expected in zip(figures["notes"], notes, strict=True):
        assert expected in got and f"note: {got}" in result.output
    rows = [line.split("|")[1].strip() for line in result.output.splitlines() if line.startswith("| ")]
    shown = [profiling.PARTS[part] for part in PARTS if part not in ("vision", "gaps")]
    assert rows == ["part", *shown, "whole pass"]
    picture = (tmp_path / "out" / "profile.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_command_with_images_and_another_mode(tmp_path):
    """The processor of the folder makes the prompt; what the images leave of its tokens are words."""
    options = ["--images", "2", "--image-size", "32x48", "--mode", "isolated", "--prompt-tokens", "60"]
    result = invoke("--model", BACKBONE, *options, "--json", tmp_path / "p.json")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "p.json").read_text())
    parts = check(figures)
    assert parts["vision"]["seconds"] > 0 and parts["vision"]["flops"] > 0
    assert figures["tokens"] == 60 + 3 * 6 and figures["mode"] == "isolated" and figures["image_size"] == [32, 48]
    result = invoke(*options, "--json", tmp_path / "demo.json")
    demo = json.loads((tmp_path / "demo.json").read_text())
    assert demo["model"] == "demo" and "trained in comparative mode" in demo["notes"][0]


def test_half_precision(folders, tmp_path):
    for kind in ("plain", "config", "reward"):
        result = invoke("--model", folders[kind], "--dtype", "bfloat16", "--json", tmp_path / "p.json")
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "p.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "./nowhere"], "no such folder: ./nowhere"),
        (["--model", "empty"], "is neither a reward model (yojo_config.json) nor a model (config.json)"),
        (["--mode", "single"], "--mode must be one of comparative, isolated, got 'single'"),
        (["--dtype", "int8"], "--dtype must be one of bfloat16, float16, float32, got 'int8'"),
        (["--device", "tpu9"], "--device must be cpu or cuda, got 'tpu9'"),
        (["--device", "meta"], "--device must be cpu or cuda, got 'meta'"),
        (["--image-size", "12"], "--image-size must be height x width in pixels, such as 448x448, got '12'"),
        (
            ["--model", "plain", "--images", "1"],
            "holds neither a processor nor a tokenizer",
        ),
        (["--images", "9"], "a prompt with 9 images of this size takes"),
    ],
)
def test_command_says_what_is_wrong(folders, options, message):
    options = [str(folders.get(option, option)) for option in options]
    result = invoke(*options)
    assert result.exit_code == 2 and "error: " in result.output and message in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_without_a_gpu():
    result = invoke("--device", "cuda")
    assert result.exit_code == 2 and "torch finds no CUDA device" in result.output


@pytest.mark.parametrize("option", ["--prompt-tokens", "--responses", "--response-tokens"])
def test_command_refuses_nothing(option):
    assert invoke(option, "0").exit_code == 2


def test_without_matplotlib_there_is_still_a_table(folders, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = invoke("--model", folders["plain"], "--json", tmp_path / "p.json", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "error: the picture needs matplotlib: pip install 'yojo[demo]'" in result.output
    assert "whole pass" in result.output
    check(json.loads((tmp_path / "p.json").read_text()))


def test_only_patched_models_on_known_devices():
    with pytest.raises(ValueError, match="needs a patched model"):
        profiling.profile_pass(tiny.build("llama"), {})
    model, collator = patched("llama")
    batch = collator.pack([collator.from_processed(*samples_of("llama")["text"])])
    with pytest.raises(ValueError, match="the model is on meta"):
        profiling.profile_pass(model.to("meta"), batch)


def test_compiled_layers_are_profiled_as_they_are_and_compiled_again_after(monkeypatch):
    monkeypatch.setattr(fuse, "BACKEND", "eager")
    model, collator = patched("llama", mode="isolated", fuse="compile")
    samples = list(samples_of("llama").values())[:2]
    batch = collator.pack([collator.from_processed(prompt, responses) for prompt, responses in samples])
    result = profiling.profile_pass(model, batch, notes=["a note"])
    assert (
        result.notes[0] == "a note" and "fuse='compile', graphs=0; its layers ran with fuse='none'" in result.notes[1]
    )
    assert {part.name: part.seconds > 0 for part in result.parts}["mlp"] and model.yojo.fuse == "compile"
    with torch.no_grad():
        for _ in range(2):
            model(**batch)
    assert model.yojo.fusion.compiled
