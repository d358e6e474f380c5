"""Fused decoder layers through torch.compile, and the choice between what can fuse (Liger's are in interpreted/)."""

import contextlib
import copy
import functools
import logging

import pytest
import tiny
import torch
import transformers
from family_cases import patched, samples_of
from fuse_cases import (
    batches_of,
    check_ordinary_inputs,
    check_training,
    lora,
    module_dicts,
    pair,
    row_of,
    text_row,
    unpatched_like_new,
)

import yojo
from yojo.patching import fuse
from yojo.patching.state import unwrap

SLIDING = ("gemma2", "gemma3", "gemma3_text", "paligemma2")  # two kinds of layers
BLOCKS = ("molmo2", "gemma3")  # rows with images have blocks, rows without have none


@pytest.fixture()
def graphs(monkeypatch, reference_attention):
    """The list of graphs compiled so far, each run as it is; attention is the reference's, compiled or not."""
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(fuse, "BACKEND", backend)
    return compiled


# ---- scores and gradients ----


# Of the others, those that differ in their decoders' modules; all of them soak.
KINDS_OF_DECODERS = ("qwen3_vl", "molmo2", "gemma3", "llama")


@pytest.mark.parametrize(
    "family", [f if f in KINDS_OF_DECODERS else pytest.param(f, marks=pytest.mark.soak) for f in tiny.FAMILIES]
)
def test_compiled_layers_score_and_train_as_they_are(family, graphs):
    model, plain, collator = pair(family, "compile")
    batches = batches_of(family, collator)
    check_training(model, plain, batches[0])
    assert not graphs  # the first pass shows what is needed
    for batch in batches:
        check_training(model, plain, batch)
    assert len(graphs) == (1 + (family in SLIDING)) * (1 + (family in BLOCKS))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_with_true_compilers(backend, monkeypatch):
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    monkeypatch.setattr(fuse, "BACKEND", counter)
    model, plain, collator = pair("qwen3_vl", "compile")
    batches = batches_of("qwen3_vl", collator)
    for batch in [batches[0], *batches]:
        check_training(model, plain, batch)
    assert counter.frame_count == 1


@pytest.mark.soak
def test_bfloat16_is_as_exact_as_unfused():
    model, plain, collator = pair("llama", "compile")
    batches = [text_row(collator, [30 + i, 9], [[4, 9, 3 + i], [2, 5, 5]]) for i in range(6)]
    with torch.no_grad():
        exact = [plain.double()(**batch).scores for batch in batches]
        errors = []
        for network in (model, plain):
            network.bfloat16()
            network(**batches[0])
            errors.append([(network(**b).scores - e).square().mean() for b, e in zip(batches, exact, strict=True)])
    fused, unfused = (sum(error).sqrt() for error in errors)
    assert 0 < fused <= 1.5 * unfused
    assert len(model.yojo.fusion.compiled) == 1


def test_autocast(graphs):
    model, plain, collator = pair("llama", "compile")
    batch = text_row(collator, [12], [[4, 3]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**batch)
        assert torch.equal(model(**batch).scores, plain(**batch).scores)
    assert len(graphs) == 1


# ---- graphs ----


def test_one_graph_for_all_lengths(graphs):
    """Numbers of tokens, samples and branches vary; some agree with sizes of the model or with each other."""
    model, plain, collator = pair("llama", "compile")
    rows = (
        ([9], [[3]]),
        ([9], [[3]]),
        ([24], [[3, 3]]),  # 32 tokens, as many as the model has features
        ([1], [[1]]),
        ([7, 8, 9], [[2], [2, 2], [2, 2, 2]]),
        ([40], [[5] * 9]),
        ([4, 4, 4, 4], [[3], [3], [3], [3]]),
    )
    with torch.no_grad():
        for prompts, branches in rows:
            batch = text_row(collator, prompts, branches)
            assert (model(**batch).scores - plain(**batch).scores).nan_to_num(0.0).abs().max() <= 2e-6
    assert len(graphs) == 1


def test_more_layers_than_torch_would_compile(graphs, monkeypatch):
    build = tiny._text(transformers.Gemma3TextConfig, **(tiny.GEMMA3 | SIXTEEN_LAYERS))
    monkeypatch.setitem(tiny.FAMILIES, "sixteen", (build, tiny._text_prompts))
    model, plain, collator = pair("sixteen", "compile")
    with torch.no_grad():
        for length in (20, 21, 22):
            batch = text_row(collator, [length], [[4, 7]])
            assert (model(**batch).scores - plain(**batch).scores).abs().max() <= 1e-5
    assert len(graphs) == 2  # one for sliding layers, one for the others


SIXTEEN_LAYERS = {"num_hidden_layers": 16, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 4}


def test_a_graph_for_each_way_to_run(graphs):
    model, plain, collator = pair("llama", "compile")
    batches = [text_row(collator, [length], [[4, 3]]) for length in (12, 13, 14)]
    for count, mode in enumerate((torch.no_grad, torch.inference_mode, torch.enable_grad), start=1):
        with mode():
            for batch in batches * 2:
                assert torch.equal(model(**batch).scores, plain(**batch).scores)
        assert len(graphs) == count


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_what_ran(graphs, reentrant):
    model, plain, collator = pair("qwen3_vl", "compile")
    for network in (model, plain):
        network.yojo.whole_last_layer = "layers are counted"
        network.gradient_checkpointing_enable({"use_reentrant": reentrant})
        network.enable_input_require_grads()
        network.train()
    runs = []
    forward = fuse._run_compiled
    fuse_run = functools.partial(_counted, runs, forward)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuse, "_run_compiled", fuse_run)
        batches = batches_of("qwen3_vl", collator)
        for batch in [batches[0], *batches]:
            check_training(model, plain, batch)
    assert len(runs) == 2 * 2 * len(batches)  # two layers, forward and again in backward, from the second pass on
    assert len(graphs) == 1 + reentrant  # its forward runs without gradients


def _counted(calls, function, *args, **kwargs):
    calls.append(function)
    return function(*args, **kwargs)


@pytest.mark.parametrize("before", [False, True])
def test_lora(graphs, before):
    """The separator's trained embedding has gradients, so the first layer's inputs are like those of the others."""
    if before:
        networks = []
        for choice in ("compile", "none"):
            tokenizer = tiny.tokenizer(with_separator=True)
            network = tiny.build("qwen3")
            network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            network = lora(network)
            networks.append(yojo.patch(network, tokenizer, mode="isolated", head_dim=16, fuse=choice))
        model, plain = networks
        plain.load_state_dict(model.state_dict())
        collator = yojo.Collator(tokenizer, model)
    else:
        model, plain, collator = pair("qwen3", "compile")
        model, plain = lora(model), lora(plain)
    for network in (model, plain):
        unwrap(network).yojo.whole_last_layer = "layers are counted"
    batches = batches_of("qwen3", collator)
    for batch in [batches[0], *batches]:
        check_training(model, plain, batch)
    assert len(graphs) == 1


def test_a_compiled_model_compiles_its_layers_itself(graphs):
    model, plain, collator = pair("llama", "compile")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = text_row(collator, [12, 5], [[4, 3], [2]])
    with torch.no_grad():
        for _ in range(2):
            assert (compiled(**batch).scores - plain(**batch).scores).nan_to_num(0.0).abs().max() <= 2e-6
    assert not graphs


# ---- what stays as it was ----


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "llama"])
def test_ordinary_inputs_are_unchanged_to_the_bit(family, graphs):
    check_ordinary_inputs(family, "compile")
    assert len(graphs) == 1 + (family in SLIDING)  # for the rows scored in between


def test_unpatch_leaves_nothing_on_any_module(graphs):
    model, _, collator = pair("gemma3", "compile")
    with torch.no_grad():
        for batch in batches_of("gemma3", collator):
            model(**batch)
    assert module_dicts(model) != module_dicts(tiny.build("gemma3"))
    assert unpatched_like_new(model, "gemma3")


def test_copies_are_independent(graphs):
    model, plain, collator = pair("llama", "compile")
    batch = batches_of("llama", collator)[0]
    for _ in range(2):
        check_training(model, plain, batch)
    twin = copy.deepcopy(model)
    assert twin.yojo.fusion is not model.yojo.fusion and twin.yojo.fusion.layers[0] is twin.model.layers[0]
    check_training(twin, plain, batch)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.zero_()
    assert (twin(**batch).scores - model(**batch).scores).nan_to_num(0.0).abs().max() > 1e-3
    yojo.unpatch(twin)
    check_training(model, plain, batch)
    assert len(graphs) == 1


# ---- the choice ----


def test_patching_again_switches():
    model, _ = patched("llama", fuse="compile")
    head = model.score
    assert yojo.patch(model).yojo.fuse == "compile"
    layer = model.model.layers[0]
    assert yojo.patch(model, fuse="none") is model and model.yojo.fuse == "none"
    assert "forward" not in layer.__dict__ and model.score is head
    assert yojo.patch(model, fuse="auto").yojo.fuse == "auto" and "forward" in layer.__dict__
    with pytest.raises(ValueError, match="fuse must be one of auto, none, liger, compile, got 'flash'"):
        yojo.patch(model, fuse="flash")
    assert model.yojo.fuse == "auto"


def test_auto_leaves_the_cpu_alone(graphs, caplog):
    model, plain, collator = pair("llama", None)
    assert model.yojo.fuse == "auto"
    batch = batches_of("llama", collator)[0]
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "yojo.patching.fuse"):
        for _ in range(2):
            assert torch.equal(model(**batch).scores, plain(**batch).scores)
    assert not graphs
    assert "decoder layers: none (layers are fused on CUDA devices, and on cpu only when asked for)" in caplog.text


def test_what_auto_would_use(monkeypatch):
    monkeypatch.setattr(fuse, "_has_liger", lambda: False)
    assert fuse.implementation("cpu")[0] == "none"
    assert fuse.implementation("cuda") == (
        "compile",
        "torch.compile of each decoder layer; liger-kernel is not installed",
    )
    monkeypatch.setattr(fuse, "_has_liger", lambda: True)
    assert fuse.implementation("cuda")[0] == "liger"
    cuda = torch.device("cuda")
    assert patched("llama")[0].yojo.fusion.choose(cuda)[0] == "liger"
    assert unknown_family().yojo.fusion.choose(cuda) == (
        "compile",
        "torch.compile of each decoder layer; Liger-Kernel has no GraniteRMSNorm",
    )


def unknown_family(**options):
    config = transformers.GraniteConfig(**tiny.TEXT)
    return yojo.patch(transformers.AutoModelForCausalLM.from_config(config), tiny.tokenizer(), head_dim=16, **options)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_liger_has_every_listed_family(family, monkeypatch):
    monkeypatch.setattr(fuse, "_has_liger", lambda: True)
    assert patched(family)[0].yojo.fusion.liger_obstacle is None


def test_what_liger_cannot_do_is_refused(monkeypatch):
    monkeypatch.setattr(fuse, "_has_liger", lambda: False)
    model = tiny.build("llama")
    before = module_dicts(model)
    with pytest.raises(ValueError, match=r"liger-kernel is not installed; pip install 'yojo\[liger\]', or use fuse="):
        yojo.patch(model, tiny.tokenizer(), fuse="liger")
    assert module_dicts(model) == before
    monkeypatch.setattr(fuse, "_has_liger", lambda: True)
    with pytest.raises(ValueError, match="cannot fuse GraniteForCausalLM: Liger-Kernel has no GraniteRMSNorm; use"):
        unknown_family(fuse="liger")
    monkeypatch.setattr(fuse, "_interpreted", lambda: False)
    model, collator = patched("llama", fuse="liger")
    with pytest.raises(ValueError, match="fuse='liger' needs the model on a CUDA device, it is on cpu"):
        model(**batches_of("llama", collator)[0])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_liger_lacks_other_activations(activation, monkeypatch):
    monkeypatch.setattr(fuse, "_has_liger", lambda: True)
    config = transformers.LlamaConfig(**tiny.TEXT, hidden_act=activation)
    model = yojo.patch(transformers.AutoModelForCausalLM.from_config(config), tiny.tokenizer())
    assert model.yojo.fusion.liger_obstacle == "Liger-Kernel does not have all parts of LlamaDecoderLayer"


def failing(graph, inputs):
    raise RuntimeError("no compiler here")


def test_auto_goes_on_unfused_where_compiling_fails(monkeypatch, caplog):
    monkeypatch.setattr(fuse, "_automatic", lambda device, obstacle: ("compile", "as on CUDA"))
    monkeypatch.setattr(fuse, "BACKEND", failing)
    model, plain, collator = pair("llama", "auto")
    batch = batches_of("llama", collator)[0]
    with torch.no_grad(), caplog.at_level(logging.WARNING, "yojo.patching.fuse"):
        for _ in range(4):
            assert torch.equal(model(**batch).scores, plain(**batch).scores)
    assert caplog.text.count("decoder layers run unfused: torch.compile failed with BackendCompilerFailed") == 1
    assert model.yojo.fusion.choose(torch.device("cpu"))[0] == "none"


def test_compile_that_fails_is_an_error_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(fuse, "BACKEND", failing)
    model, _, collator = pair("llama", "compile")
    batch = batches_of("llama", collator)[0]
    with torch.no_grad(), contextlib.suppress(RuntimeError):
        model(**batch)
    with torch.no_grad(), pytest.raises(RuntimeError, match="fuse='compile' failed, use fuse='auto' or fuse='none'"):
        model(**batch)


def test_layers_that_accelerate_moves_about_are_left_alone(graphs):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for choice in ("auto", "compile"):
        model, plain, collator = pair("llama", choice)
        batch = batches_of("llama", collator)[0]
        add_hook_to_module(model.model.layers[0], AlignDevicesHook("cpu", io_same_device=True))
        if choice == "auto":
            assert torch.equal(model(**batch).scores, plain(**batch).scores)
        else:
            with pytest.raises(ValueError, match="accelerate's hooks move its layers between devices; use fuse='none'"):
                model(**batch)
        fresh = tiny.build("llama")
        add_hook_to_module(fresh.model.layers[0].mlp, AlignDevicesHook("cpu"))
        if choice == "auto":
            assert yojo.patch(fresh, tiny.tokenizer()).yojo.fusion.obstacle is not None
        else:
            with pytest.raises(ValueError, match="something else has replaced the forward of LlamaMLP"):
                yojo.patch(fresh, tiny.tokenizer(), fuse="compile")
    assert not graphs


def test_it_is_chosen_at_load_and_not_saved(make_reward_model, tmp_path):
    make_reward_model(fuse="compile").save_pretrained(tmp_path)
    assert '"fuse"' not in (tmp_path / "yojo_config.json").read_text()
    assert yojo.RewardModel.from_pretrained(tmp_path).model.yojo.fuse == "auto"
    assert yojo.RewardModel.from_pretrained(tmp_path, fuse="none").model.yojo.fuse == "none"


def test_a_layer_that_slides_must_say_its_window():
    model, collator = patched("gemma2")
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = None
    with pytest.raises(RuntimeError, match="Gemma2Attention, layer 0, slides but did not say its window"):
        model(**row_of(collator, [samples_of("gemma2")["text"]]))
