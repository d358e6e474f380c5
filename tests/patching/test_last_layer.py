"""The last layer for the rows that are read: the same scores and gradients, for a layer's work less."""

import copy

import pytest
import tiny
import torch
import transformers
from family_cases import (
    FAMILIES,
    PARITY,
    batch_of,
    close,
    continued,
    difference,
    gradients,
    parametrize_families,
    patched,
    rows_of,
    samples_of,
    score,
)
from torch.utils.flop_counter import FlopCounterMode

import yojo
from yojo import families
from yojo.patching import last_layer, methods
from yojo.patching.state import unwrap

MODES = {
    "isolated": {"mode": "isolated"},
    "comparative": {"mode": "comparative"},
    "permutations": {"permutations": 3},
}


@pytest.fixture(autouse=True)
def however_little_it_saves(monkeypatch):
    """The rows of these tests are short and their layers narrow: let many of their tokens be read."""
    monkeypatch.setattr(last_layer, "LARGEST_SHARE", 1)
    monkeypatch.setattr(last_layer, "FEWEST_FLOPS", 0)


class Widths:
    """Rows that the final norm of a model got, one entry per pass; a context."""

    def __init__(self, model):
        self.norm = unwrap(model).get_decoder().norm

    def __enter__(self):
        self.seen = []
        self.hook = self.norm.register_forward_pre_hook(lambda module, args: self.seen.append(args[0].shape[1]))
        return self.seen

    def __exit__(self, *error):
        self.hook.remove()


def agree(model, batch):
    """Scores and gradients with and without; returns how many rows the final norm got with and without."""
    base = unwrap(model)
    assert base.yojo.whole_last_layer is None
    with Widths(model) as few:
        scores, grads = model(**batch).scores, gradients(model, batch)
    base.yojo.whole_last_layer = "for comparison"
    with Widths(model) as all_rows:
        expected, expected_grads = model(**batch).scores, gradients(model, batch)
    base.yojo.whole_last_layer = None
    finite = expected.isfinite()
    assert torch.equal(scores.isfinite(), finite)
    assert difference(scores[finite], expected[finite]) <= PARITY
    close(grads, expected_grads, 1e-5)
    return set(few), set(all_rows)


# ---- the same ----


@pytest.mark.parametrize("mode", MODES)
@parametrize_families
def test_scores_and_gradients_are_the_same(family, mode):
    model, collator = patched(family, **MODES[mode])
    for names in ([next(iter(samples_of(family)))], *rows_of(family)):
        batch = batch_of(family, collator, names)
        few, all_rows = agree(model, batch)
        assert few == {batch["separators"].rows.numel()} and all_rows == {batch["layout"].num_tokens}, names


@pytest.mark.parametrize("reentrant", [False, True])
@parametrize_families
def test_under_gradient_checkpointing(family, reentrant):
    model, collator = patched(family, mode="isolated")
    batch = batch_of(family, collator)
    model.train()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with Widths(model) as few:
        close(gradients(model, batch), plain, 1e-6)
    assert set(few) == {batch["separators"].rows.numel()}
    agree(model, batch)


def test_the_last_layer_is_recomputed_once_under_checkpointing():
    """Both of its runs are in one checkpoint, whatever transformers wraps its layers' forward in."""
    model, collator = patched("qwen3_vl", mode="isolated")
    model.train()
    model.gradient_checkpointing_enable()
    calls = []
    layer = last_layer.last_layer(model)
    for name in ("k_proj", "o_proj"):

        def hook(module, args, name=name):
            calls.append((name, args[0].shape[1]))

        hook.__module__ = last_layer._HARMLESS_HOOKS[0]  # or the layer would run on all rows
        getattr(layer.self_attn, name).register_forward_pre_hook(hook)
    batch = batch_of("qwen3_vl", collator, ["text"])
    gradients(model, batch)
    rows, tokens = batch["separators"].rows.numel(), batch["layout"].num_tokens
    once = [("k_proj", tokens), ("k_proj", rows), ("o_proj", rows)]
    assert calls == once * 2


@parametrize_families
def test_with_an_adapter_on_every_projection(family):
    from peft import LoraConfig, get_peft_model

    model, collator = patched(family, mode="isolated")
    names = r".*(language_model|text_model|model\.layers).*\.(q_proj|k_proj|v_proj|o_proj|up_proj|down_proj)"
    config = LoraConfig(r=4, target_modules=names, modules_to_save=["score"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config)
    batch = batch_of(family, collator)
    few, _ = agree(wrapped, batch)
    assert few == {batch["separators"].rows.numel()}
    wrapped.train()
    wrapped.gradient_checkpointing_enable()
    wrapped.enable_input_require_grads()
    agree(wrapped, batch)


@parametrize_families
@torch.no_grad()
def test_a_deep_copy_has_a_last_layer_of_its_own(family):
    model, collator = patched(family)
    batch = batch_of(family, collator)
    expected = model(**batch).scores
    duplicate = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    with Widths(duplicate) as few:
        assert torch.equal(duplicate(**batch).scores, expected)
    assert few == [batch["separators"].rows.numel()]
    assert last_layer.last_layer(duplicate).forward.args == (last_layer.last_layer(duplicate),)


def test_in_bfloat16_and_under_autocast():
    model, collator = patched("qwen3_vl", mode="isolated")
    batch = batch_of("qwen3_vl", collator)
    exact = model(**batch).scores
    finite = exact.isfinite()
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        cast = copy.deepcopy(model).to(dtype)
        errors = []
        for reason in (None, "for comparison"):
            cast.yojo.whole_last_layer = reason
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                errors.append((cast(**batch).scores - exact)[finite].square().mean().sqrt())
        assert 0 < errors[0] <= 1.5 * errors[1]  # nothing is lost in the last layer


# ---- where it does not act ----


@parametrize_families
@torch.no_grad()
def test_ordinary_inputs_and_unpatched_models_know_nothing_of_it(family):
    model, _ = patched(family)
    prompt, responses = next(iter(samples_of(family).values()))
    inputs = continued(prompt, responses[0], family)
    with Widths(model) as all_rows:
        logits = model(**inputs).logits
    assert all_rows == [inputs["input_ids"].shape[1]] and logits.shape[1] == all_rows[0]
    layer = last_layer.last_layer(model)
    assert "forward" in layer.__dict__
    yojo.unpatch(model)
    assert "forward" not in layer.__dict__


def test_a_decoder_that_is_not_listed_runs_whole():
    config = transformers.MixtralConfig(**(tiny.TEXT | {"num_local_experts": 4, "sliding_window": None}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    yojo.patch(tiny.finished(model), tiny.tokenizer(), head_dim=16)
    assert "mixtral decoders are not known" in model.yojo.whole_last_layer
    assert methods.on(last_layer.last_layer(model)) is not last_layer.forward
    collator = yojo.Collator(tiny.tokenizer(with_separator=True), model)
    with Widths(model) as rows:
        score(model, collator, [samples_of("llama")["text"]])
    assert rows[0] > 10
    yojo.unpatch(model)


def test_deepstack_behind_the_last_layer():
    model = tiny.build("qwen3_vl")
    model.config.vision_config.deepstack_visual_indexes = [0, 1]
    yojo.patch(model, tiny.tokenizer(), head_dim=16)
    assert model.yojo.whole_last_layer == "vision features are added behind the last layer"


def test_a_forward_that_others_have_replaced_is_left_alone():
    model = tiny.build("llama")
    layer = last_layer.last_layer(model)
    layer.forward = forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    yojo.patch(model, tiny.tokenizer(), head_dim=16)
    assert "something else has replaced the forward" in model.yojo.whole_last_layer and layer.forward is forward
    yojo.unpatch(model)
    assert layer.forward is forward


def whole(model, collator, family="llama"):
    """Whether a pass runs the last layer on all rows."""
    batch = batch_of(family, collator)
    with Widths(model) as rows:
        model(**batch)
    assert rows[0] in (batch["layout"].num_tokens, batch["separators"].rows.numel())
    return rows[0] == batch["layout"].num_tokens


@torch.no_grad()
def test_hooks_see_all_rows(monkeypatch):
    model, collator = patched("llama")
    layer = last_layer.last_layer(model)
    assert not whole(model, collator)
    seen = []
    for module in (layer, layer.mlp, layer.self_attn.o_proj):
        handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
        assert whole(model, collator)
        handle.remove()
        assert not whole(model, collator)
    assert len({tensor.shape[1] for tensor in seen}) == 1
    layer.mlp._hf_hook = object()  # accelerate's, which moves weights about
    assert whole(model, collator)


@torch.no_grad()
def test_recorders_of_transformers_do_not_turn_it_off():
    model, collator = patched("llama")
    ids = torch.tensor([tiny.words(5, 0)])
    assert len(model(input_ids=ids, output_hidden_states=True).hidden_states) == 3  # installs them for good
    assert last_layer.last_layer(model)._forward_hooks
    assert not whole(model, collator)
    states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert states[-1].shape[1] == 5


@torch.no_grad()
def test_where_many_rows_are_read_all_are_computed(monkeypatch):
    model, collator = patched("llama")
    batch = batch_of("llama", collator)
    share = batch["separators"].rows.numel() / batch["layout"].num_tokens
    monkeypatch.setattr(last_layer, "LARGEST_SHARE", share * 0.99)
    assert whole(model, collator)
    monkeypatch.setattr(last_layer, "LARGEST_SHARE", share * 1.01)
    assert not whole(model, collator)


@torch.no_grad()
def test_where_little_is_saved_all_rows_are_computed(monkeypatch):
    model, collator = patched("llama")
    batch = batch_of("llama", collator)
    text = model.config.get_text_config()
    unread = batch["layout"].num_tokens - batch["separators"].rows.numel()
    saved = 2 * 3 * text.hidden_size * text.intermediate_size * unread  # of the gate, up and down projections
    monkeypatch.setattr(last_layer, "FEWEST_FLOPS", saved + 1)
    assert whole(model, collator)
    monkeypatch.setattr(last_layer, "FEWEST_FLOPS", saved)
    assert not whole(model, collator)


@torch.no_grad()
def test_what_a_layer_is_not_known_to_take_is_not_guessed_at():
    model, collator = patched("llama")
    layer = last_layer.last_layer(model)
    batch = batch_of("llama", collator)
    tokens = batch["layout"].num_tokens
    read = last_layer.ReadRows(torch.tensor([3]), (1, 0, 0))
    hidden = torch.randn(1, tokens, tiny.HIDDEN)
    usual = {
        "position_embeddings": model.get_decoder().rotary_emb(hidden, batch["position_ids"]),
        "position_ids": batch["position_ids"],
        "attention_mask": None,
        "layout": batch["layout"],
        "read_rows": read,
    }
    rows = {}
    for name, changes in {
        "usual": {},
        "a tensor": {"biases": torch.zeros(1, tokens)},
        "a list": {"biases": [torch.zeros(tokens)]},
        "positions of others": {"position_ids": batch["position_ids"][:, :-1]},
        "a cache": {"past_key_values": transformers.DynamicCache()},
    }.items():
        rows[name] = layer(hidden, **(usual | changes)).shape[1]
    assert rows == {name: 1 if name == "usual" else tokens for name in rows}


@torch.no_grad()
def test_compiled_models_run_it_whole():
    model, collator = patched("llama", mode="isolated")
    batch = batch_of("llama", collator)
    expected = model(**batch).scores
    torch._dynamo.reset()
    with Widths(model) as rows:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        finite = expected.isfinite()
        assert (compiled(**batch).scores - expected)[finite].abs().max() <= PARITY
    assert rows[-1] == batch["layout"].num_tokens


@torch.no_grad()
def test_a_compiled_last_layer_runs_whole():
    model, collator = patched("llama", mode="isolated")
    batch = batch_of("llama", collator)
    expected = model(**batch).scores
    torch._dynamo.reset()
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager")
    with Widths(model) as rows:
        scores = model(**batch).scores
    finite = expected.isfinite()
    assert (scores - expected)[finite].abs().max() <= PARITY
    assert rows == [batch["layout"].num_tokens]


def test_a_layer_that_never_calls_its_attention_is_an_error(monkeypatch):
    model, collator = patched("llama")
    layer = last_layer.last_layer(model)
    monkeypatch.setattr(layer.self_attn, "forward", lambda hidden_states, **kwargs: (hidden_states, None))
    with pytest.raises(RuntimeError, match="LlamaDecoderLayer did not call its attention function"):
        model(**batch_of("llama", collator))


# ---- what it saves ----


@pytest.mark.parametrize("train", [False, True])
def test_the_work_of_a_layer_is_saved(train, reference_attention):
    """Of the linear layers' products in the last layer, all but those of queries, keys and values."""
    hidden, inner, layers, heads, key_heads, dim = 64, 256, 4, 4, 2, 16
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "head_dim": dim}
    config = transformers.Qwen3Config(**(tiny.TEXT | sizes | {"max_position_embeddings": 4096}))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    yojo.patch(tiny.finished(model), tiny.tokenizer(), mode="isolated", head_dim=16)
    collator = yojo.Collator(tiny.tokenizer(with_separator=True), model)
    encoded = collator.from_processed({"input_ids": torch.tensor([tiny.words(300, 0)])}, tiny.responses(0, (60, 50)))
    batch = collator.pack([encoded])
    tokens, read = batch["layout"].num_tokens, 2
    flops = []
    for reason in (None, "for comparison"):
        model.yojo.whole_last_layer = reason
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
            scores = model(**batch).scores
            if train:
                scores.sum().backward()
        flops.append(counter.get_total_flops())
    per_token = 2 * hidden * dim * (2 * heads + 2 * key_heads) + 2 * 3 * hidden * inner
    kept = 2 * hidden * dim * (heads + 2 * key_heads)  # on all tokens: queries are made and thrown away
    attention = 4 * heads * dim * tokens  # of one query, with its whole row: the reference multiplies all with all
    saved = (tokens - read) * (per_token - kept) - read * kept + (tokens - read) * attention
    if train:  # backward does twice as much, but for the queries of all tokens, which nothing comes back to
        saved = 3 * saved + 2 * tokens * 2 * hidden * heads * dim
    assert abs((flops[1] - flops[0]) - saved) <= 0.01 * saved
    assert saved > 0.15 * flops[1]  # of four layers


def test_every_family_is_covered():
    listed = {tiny.build(family).get_decoder().config.model_type for family in FAMILIES}
    assert listed == {decoder.model_type for decoder in families.DECODERS if decoder.token_wise}
