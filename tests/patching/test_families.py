"""Every supported family: packed scores against the family's own, unpatched code."""

import copy
import dataclasses

import pytest
import tiny
import torch
import transformers
from family_cases import (
    PARITY,
    close,
    comparative,
    continued,
    difference,
    gradients,
    isolated,
    joint_scores,
    parametrize_families,
    patched,
    rows_of,
    samples_of,
    score,
    single_scores,
    spread,
    stock_of,
)

import yojo
from yojo.inputs.packing import orders, pack_in_parts
from yojo.patching.joining import CannotJoin

# ---- parity ----


@parametrize_families
@torch.no_grad()
def test_a_row_that_is_filled_up_gives_the_same_scores(family):
    for made in (isolated, comparative):
        model, collator, _ = made(family)
        samples = samples_of(family)
        for row in rows_of(family):
            encoded = [collator.from_processed(*samples[name]) for name in row]
            expected, batch = model(**collator.pack(encoded)).scores, collator.pack(encoded, pad_to_multiple_of=64)
            tokens = batch["input_ids"].shape[1]
            assert tokens % 64 == 0 and tokens > sum(item.num_tokens(collator.config) for item in encoded)
            assert batch["layout"].num_samples == len(row) + 1
            table = model(**batch).scores
            assert table.shape == expected.shape and torch.equal(table.isfinite(), expected.isfinite())
            finite = expected.isfinite()
            assert (table - expected)[finite].abs().max() <= PARITY


@parametrize_families
@torch.no_grad()
def test_isolated_equals_single_passes(family):
    model, collator, stock = isolated(family)
    samples = samples_of(family)
    expected = {
        name: single_scores(stock, model, collator, prompt, responses, family)
        for name, (prompt, responses) in samples.items()
    }
    assert 0.1 < torch.cat(list(expected.values())).abs().mean() < 10
    for name, sample in samples.items():
        assert difference(score(model, collator, [sample])[0], expected[name]) <= PARITY, name
    for row in rows_of(family):
        for name, scores in zip(row, score(model, collator, [samples[name] for name in row]), strict=True):
            assert difference(scores, expected[name]) <= PARITY, (name, row)


@parametrize_families
@torch.no_grad()
def test_comparative_equals_the_causal_forward(family):
    model, collator, stock = comparative(family)
    samples = samples_of(family)
    expected = {
        name: joint_scores(stock, model, collator, prompt, responses, family)
        for name, (prompt, responses) in samples.items()
    }
    for name, sample in samples.items():
        assert difference(score(model, collator, [sample])[0], expected[name]) <= PARITY, name
    for row in rows_of(family):
        for name, scores in zip(row, score(model, collator, [samples[name] for name in row]), strict=True):
            assert difference(scores, expected[name]) <= PARITY, (name, row)


# ---- packing properties ----


@parametrize_families
@torch.no_grad()
def test_order_and_company_change_nothing(family):
    """Isolated: permuting responses permutes scores. Comparative: a response more leaves the earlier scores alone."""
    samples = samples_of(family)
    for prompt, responses in samples.values():
        model, collator, _ = isolated(family)
        order = list(range(len(responses)))[::-1]
        (straight,) = score(model, collator, [(prompt, responses)])
        (permuted,) = score(model, collator, [(prompt, [responses[n] for n in order])])
        assert difference(permuted, straight[order]) <= PARITY
        model, collator, _ = comparative(family)
        (before,) = score(model, collator, [(prompt, responses)])
        (after,) = score(model, collator, [(prompt, [*responses, tiny.words(4, 77)])])
        assert difference(after[:-1], before) <= PARITY


def with_other_shapes(family):
    """The family's samples and one more, whose tensors cannot be joined with theirs."""
    samples = samples_of(family)
    prompt, responses = samples["video" if family == "llava_onevision" else "image"]
    other = dict(prompt)
    if family == "llava_onevision":  # a frame more
        token, count, pixels = tiny.VIDEO, 5, other["pixel_values_videos"]
        other["pixel_values_videos"] = torch.cat([pixels, pixels[:, :1] * 0.7], dim=1)
    else:  # a larger tile
        token, count = tiny.IMAGE, 9
        generator = torch.Generator().manual_seed(3)
        other["pixel_values"] = torch.randn(1, 1, 3, 24, 24, generator=generator)
        other["pixel_attention_mask"] = torch.ones(1, 1, 24, 24, dtype=torch.int64)
    ids = other["input_ids"][0].tolist()
    at = ids.index(token)
    ids = [*ids[:at], *[token] * count, *(word for word in ids[at:] if word != token)]
    other["input_ids"] = torch.tensor([ids])
    other["attention_mask"] = torch.ones_like(other["input_ids"])
    return [*samples.values(), (other, responses)]


@pytest.mark.parametrize("family", ["llava_onevision", "smolvlm", "molmo2"])
def test_rows_that_cannot_be_joined_are_split(family, monkeypatch):
    model, collator, _ = isolated(family)
    samples = list(samples_of(family).values()) if family == "molmo2" else with_other_shapes(family)
    encoded = [collator.from_processed(*sample) for sample in samples]
    with pytest.raises(CannotJoin, match="images or videos" if family == "molmo2" else "cannot stand in one"):
        collator.pack(encoded)
    reward_model, calls = yojo.RewardModel(model, collator.tokenizer), []
    forward = type(reward_model)._score_batch
    monkeypatch.setattr(type(reward_model), "_score_batch", lambda *args: calls.append(args) or forward(*args))
    for row in (encoded, encoded[::-1]):
        calls.clear()
        for item, scores in zip(row, reward_model._score_row(row), strict=True):
            (alone,) = reward_model._score_row([item])
            assert difference(scores, alone) <= PARITY
        assert 1 < len([some for _, some, *_ in calls if len(some) > 1]) + 1 < len(row)  # not one by one
    for some, batch in pack_in_parts(collator.pack, encoded):
        assert batch["layout"].num_samples == len(some)


def test_only_what_cannot_be_joined_is_split():
    def pack(items):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        pack_in_parts(pack, [1, 2])

    def one_at_most(items):
        if len(items) > 1 or items == [3]:
            raise CannotJoin(f"not {items}")
        return items[0]

    assert pack_in_parts(one_at_most, [0, 1, 2]) == [([0], 0), ([1], 1), ([2], 2)]
    with pytest.raises(CannotJoin, match=r"not \[3\]"):  # alone, it cannot be helped
        pack_in_parts(one_at_most, [2, 3])


def test_molmo2_takes_no_images_and_videos_in_one_prompt():
    _, collator, _ = isolated("molmo2")
    samples = samples_of("molmo2")
    both = samples["video"][0] | {
        name: value for name, value in samples["image"][0].items() if name.startswith(("pixel", "image"))
    }
    with pytest.raises(ValueError, match="example 'e7': the prompt has images and videos, and Molmo2 takes either"):
        collator.from_processed(both, samples["video"][1], name="example 'e7'")


@parametrize_families
@torch.no_grad()
def test_permutations_score_the_mean_over_orders(family):
    model, collator = patched(family, permutations=3)
    plain, plain_collator, _ = comparative(family)
    prompt, responses = next(iter(samples_of(family).values()))
    expected = torch.zeros(len(responses))
    chosen = orders(len(responses), collator.config)
    assert len(chosen) == 3
    for order in chosen:
        (scores,) = score(plain, plain_collator, [(prompt, [responses[n] for n in order])])
        expected[list(order)] += scores / 3
    assert difference(score(model, collator, [(prompt, responses)])[0], expected) <= PARITY


# ---- masks that could be wrong unnoticed ----


@pytest.mark.parametrize("family", ["gemma3", "molmo2", "paligemma", "paligemma2"])
@torch.no_grad()
def test_image_blocks_matter(family):
    """The parity tests above would fail with causal image tokens: the scores are others."""
    model, collator, _ = isolated(family)
    prompt, responses = samples_of(family)["image"]
    encoded = collator.from_processed(prompt, responses)
    assert encoded.blocks is not None and (encoded.blocks >= 0).any()
    causal = dataclasses.replace(encoded, blocks=None)
    difference_made = (model(**collator.pack([encoded])).scores - model(**collator.pack([causal])).scores).abs().max()
    assert difference_made > 1e-3


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3_text", "mistral", "paligemma2"])
@torch.no_grad()
def test_windows_count_logical_positions(family):
    """The parity tests above would fail with windows counted in rows: the scores are others."""
    model, collator, _ = isolated(family)
    prompt, responses = list(samples_of(family).values())[1]
    batch = collator.pack([collator.from_processed(prompt, responses)])
    layout = batch["layout"]
    rows = dataclasses.replace(layout, position=torch.arange(layout.num_tokens, dtype=torch.int32))
    by_rows = model(**(batch | {"layout": rows})).scores
    assert (model(**batch).scores - by_rows).abs().max() > 1e-3


def test_a_prompt_beyond_paligemmas_window_is_refused():
    _, collator, _ = isolated("paligemma2")
    prompt = dict(samples_of("paligemma2")["image"][0])
    prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([tiny.words(20, 5)])], dim=1)
    with pytest.raises(ValueError, match="sliding window 16.*not supported"):
        collator.from_processed(prompt, [[50]])


# ---- gradients, adapters, copies, compilation ----


@parametrize_families
def test_gradients_with_checkpointing_and_of_packed_samples(family):
    model, collator = patched(family, mode="isolated")
    model.train()
    samples = [samples_of(family)[name] for name in rows_of(family)[0][:3]]
    encoded = [
        collator.from_processed(prompt, responses, rankings=list(range(1, len(responses) + 1)))
        for prompt, responses in samples
    ]
    packed = gradients(model, collator.pack(encoded))
    model.gradient_checkpointing_enable()
    close(gradients(model, collator.pack(encoded)), packed, 1e-6)
    model.gradient_checkpointing_disable()
    alone = [gradients(model, collator.pack([item])) for item in encoded]
    names = set().union(*alone)
    zero = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    mean = {name: sum(one.get(name, zero[name]) for one in alone) / len(alone) for name in names}
    close({name: packed.get(name, zero[name]) for name in names}, mean)
    assert any("q_proj" in name or "qkv" in name for name in packed)


@parametrize_families
def test_the_gradient_of_an_isolated_row_is_that_of_single_passes(family):
    model, collator = patched(family, mode="isolated")
    stock = stock_of(family, model)
    prompt, responses = next(iter(samples_of(family).values()))
    rankings = torch.arange(1, len(responses) + 1)
    encoded = collator.from_processed(prompt, responses, rankings=rankings.tolist())
    packed = gradients(model, collator.pack([encoded]))
    scores = single_scores(stock, model, collator, prompt, responses, family)
    torch.nn.functional.cross_entropy(scores[None], torch.tensor([0])).backward()
    single = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    decoder = {name: g for name, g in packed.items() if not name.startswith("score")}
    close(decoder, {name: single[name] for name in decoder})


@parametrize_families
@torch.no_grad()
def test_with_an_adapter(family):
    from peft import LoraConfig, get_peft_model

    model, collator = patched(family, mode="isolated")
    config = LoraConfig(r=4, target_modules=r".*(language_model|text_model|model\.layers).*\.(q_proj|v_proj)",
                        modules_to_save=["score"], init_lora_weights=False)  # fmt: skip
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config).eval()
    row = [samples_of(family)[name] for name in rows_of(family)[0][:3]]
    scores = score(wrapped, collator, row)
    unadapted = score(isolated(family)[0], collator, row)
    assert max(difference(a, b) for a, b in zip(scores, unadapted, strict=True)) > 1e-3
    merged = yojo.unpatch(copy.deepcopy(wrapped).merge_and_unload())
    stock = tiny.build(family)
    embedding = model.get_input_embeddings().weight.detach().clone()
    stock.load_state_dict({name: t for name, t in merged.state_dict().items() if "score" not in name}, strict=False)
    stock.get_input_embeddings().weight = torch.nn.Parameter(embedding)
    for (prompt, responses), got in zip(row, scores, strict=True):
        expected = single_scores(stock, model, collator, prompt, responses, family)
        assert difference(got, expected) <= 2 * PARITY  # merging rounds the weights once more


@parametrize_families
@torch.no_grad()
def test_a_deep_copy_scores_alike_and_is_independent(family):
    model, collator = patched(family)
    row = [samples_of(family)[name] for name in rows_of(family)[0][:2]]
    before = score(model, collator, row)
    duplicate = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert all(map(torch.equal, score(duplicate, collator, row), before))
    assert duplicate.forward.__self__ is duplicate


@pytest.mark.parametrize(
    "family",
    ["gemma3_text", "qwen3_vl", *(pytest.param(f, marks=pytest.mark.soak) for f in ("llama", "gemma2", "mistral"))],
)
@torch.no_grad()
def test_compiled_in_one_graph(family):
    """Text rows; vision towers ask for sizes on the way and break the graph in the stock model too."""
    model, collator, _ = isolated(family)
    names = ["text", "text"] if family == "qwen3_vl" else list(samples_of(family))
    batch = collator.pack([collator.from_processed(*samples_of(family)[name]) for name in names])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(**batch).scores
    finite = expected.isfinite()
    assert (compiled(**batch).scores - expected)[finite].abs().max() <= PARITY


@torch.no_grad()
@pytest.mark.soak
def test_compiled_with_images():
    model, collator, _ = isolated("qwen3_vl")
    batch = collator.pack([collator.from_processed(*samples_of("qwen3_vl")["image"])])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    assert difference(compiled(**batch).scores, model(**batch).scores) <= PARITY


# ---- ordinary use ----


def ordinary_inputs(family):
    prompt, responses = next(iter(samples_of(family).values()))
    return continued(prompt, responses[0], family)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@parametrize_families
@torch.no_grad()
def test_ordinary_use_is_untouched(family, attention):
    if attention != tiny.attention_of(family) and family in tiny.EAGER:
        attention = "eager"
    tokenizer = tiny.tokenizer(with_separator=True)
    model = tiny.build(family, attention)
    if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    inputs = ordinary_inputs(family)
    prompt = next(iter(samples_of(family).values()))[0]
    logits = model(**inputs).logits
    generated = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, attributes = model.config.to_dict(), set(model.__dict__)
    yojo.patch(model, tokenizer, head_dim=16)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), generated)
    yojo.unpatch(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert model.config.to_dict() == config and set(model.__dict__) == attributes
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[name], state[name]) for name in state)


@parametrize_families
@torch.no_grad()
def test_unpatch_gives_back_a_resized_embedding(family):
    model = tiny.build(family)
    inputs = ordinary_inputs(family)
    logits, config, attributes = model(**inputs).logits, model.config.to_dict(), set(model.__dict__)
    yojo.patch(model, tiny.tokenizer(), head_dim=16)
    assert torch.equal(model(**inputs).logits[..., : logits.shape[-1]], logits)
    yojo.unpatch(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert model.config.to_dict() == config and set(model.__dict__) == attributes


@parametrize_families
@torch.no_grad()
def test_plain_right_padded_batches_score_as_the_packed_row(family):
    model, collator, _ = comparative(family)
    prompt, responses = next(iter(samples_of(family).values()))
    separator = collator.separator_id
    ids = [[token for response in part for token in [*response, separator]] for part in (responses, responses[:1])]
    expected = score(model, collator, [(prompt, responses), (prompt, responses[:1])])
    batch = [continued(prompt, one, family) for one in ids]
    length = max(one["input_ids"].shape[1] for one in batch)
    joined = {}
    for name in batch[0]:
        tensors = [one[name] for one in batch]
        if name in ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"):
            fill = tiny.PAD if name == "input_ids" else 0
            tensors = [torch.nn.functional.pad(t, (0, length - t.shape[1]), value=fill) for t in tensors]
        elif name in collator.family.offsets:
            tensors[1] = torch.where(tensors[1] >= 0, tensors[1] + batch[0]["pixel_values"][..., 0].numel(), tensors[1])
        joined[name] = torch.cat(tensors)
    rankings = torch.tensor([list(range(1, len(responses) + 1)), [1] + [-1] * (len(responses) - 1)])
    output = model(**joined, rankings=rankings)
    assert difference(output.scores[0], expected[0]) <= PARITY
    assert difference(output.scores[1, :1], expected[1]) <= PARITY
    assert output.loss.isfinite()


@parametrize_families
@torch.no_grad()
def test_neither_logits_nor_all_hidden_states_are_made(family):
    model, collator, _ = isolated(family)
    model.config.get_text_config().output_hidden_states = True  # as a user may have set it
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: seen.append("logits"))
    watch = model.base_model.register_forward_hook(lambda _m, _a, output: seen.append(output.get("hidden_states")))
    try:
        score(model, collator, [next(iter(samples_of(family).values()))])
    finally:
        hook.remove()
        watch.remove()
        model.config.get_text_config().output_hidden_states = False
    assert seen == [None]


# ---- what is not listed ----


SMALL = {name: value for name, value in tiny.TEXT.items() if name != "max_position_embeddings"}


@pytest.mark.parametrize(
    "name, options",
    [
        ("Qwen2", {}),
        ("Phi3", {}),
        ("Olmo2", {}),
        ("Granite", {}),
        ("Cohere2", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}),
        ("Glm4", {"head_dim": 8}),
        ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}),
        (
            "DeepseekV3",  # multi-head latent attention: values narrower than keys
            {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
             "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
             "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
        ),
    ],
)  # fmt: skip
@torch.no_grad()
def test_other_decoders_simply_work(name, options):
    config = getattr(transformers, f"{name}Config")(**(SMALL | options))
    stock = tiny.finished(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))
    model = yojo.patch(copy.deepcopy(stock), tiny.tokenizer(), mode="isolated", head_dim=16)
    spread(model.score)
    stock.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    collator = yojo.Collator(tiny.tokenizer(with_separator=True), model)
    for prompt, responses in samples_of("llama").values():
        expected = single_scores(stock, model, collator, prompt, responses, "llama")
        assert difference(score(model, collator, [(prompt, responses)])[0], expected) <= PARITY


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "Qwen3Next",
            {"num_experts": 2, "num_experts_per_tok": 1},
            "layers of type linear_attention.*softmax attention",
        ),
        ("GptOss", {"num_local_experts": 2}, "attention sinks"),
        ("Llama4Text", {"num_local_experts": 2, "intermediate_size_mlp": 32}, "layers of type chunked_attention"),
        ("Bloom", {"n_head": 4, "n_layer": 2}, "does not use transformers' attention interface"),
        ("Mamba", {"state_size": 4}, "does not use transformers' attention interface|softmax attention"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(name, options, message):
    config = getattr(transformers, f"{name}Config")(**(SMALL | options))
    model = transformers.AutoModelForCausalLM.from_config(config)
    attributes = set(model.__dict__)
    with pytest.raises(ValueError, match=message):
        yojo.patch(model, tiny.tokenizer())
    assert set(model.__dict__) == attributes and not hasattr(model, "score")


def test_an_unlisted_family_with_image_blocks_is_refused(monkeypatch):
    """Gemma 3 under another name: its masks are built from blocks that nothing here would know of."""
    model = tiny.build("gemma3")
    monkeypatch.setattr(type(model.config), "model_type", "gemma3_next")
    with pytest.raises(ValueError, match=r"builds its masks from token types or blocks.*yojo/families/"):
        yojo.patch(model, tiny.tokenizer())


def test_attention_dropout_is_refused():
    model, collator = patched("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    model.train()
    prompt, responses = samples_of("llama")["text"]
    with pytest.raises(ValueError, match=r"attention dropout 0\.1 is not supported: set attention_dropout=0"):
        score(model, collator, [(prompt, responses)])
