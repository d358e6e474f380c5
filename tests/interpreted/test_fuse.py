"""Decoder layers fused by Liger-Kernel's kernels, interpreted, and compiled layers whose attention is the Triton kernel."""

import functools
import sys

import pytest
import tiny
import torch
import triton
import triton.language as tl
from fuse_cases import (
    batches_of,
    check_ordinary_inputs,
    check_training,
    lora,
    module_dicts,
    pair,
    text_row,
    unpatched_like_new,
)

from bench import models, ways
from bench.sweeps import Point
from yojo.patching import attention as patched_attention
from yojo.patching import fuse, last_layer
from yojo.patching.layers import NORMS
from yojo_kernels import multi_response_attention, tuning

pytest.importorskip("liger_kernel")


@triton.jit
def rsqrt(x):
    return tl.rsqrt(x)


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Triton's interpreter lacks two things that Liger's kernels use: scalar floats as tensors, and libdevice."""
    import liger_kernel.ops.geglu
    import liger_kernel.ops.rms_norm
    import numpy
    from triton.runtime import interpreter

    stock = interpreter._implicit_cvt

    def convert(argument):
        if isinstance(argument, float):
            return tl.tensor(interpreter.TensorHandle(numpy.array([argument], numpy.float32), tl.float32), tl.float32)
        return stock(argument)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", convert)
        patch.setattr(liger_kernel.ops.rms_norm, "rsqrt", rsqrt)
        patch.setattr(liger_kernel.ops.geglu, "tanh", tanh)
        yield


@pytest.fixture(autouse=True)
def whole_layers(request, monkeypatch):
    """All layers run on all rows, so that they can be counted; but where a test is about the last one."""
    if "last_layer" not in request.function.__name__:
        monkeypatch.setattr(last_layer, "LARGEST_SHARE", 0)


@pytest.fixture()
def calls(monkeypatch):
    """How often each of Liger's functions ran."""
    from yojo.patching import liger

    count = {}

    def counted(name, function, *args):
        count[name] = count.get(name, 0) + 1
        return function(*args)

    for name in ("LigerRMSNormFunction", "LigerRopeFunction"):
        apply = functools.partial(counted, name, getattr(liger, name).apply)
        monkeypatch.setattr(liger, name, type(name, (), {"apply": staticmethod(apply)}))
    gated = {
        name: type(name, (), {"apply": staticmethod(functools.partial(counted, "gated", function.apply))})
        for name, function in liger.GATED.items()
    }
    monkeypatch.setattr(liger, "GATED", gated)
    return count


def expected_calls(model, passes=1):
    """What a pass of the model must call: every norm of its layers, and one rotary embedding and MLP a layer."""
    layers = model.yojo.fusion.layers
    norms = sum(type(module).__name__ in NORMS for layer in layers for module in layer.modules())
    counts = {"LigerRMSNormFunction": norms, "LigerRopeFunction": len(layers), "gated": len(layers)}
    return {name: count * passes for name, count in counts.items()}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_liger_scores_and_trains_as_unfused(family, calls):
    model, plain, collator = pair(family, "liger")
    batches = batches_of(family, collator)
    check_training(model, plain, batches[-1])
    assert calls == expected_calls(model)


def test_rows_of_several_samples(calls):
    model, plain, collator = pair("qwen2_5_vl", "liger")
    check_training(model, plain, batches_of("qwen2_5_vl", collator)[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_what_ran(reentrant, calls):
    model, plain, collator = pair("qwen3", "liger")
    for network in (model, plain):
        network.gradient_checkpointing_enable({"use_reentrant": reentrant})
        network.enable_input_require_grads()
        network.train()
    check_training(model, plain, text_row(collator, [9], [[3, 4]]))
    if reentrant:
        assert calls == expected_calls(model, passes=2)
    else:  # recomputing stops at the last thing that backward needs
        assert calls["LigerRopeFunction"] == calls["gated"] == 2 * 2


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_lora(family, calls):
    model, plain, collator = pair(family, "liger")
    model, plain = lora(model), lora(plain)
    check_training(model, plain, batches_of(family, collator)[-1])
    assert calls == expected_calls(model.get_base_model())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_float16_is_as_exact_as_unfused(family):
    """The interpreter cannot add bfloat16."""
    model, plain, collator = pair(family, "liger")
    batches = [text_row(collator, [15], [[4, 9, 3 + i]]) for i in range(4)]
    with torch.no_grad():
        exact = [plain.double()(**batch).scores for batch in batches]
        errors = []
        for network in (model, plain):
            network.half()
            errors.append([(network(**b).scores - e).square().mean() for b, e in zip(batches, exact, strict=True)])
    fused, unfused = (sum(error).sqrt() for error in errors)
    assert 0 < fused <= 1.5 * unfused


def test_what_liger_would_compute_otherwise_is_left_to_the_model(calls):
    model, plain, collator = pair("qwen3", "liger")
    batch = text_row(collator, [9], [[3, 4]])
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        # Queries and keys come out of their projections in float16, and their norms have weights in float32.
        assert (model(**batch).scores - plain(**batch).scores).abs().max() <= 1e-2
    assert calls["LigerRMSNormFunction"] == 2 * 2 and calls["gated"] == 2 and "LigerRopeFunction" in calls
    calls.clear()
    with torch.no_grad():
        assert torch.equal(model.double()(**batch).scores, plain.double()(**batch).scores)
    assert not calls


def test_a_second_backward_is_refused():
    model, _, collator = pair("llama", "liger")
    scores = model(**text_row(collator, [9], [[3, 4]])).scores
    scores.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="Liger-Kernel's MLP can run backward once per forward"):
        scores.sum().backward()


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_ordinary_inputs_are_unchanged_to_the_bit(family):
    check_ordinary_inputs(family, "liger")


def test_a_compiled_model_leaves_liger_out(calls):
    model, plain, collator = pair("llama", "liger")
    batch = text_row(collator, [12], [[4, 3]])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert (compiled(**batch).scores - plain(**batch).scores).abs().max() <= 2e-6
    assert not calls


def test_nothing_global_is_rebound():
    def globals_of_transformers():
        modules = {name: module for name, module in sys.modules.items() if name.startswith("transformers.models.")}
        named = {name: {key: id(value) for key, value in vars(module).items()} for name, module in modules.items()}
        for name, module in modules.items():
            for key, value in vars(module).items():
                if isinstance(value, type) and value.__module__ == name:
                    named[f"{name}.{key}"] = {attribute: id(entry) for attribute, entry in vars(value).items()}
        return named

    plain = tiny.build("gemma3")
    before = globals_of_transformers()
    assert len(before) > 100 and "apply_rotary_pos_emb" in before["transformers.models.gemma3.modeling_gemma3"]
    model, _, collator = pair("gemma3", "liger")
    model(**batches_of("gemma3", collator)[-1])
    after = globals_of_transformers()
    assert {name: after[name] for name in before} == before
    assert module_dicts(model) != module_dicts(plain)
    assert unpatched_like_new(model, "gemma3")


# ---- compiled layers around the Triton kernel ----


@pytest.mark.parametrize("training", [False, True])
def test_one_graph_for_all_rows_with_the_triton_kernel(training, monkeypatch):
    """Tables of one tile or none among them, windows in two layers of three."""
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    monkeypatch.setattr(fuse, "BACKEND", backend)
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Tile(32, 32, 1, 1))  # a quarter of the steps
    monkeypatch.setattr(
        patched_attention,
        "multi_response_attention",
        functools.partial(multi_response_attention, impl="triton"),
    )
    model, plain, collator = pair("gemma3_text", "compile")
    rows = ([9], [[3]]), ([9], [[3]]), ([30, 7], [[15, 10], [4, 9, 3]]), ([5, 6, 9], [[2], [2, 2], [3, 4, 5]])
    for prompts, branches in rows[: 3 if training else 4]:
        batch = text_row(collator, prompts, branches)
        if training:
            check_training(model, plain, batch)
        else:
            with torch.no_grad():
                assert (model(**batch).scores - plain(**batch).scores).nan_to_num(0.0).abs().max() <= 2e-6
    assert len(graphs) == 2  # one for sliding layers, one for the others
    for nodes in graphs:
        assert sum("yojo.attention" in node for node in nodes) == 1
        assert not any("yojo." in node and "tiles" in node for node in nodes)  # made before the first layer


def test_the_last_layer_runs_fused_on_the_rows_that_are_read(monkeypatch):
    monkeypatch.setattr(last_layer, "FEWEST_FLOPS", 0)
    model, plain, collator = pair("qwen3", "liger")
    batch = text_row(collator, [30, 20], [[4, 3], [5]])
    check_training(model, plain, batch)
    with torch.no_grad():
        scores = model(**batch).scores
        for network in (model, plain):
            network.yojo.whole_last_layer = "for comparison"
        assert (model(**batch).scores - scores).nan_to_num(0.0).abs().max() <= 2e-6
        assert (plain(**batch).scores - scores).nan_to_num(0.0).abs().max() <= 2e-6


# ---- what the benchmarks compare YOJO with ----


@pytest.mark.parametrize("variant", ["released", "prefix_cache"])
def test_stock_ways_of_the_benchmarks_run_with_the_same_parts(calls, monkeypatch, variant):
    text = models.SMALL_QWEN3_VL["text_config"] | {"num_hidden_layers": 2}
    tiny_shape = models.Shape("Qwen3VL", models.SMALL_QWEN3_VL | {"text_config": text}, 2)
    monkeypatch.setitem(models.SHAPES["cpu"], "tiny", tiny_shape)
    scene, point = ways.Scene("tiny", torch.device("cpu")), Point("image", 24, 2, 4)
    make = ways.WAYS[variant]
    with torch.inference_mode():
        expected = make(scene, point, "none")()
        assert not calls and scene.how(variant, "auto") is None and scene.how(variant, "liger") == "liger"
        call = make(scene, point, "liger")
        assert (call() - expected).abs().max() <= 1e-5
        assert set(calls) >= {"LigerRMSNormFunction", "LigerRopeFunction"}
        assert torch.equal(call(), call())
    scene.stock()
    assert not any("forward" in module.__dict__ for module in scene.base.modules())
