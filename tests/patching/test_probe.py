"""Models whose families are not listed: tried when they are patched, refused where packed rows would be wrong."""

import copy
import logging

import pytest
import tiny
import torch
import transformers
from family_cases import spread

import yojo
from yojo.patching import attention as patched_attention
from yojo.patching import decoders, positions, probe, ropes
from yojo.patching.attention import packed_attention
from yojo.patching.state import is_patched

PLAIN = {"num_key_value_heads": 2, "head_dim": 8}
MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
SLIDING = {"use_sliding_window": True, "max_window_layers": 2}


def build(name, dtype=torch.float32, **settings):
    config = getattr(transformers, f"{name}Config")
    known = {key: value for key, value in (tiny.TEXT | PLAIN).items() if key in config.__dataclass_fields__}
    attention = "eager" if name == "VaultGemma" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config(**known | settings), attn_implementation=attention)
    return tiny.finished(model).to(dtype)


def measured(model):
    modules = decoders.attention_modules(model)
    return probe.measure(model, modules, ropes.switch_of(model), lambda: packed_attention(model, modules))


GOOD = {
    "Cohere": {},
    "Cohere2": {"sliding_window": 500},
    "Exaone4": {"sliding_window": 500, "sliding_window_pattern": 2},
    "GPTNeoX": {},
    "Glm4": {},
    "Granite": {},
    "Mistral": {"sliding_window": 4096},
    "Mixtral": {"num_local_experts": 4, "sliding_window": 500},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Olmo2": {},
    "Phi3": {"sliding_window": 20},
    "Phimoe": {"num_local_experts": 4, "sliding_window": None},
    "Qwen2": SLIDING | {"sliding_window": 500},
    "Qwen2Moe": {"num_experts": 4} | MIXTURE,
    "Qwen3Moe": {"num_experts": 4, "use_sliding_window": True, "sliding_window": 6} | MIXTURE,
    "SmolLM3": {},
    "Starcoder2": {"sliding_window": 4096},
    "VaultGemma": {},
}


@pytest.mark.parametrize("name", GOOD)
def test_good_families_pass_by_a_wide_margin(name):
    model = build(name, **GOOD[name])
    assert probe.is_needed(model)
    for dtype in (torch.float32, torch.bfloat16):
        error, rounding = measured(model.to(dtype))
        assert error <= rounding / 2
        assert rounding < (2e-4 if dtype == torch.float32 else 0.5)
    assert is_patched(yojo.patch(model, tiny.tokenizer(), head_dim=16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [6, 30, 2047])
def test_a_window_that_is_in_the_mask_alone_is_found(window, dtype):
    model = build("Phimoe", dtype, num_local_experts=4, sliding_window=window)
    with pytest.raises(
        ValueError, match=rf"PhimoeForCausalLM \(phimoe\).* differs .* by 0\.[3-9].*sliding window \({window}\)"
    ):
        yojo.patch(model, tiny.tokenizer(), head_dim=16)
    assert not is_patched(model) and model.config.sliding_window == window
    assert is_patched(yojo.patch(model, tiny.tokenizer(), head_dim=16, probe=False))


def test_layers_that_do_not_say_their_window_are_found():
    model = build("Qwen2Moe", num_experts=4, sliding_window=4096, **MIXTURE, **SLIDING)
    with pytest.raises(ValueError, match="cannot score a packed row: .* slides but did not say its window"):
        yojo.patch(model, tiny.tokenizer(), head_dim=16)


@pytest.mark.parametrize("fault", ["leak", "position", "window"])
def test_other_faults_are_found(monkeypatch, fault):
    """Attention that sees other branches, positions that do not start again, a window that is dropped."""
    module = patched_attention
    attend, original = module.attend, module.multi_response_attention

    def faulty(query, key, value, layout, **kwargs):
        if fault == "window":
            return original(query, key, value, layout, **{**kwargs, "window": None})
        plain = type(layout).build([layout.num_tokens], [[]])
        return original(query, key, value, plain, **kwargs)

    if fault == "position":
        monkeypatch.setattr(
            positions.PromptPositions, "__call__", lambda self, p: (torch.arange(p["input_ids"].shape[1])[None], 0)
        )
    else:
        monkeypatch.setattr(module, "multi_response_attention", faulty)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="differs from the model's own forward"):
            yojo.patch(build("Mistral", dtype, sliding_window=500), tiny.tokenizer(), head_dim=16)
    assert module.attend is attend


def state_of(model):
    return {
        name: (
            module.training,
            {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str, tuple))},
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            dict(module._buffers),
            [(p.requires_grad, p.grad is None) for p in module.parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_leaves_no_trace(dtype):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = build("Mistral", dtype, sliding_window=500, rope_parameters=rope, max_position_embeddings=100)
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    ids = torch.arange(20, 90)[None].repeat(1, 2)  # beyond the rope's switch: it has state now
    with torch.no_grad():
        model(input_ids=ids)
    assert model.model.rotary_emb.max_seq_len_cached == 140
    before, buffers = state_of(model), model.model.rotary_emb.inv_freq.clone()
    config, random = copy.deepcopy(model.config), torch.get_rng_state()
    measured(model)
    for name, entry in state_of(model).items():
        for found, expected in zip(entry, before[name], strict=True):
            if isinstance(found, dict) and any(isinstance(value, torch.Tensor) for value in found.values()):
                assert found.keys() == expected.keys() and all(found[key] is expected[key] for key in found)
            else:
                assert found == expected, name
    assert torch.equal(model.model.rotary_emb.inv_freq, buffers)
    assert torch.equal(torch.get_rng_state(), random) and model.config.to_dict() == config.to_dict()


def test_listed_families_are_not_probed_and_options_are_checked(monkeypatch):
    def fail(*args):
        raise AssertionError("probed")

    monkeypatch.setattr(probe, "check", fail)
    for family in ("qwen3_vl", "llama", "gemma3"):
        yojo.patch(tiny.build(family), tiny.tokenizer(), head_dim=16)
    with pytest.raises(AssertionError, match="probed"):
        yojo.patch(tiny.build("mistral"), tiny.tokenizer())
    yojo.patch(tiny.build("mistral"), tiny.tokenizer(), probe=False)
    with pytest.raises(TypeError, match="probe must be a bool, got 1"):
        yojo.patch(tiny.build("mistral"), tiny.tokenizer(), probe=1)


def test_what_cannot_be_probed_is_said(caplog):
    with torch.device("meta"):
        empty = transformers.MistralForCausalLM(tiny.build("mistral").config)
    with caplog.at_level(logging.WARNING, logger="yojo.patching.probe"):
        yojo.patch(empty, head_dim=16)
    assert "is on the meta device: it cannot be probed" in caplog.text


@pytest.mark.parametrize("decoder", ["Qwen3Moe", "Phimoe"])
def test_a_listed_tower_does_not_vouch_for_any_decoder(decoder):
    config = getattr(transformers, f"{decoder}Config")
    mixture = {"num_experts": 4, "head_dim": 8} | MIXTURE if decoder == "Qwen3Moe" else {"num_local_experts": 4}
    mixture.pop("shared_expert_intermediate_size", None)
    window = {"sliding_window": 100} if decoder == "Phimoe" else {}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    tower |= {"image_size": [16, 16], "patch_size": [8, 8]}
    config = transformers.InternVLConfig(
        vision_config=tower, text_config=config(**tiny.TEXT, **mixture, **window), image_token_id=tiny.IMAGE
    )
    model = tiny.finished(transformers.InternVLForConditionalGeneration(config))
    if decoder == "Qwen3Moe":
        assert probe.is_needed(model) and is_patched(yojo.patch(model, tiny.tokenizer(), head_dim=16))
    else:
        with pytest.raises(ValueError, match=r"InternVL.* \(internvl\): a packed row .*sliding window \(100\)"):
            yojo.patch(model, tiny.tokenizer(), head_dim=16)


def test_loading_takes_the_option(monkeypatch, tmp_path):
    model = yojo.patch(tiny.build("mistral"), tokenizer := tiny.tokenizer(), head_dim=16)
    yojo.RewardModel(model, tokenizer).save_pretrained(tmp_path, card=False)
    probed = []
    monkeypatch.setattr(probe, "check", lambda *args: probed.append(args))
    yojo.RewardModel.from_pretrained(tmp_path, probe=False)
    assert not probed
    yojo.RewardModel.from_pretrained(tmp_path)
    assert len(probed) == 1


# ---- ropes whose frequencies change with the length of a pass ----

ROPES = {
    "longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 24,
                "partial_rotary_factor": 1.0,
            },
        },
        24,
    ),
    "dynamic": (
        "Llama",
        {"max_position_embeddings": 25, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
        24,
    ),
    "layers": (
        "Gemma3Text",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 25,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
            },
        },
        24,
    ),
}


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("mode", ["isolated", "comparative"])
@torch.no_grad()
def test_up_to_the_switch_scores_depend_on_nothing_else_and_beyond_it_they_are_refused(kind, mode):
    name, settings, limit = ROPES[kind]
    tokenizer = tiny.tokenizer()
    model = yojo.patch(build(name, **settings), tokenizer, mode=mode, head_dim=16)
    spread(model.score)
    assert model.yojo.rope.limit == limit
    collator = yojo.Collator(tokenizer, model)

    def encoded(prompt, *responses):
        return collator.from_processed(
            {"input_ids": torch.tensor([tiny.words(prompt, prompt)])},
            [tiny.words(n, n) for n in responses],
            name="this one",
        )

    def own(item):
        ids = [[*item.prompt_ids.tolist(), *r] for r in item.responses]
        if mode == "comparative":
            ids = [[*item.prompt_ids.tolist(), *item.responses[0], *item.responses[1]]]
        hidden = [model.base_model(input_ids=torch.tensor([row]))[0][0] for row in ids]
        ends = [-1] if mode == "isolated" else [-1 - len(item.responses[1]), -1]
        return torch.cat([model.score(h, torch.tensor([len(h) + end for end in ends])) for h in hidden])

    short = encoded(3, 2, 4)
    most = encoded(12, 5, limit - 13) if mode == "isolated" else encoded(12, 5, limit - 19)
    for _ in range(2):
        for row in ([short], [most], [short, most], [most, short]):
            scores = model(**collator.pack(row, pad_to_multiple_of=64)).scores
            for item, found in zip(row, scores, strict=True):
                assert (found - own(item)).abs().max() <= 2e-6
        model.base_model(
            input_ids=torch.tensor([tiny.words(60, 1)])
        )  # an ordinary pass beyond the switch leaves state behind
    beyond = (12, 5, limit - 12) if mode == "isolated" else (12, 5, limit - 18)
    with pytest.raises(
        ValueError, match=rf"this one: .* takes {limit + 1} positions, and beyond {limit} this model's rope"
    ):
        encoded(*beyond)
    if mode == "comparative":
        plain = [*tiny.words(limit, 1), collator.separator_id]
        with pytest.raises(ValueError, match=f"the batch: its longest row takes {limit + 1} positions"):
            model(input_ids=torch.tensor([plain]))
        assert model(input_ids=torch.tensor([plain[1:]])).scores.isfinite().all()


def test_ropes_that_never_change_have_no_switch():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    for model in (build("Llama"), build("Llama", rope_parameters=rope), tiny.build("gemma3"), tiny.build("qwen3_vl")):
        assert ropes.switch_of(model) is None
