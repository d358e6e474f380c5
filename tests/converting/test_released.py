"""Checkpoints of the paper's released code: a fused toy of Molmo2's remote code against what is imported from it."""

import copy
import json

import pytest
import released_code as released
import tiny
import torch
from safetensors.torch import load_file, save_file

import yojo
from yojo.converting import merge
from yojo.converting.released import ADAPTER_FILE, CONFIG_FILE, HEAD_FILE, export_mr2rm, import_mr2rm

PROMPT, RESPONSES = "w1 w2 w3", ["w4 w5", "w6", "w7 w8 w9"]
TEMPLATE = (
    "{% for m in messages %}<start> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<start> {% endif %}"
)


class Part(torch.nn.Module):
    """Some columns of what a fused projection computes; it owns no weights."""

    def __init__(self, owner, name, start, stop):
        super().__init__()
        self.owner, self.name, self.place = [owner], name, slice(start, stop)

    def forward(self, hidden):
        return getattr(self.owner[0], self.name)(hidden)[..., self.place]


class FusedMLP(torch.nn.Module):
    """Remote code: one projection to (x, gate), then act(gate) * x."""

    def __init__(self, mlp):
        super().__init__()
        self.ff_proj, self.ff_out, self.act = joined(mlp.up_proj, mlp.gate_proj), mlp.down_proj, mlp.act_fn

    def forward(self, hidden):
        hidden, gate = self.ff_proj(hidden).chunk(2, dim=-1)
        return self.ff_out(self.act(gate) * hidden)


def joined(*linears):
    weight = torch.cat([linear.weight for linear in linears])
    made = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight.detach().clone()
    return made


def fused(model):
    """A Molmo2 whose decoder has the remote code's projections: attention's query, key and value in one, and so on."""
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        attention.att_proj = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        attention.attn_out = joined(attention.o_proj)
        start = 0
        for name in ("q_proj", "k_proj", "v_proj"):
            stop = start + getattr(attention, name).out_features
            setattr(attention, name, Part(attention, "att_proj", start, stop))
            start = stop
        attention.o_proj = Part(attention, "attn_out", None, None)
        layer.mlp = FusedMLP(layer.mlp)
    return model


def processor(with_separator=True):
    made = tiny.tokenizer(with_separator)
    made.chat_template = TEMPLATE
    return made


def write_released(folder, head, pooling, kind, activation="silu", head_dim=24):
    torch.save(head.state_dict(), folder / HEAD_FILE)
    settings = {
        "value_head_type": kind,
        "value_head_hidden_dim": head_dim if kind == "mlp" else None,
        "value_head_activation": activation,
        "value_head_input_dim": tiny.HIDDEN,
        "resp_repr_mode": pooling,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def base_path(tmp_path_factory):
    """The base model as it lies on the hub: remote names."""
    folder = tmp_path_factory.mktemp("base")
    tiny.build("molmo2").save_pretrained(folder)
    names = load_file(folder / "model.safetensors")
    assert (
        "model.transformer.blocks.0.self_attn.att_proj.weight" in names and "model.transformer.wte.embedding" in names
    )
    processor(with_separator=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[("last", "mlp", "gelu"), ("first_last_concat", "linear", "selu")])
def trained(request, base_path, tmp_path_factory):
    """(folder of a released adapter, expected scores)."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    pooling, kind, activation = request.param
    model = fused(tiny.build("molmo2"))
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["att_proj", "attn_out", "ff_proj", "ff_out"], init_lora_weights=False,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config).eval()
    folder = tmp_path_factory.mktemp("adapter")
    config.base_model_name_or_path = str(base_path)
    config.save_pretrained(folder)
    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    state = {name.replace("language_model.layers", "transformer.blocks"): t.clone() for name, t in state.items()}
    assert len(state) == 2 * 2 * 4  # lora_A and lora_B of four projections in two layers
    save_file(state, folder / ADAPTER_FILE)
    head = released.make_head(pooling, kind, activation, tiny.HIDDEN)
    write_released(folder, head, pooling, kind, activation)
    tokenizer = processor()
    tokenizer.save_pretrained(folder)
    return folder, scores_of(peft_model, tokenizer, pooling, head)


def scores_of(model, tokenizer, pooling, head):
    answer = f"\n\n{released.SEPARATOR}\n\n".join(RESPONSES)
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": answer}]
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False))["input_ids"]
    separator = tokenizer.convert_tokens_to_ids(released.SEPARATOR)
    ends, starts = released.ends_and_starts(
        ids, tokenizer.encode(answer, add_special_tokens=False), separator, len(RESPONSES)
    )
    return released.scores(model, {"input_ids": torch.tensor([ids])}, ends, starts, pooling, head)


def close(first, second, tolerance=1e-6):
    return (first - second).abs().max() <= tolerance * max(1, second.abs().max())


def test_a_fused_adapter_scores_as_in_the_released_code(trained, base_path, tmp_path):
    folder, expected = trained
    reward_model = import_mr2rm(folder, tmp_path)
    assert close(reward_model.score(PROMPT, RESPONSES), expected)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.score(PROMPT, RESPONSES), reward_model.score(PROMPT, RESPONSES))
    plain = yojo.RewardModel(yojo.patch(tiny.build("molmo2"), processor(), format="mr2rm", pooling="last"), processor())
    assert not close(plain.score(PROMPT, RESPONSES), expected, 1e-3)  # the adapter does something
    assert loaded.config.format == "mr2rm" and loaded.config.scale_scores
    targets = loaded.model.peft_config["default"].target_modules
    assert all("language_model" in name for name in targets)  # not the vision tower, whose names are alike


def test_the_division_is_the_callers_word(trained):
    folder, expected = trained
    unscaled = import_mr2rm(folder, scale_scores=False)
    assert close(unscaled.score(PROMPT, RESPONSES), expected * tiny.HIDDEN**0.5)


def test_in_bfloat16_what_is_loaded_is_what_was_imported(trained, tmp_path):
    reward_model = import_mr2rm(trained[0], tmp_path, dtype=torch.bfloat16)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    assert loaded.model.dtype == torch.bfloat16
    assert torch.equal(loaded.score(PROMPT, RESPONSES), reward_model.score(PROMPT, RESPONSES))
    assert close(loaded.score(PROMPT, RESPONSES), trained[1], 0.1)
    state = torch.load(trained[0] / HEAD_FILE, weights_only=True)
    ours = dict(loaded.model.get_base_model().score.named_parameters())
    assert all(torch.equal(ours[name], state[key]) for key, name in released_names(state).items())  # not rounded


def released_names(state):
    return released.names_of(torch.nn.Linear(1, 1) if "weight" in state else None)


def test_an_adapter_goes_out_and_in_again_to_the_bit(trained, tmp_path):
    folder, _ = trained
    reward_model = import_mr2rm(folder)
    export_mr2rm(reward_model, tmp_path / "out")
    again = import_mr2rm(tmp_path / "out")
    assert torch.equal(again.score(PROMPT, RESPONSES), reward_model.score(PROMPT, RESPONSES))
    ours, theirs = load_file(tmp_path / "out" / ADAPTER_FILE), load_file(folder / ADAPTER_FILE)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert {name.rpartition("wte.")[2] for name in set(ours) - set(theirs)} == {"embedding", "new_embedding"}
    heads = [torch.load(path / HEAD_FILE, weights_only=True) for path in (folder, tmp_path / "out")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["resp_repr_mode"] == again.config.pooling


def test_a_merged_model_scores_alike(trained, tmp_path):
    folder, expected = trained
    import_mr2rm(folder, tmp_path / "adapter")
    merged = merge.merge(tmp_path / "adapter", tmp_path / "merged")
    export_mr2rm(merged, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.transformer.blocks.1.mlp.ff_proj.weight" in weights and not any("score" in name for name in weights)
    again = import_mr2rm(tmp_path / "out")
    assert torch.equal(again.score(PROMPT, RESPONSES), merged.score(PROMPT, RESPONSES))
    assert close(again.score(PROMPT, RESPONSES), expected, 1e-5)
    weights["model.transformer.blocks.0.extra"] = torch.zeros(2)
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit transformers' Molmo2.*: unexpected keys .*extra"):
        import_mr2rm(tmp_path / "out")
    with pytest.raises(ValueError, match="base_model is given, but .* holds a merged model"):
        import_mr2rm(tmp_path / "out", base_model="x")


def test_another_family_goes_out_and_in_again(make_reward_model, backbone, tmp_path, examples):
    """Adapters of transformers' own names; the separator's row was added to the embedding."""
    from peft import LoraConfig, get_peft_model

    from yojo.demo.backbone import BACKBONE

    model, tokenizer = copy.deepcopy(backbone)
    yojo.patch(model, tokenizer, format="mr2rm", pooling="response_mean", head_dim=16)
    head = released.make_head("response_mean", "mlp", "silu", model.config.get_text_config().hidden_size, head_dim=16)
    released.put_head(model.score, head)
    with torch.no_grad():
        model.score.separator_delta.copy_(torch.randn(128) * 0.3)  # becomes a part of the row
    full = yojo.RewardModel(model.eval(), tokenizer)
    export_mr2rm(full, tmp_path / "full")
    again = import_mr2rm(tmp_path / "full")
    assert all(map(torch.equal, again.score_many(examples), full.score_many(examples)))
    model.config.name_or_path = str(BACKBONE)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, modules_to_save=["score"])
    adapted = yojo.RewardModel(get_peft_model(model, config).eval(), tokenizer)
    export_mr2rm(adapted, tmp_path / "adapter")
    assert not any("score" in name for name in load_file(tmp_path / "adapter" / ADAPTER_FILE))
    again = import_mr2rm(tmp_path / "adapter")
    assert all(map(torch.equal, again.score_many(examples), adapted.score_many(examples)))


def test_an_adapter_with_an_embedding_of_its_own_is_not_exported(backbone, tmp_path):
    """The released layout has the embedding in the base model, whose rows are not those that were trained."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = copy.deepcopy(backbone)
    yojo.patch(model, tokenizer, format="mr2rm", pooling="last")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score", "embed_tokens"])
    adapted = yojo.RewardModel(get_peft_model(model, config).eval(), tokenizer)
    with pytest.raises(ValueError, match=r"the adapter trained the model's embedding.*merge it first"):
        export_mr2rm(adapted, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# ---- what does not fit ----


@pytest.fixture()
def copied(trained, tmp_path):
    import shutil

    return shutil.copytree(trained[0], tmp_path / "copied")


def change(folder, **settings):
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_head_that_does_not_fit_is_an_error(copied):
    state = torch.load(copied / HEAD_FILE, weights_only=True)
    name = sorted(state)[-1]
    for settings, message in (
        ({"resp_repr_mode": "kwise"}, "resp_repr_mode must be one of last, first, .*, got 'kwise'"),
        ({"value_head_type": "deep"}, "value_head_type must be one of linear, mlp, got 'deep'"),
    ):
        kept = (copied / CONFIG_FILE).read_text()
        change(copied, **settings)
        with pytest.raises(ValueError, match=message):
            import_mr2rm(copied)
        (copied / CONFIG_FILE).write_text(kept)
    torch.save({key: value for key, value in state.items() if key != name}, copied / HEAD_FILE)
    with pytest.raises(ValueError, match=r"a head of type (mlp|linear) has \[.*\], found \["):
        import_mr2rm(copied)
    torch.save(state | {name: state[name] * float("nan")}, copied / HEAD_FILE)
    with pytest.raises(ValueError, match="has weights that are not finite"):
        import_mr2rm(copied)
    torch.save(state | {name: torch.ones(1, 7)}, copied / HEAD_FILE)
    with pytest.raises(ValueError, match=r"weight2 has shape \[1, 7\], the model and .* need \[1, "):
        import_mr2rm(copied)
    torch.save({"code": print}, copied / HEAD_FILE)  # a pickle that would run something
    with pytest.raises(ValueError, match="is damaged, or holds more than tensors"):
        import_mr2rm(copied)
    (copied / HEAD_FILE).unlink()
    with pytest.raises(ValueError, match="value_head.pt is missing, and a random head would score at random"):
        import_mr2rm(copied)
    (copied / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match="has no reward_model_config.json, which says what the value head is"):
        import_mr2rm(copied)


def test_tensors_without_a_place_are_named(copied):
    original = {name: tensor.clone() for name, tensor in load_file(copied / ADAPTER_FILE).items()}
    extra = "base_model.model.model.vision_backbone.image_projector.w1.lora_A.weight"
    save_file(original | {extra: torch.zeros(2, 2)}, copied / ADAPTER_FILE)
    with pytest.raises(ValueError, match="tensors that have no place in the model: .*image_projector.w1"):
        import_mr2rm(copied)
    lost = next(name for name in original if "att_proj.lora_B" in name)
    save_file({name: t for name, t in original.items() if name != lost}, copied / ADAPTER_FILE)
    with pytest.raises(ValueError, match=r"places without a tensor \['.*k_proj.lora_B"):
        import_mr2rm(copied)
    save_file(original | {lost: torch.zeros(5, 4)}, copied / ADAPTER_FILE)
    with pytest.raises(ValueError, match=r"att_proj.lora_B.weight has 5 rows, .* need \[32, 16, 16\]"):
        import_mr2rm(copied)
    save_file(
        {name.replace("blocks.1", "blocks.7"): tensor for name, tensor in original.items()}, copied / ADAPTER_FILE
    )
    with pytest.raises(ValueError, match="blocks.7.* has no place in the base model"):
        import_mr2rm(copied)
    (copied / ADAPTER_FILE).write_bytes(b"12345678")
    with pytest.raises(ValueError, match="has a damaged adapter"):
        import_mr2rm(copied)
    (copied / ADAPTER_FILE).unlink()
    with pytest.raises(ValueError, match="has no adapter: adapter_model.safetensors is missing"):
        import_mr2rm(copied)


def test_embeddings_in_the_adapter(copied, base_path):
    """The separator's row is taken from them; any other row must be the base model's."""
    original = {name: tensor.clone() for name, tensor in load_file(copied / ADAPTER_FILE).items()}
    table = tiny.build("molmo2").get_input_embeddings().weight.detach().clone()
    separator = processor().convert_tokens_to_ids(released.SEPARATOR)
    vocabulary, prefix = tiny.VOCABULARY - 8, "base_model.model.model.transformer.wte."
    table = table[: separator + 1]  # the released code cuts spare rows behind the tokenizer's last token off
    table[separator] = 0.25

    def save():
        tables = {f"{prefix}embedding": table[:vocabulary], f"{prefix}new_embedding": table[vocabulary:]}
        save_file(original | {name: tensor.clone() for name, tensor in tables.items()}, copied / ADAPTER_FILE)

    save()
    model = import_mr2rm(copied).model.get_base_model()
    assert (model.get_input_embeddings().weight[separator] == 0.25).all()
    table[7] += 1
    save()
    with pytest.raises(ValueError, match="row 7 of the adapter's embedding is not the base model's"):
        import_mr2rm(copied)


def test_a_spare_row_is_the_separators(copied):
    """Molmo2 has more rows than its tokenizer has tokens, and the released code leaves the next one as it is."""
    separator = processor().convert_tokens_to_ids(released.SEPARATOR)
    expected = tiny.build("molmo2").get_input_embeddings().weight[separator]
    assert torch.equal(import_mr2rm(copied).model.get_base_model().get_input_embeddings().weight[separator], expected)


@pytest.mark.parametrize(
    "option, value", [("use_dora", True), ("bias", "lora_only"), ("rank_pattern", {"att_proj": 2})]
)
def test_adapters_that_are_not_converted(copied, option, value):
    file = copied / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    with pytest.raises(ValueError, match="is not converted|are not converted"):
        import_mr2rm(copied)
    file.write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(ValueError, match="holds a IA3 adapter; the released code makes LORA ones"):
        import_mr2rm(copied)


def test_a_folder_of_checkpoints_is_explained(copied, tmp_path):
    (tmp_path / "run").mkdir()
    for name in (CONFIG_FILE, HEAD_FILE):
        (tmp_path / "run" / name).write_bytes((copied / name).read_bytes())
    copied.rename(tmp_path / "run" / "checkpoint-20")
    with pytest.raises(ValueError, match="holds neither an adapter .*; it has checkpoint-20: import one of them"):
        import_mr2rm(tmp_path / "run")


def test_a_trained_separator_goes_out_and_in_again(trained, tmp_path):
    reward_model = import_mr2rm(trained[0])
    before = reward_model.score(PROMPT, RESPONSES)
    with torch.no_grad():
        reward_model.model.get_base_model().score.separator_delta.fill_(0.5)
    export_mr2rm(reward_model, tmp_path)
    again = import_mr2rm(tmp_path)
    assert torch.equal(again.score(PROMPT, RESPONSES), reward_model.score(PROMPT, RESPONSES))
    assert not close(again.score(PROMPT, RESPONSES), before, 1e-3)


def test_what_cannot_be_exported(make_reward_model, trained, tmp_path):
    with pytest.raises(
        ValueError, match="the model has format='yojo': the released code lays prompt and responses out"
    ):
        export_mr2rm(make_reward_model(), tmp_path)
    with pytest.raises(ValueError, match="scale_scores=False, which the released layout cannot say"):
        export_mr2rm(import_mr2rm(trained[0], scale_scores=False), tmp_path)
    apart = import_mr2rm(trained[0])
    for name, parameter in apart.model.named_parameters():
        if "layers.0.self_attn.k_proj.lora_A" in name:
            parameter.data += 1
    with pytest.raises(ValueError, match="layer 0: .* have adapters of their own, .* merge first"):
        export_mr2rm(apart, tmp_path / "out")
    assert not (tmp_path / "out").exists()
