"""Fingerprints of reward models: the same wherever the scores are the same, and another one where they are not."""

import copy
import json
import subprocess
import sys

import pytest
import real_processors
import tiny
import torch
import transformers
from peft import get_peft_model
from saved_cases import backbone, lora, moved, scores, tokenizer
from turn_cases import text_model, tokenizer_of_kind

import yojo
from yojo.converting.merge import merge
from yojo.inputs.processors import load_processor
from yojo.saving.identity import reward_model_fingerprint
from yojo.scoring.job import differences


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    path = tmp_path_factory.mktemp("stock")
    backbone().save_pretrained(path)
    tokenizer().save_pretrained(path)
    # As a tokenizer of a real model comes: of the class that transformers chooses for the model.
    load_processor(path).save_pretrained(path)
    return path


def told(one, other):
    """What the fingerprints of two models differ in, names only."""
    return [line.split(":")[0] for line in differences(one, other)]


def of(reward_model):
    found = reward_model_fingerprint(reward_model)
    assert json.loads(json.dumps(found)) == found
    return found


def full(stock, **options):
    return yojo.RewardModel(*with_head(transformers.AutoModelForCausalLM.from_pretrained(stock, **options), stock))


def with_head(model, stock, **options):
    processor = load_processor(stock)
    torch.manual_seed(0)
    yojo.patch(model.eval(), processor, **({"mode": "isolated", "head_dim": 8} | options))
    return model, processor


def adapted(stock, config=None, **options):
    model, processor = with_head(transformers.AutoModelForCausalLM.from_pretrained(stock), stock)
    return yojo.RewardModel(moved(get_peft_model(model, config or lora(), **options)).eval(), processor)


@pytest.mark.parametrize("make", [full, adapted, "several"])
def test_the_same_after_saving_and_loading(stock, tmp_path, make):
    if make == "several":  # rslora, an embedding and a norm beside the adapter, under a name of its own
        config = lora(r=4, use_rslora=True, lora_alpha=7, rank_pattern={"v_proj": 2})
        reward_model = adapted(stock, config, adapter_name="mine")
        with torch.no_grad():
            reward_model.model.get_base_model().model.norm.weight.add_(0.1)
    else:
        reward_model = make(stock)
    before = of(reward_model)
    assert of(reward_model) == before and reward_model.model.training is False
    scores(reward_model)
    assert of(reward_model) == before  # scoring changes nothing
    assert of(copy.deepcopy(reward_model)) == before
    reward_model.save_pretrained(tmp_path / "m")
    loaded = yojo.RewardModel.from_pretrained(tmp_path / "m")
    assert told(before, of(loaded)) == []
    loaded.save_pretrained(tmp_path / "again")
    assert told(before, of(yojo.RewardModel.from_pretrained(tmp_path / "again"))) == []


def test_a_checkpoint_of_the_trainer_is_the_model_it_was(stock, tmp_path):
    reward_model = full(stock)
    reward_model.model.save_pretrained(tmp_path)
    reward_model.processor.save_pretrained(tmp_path)
    assert told(of(reward_model), of(yojo.RewardModel.from_pretrained(tmp_path))) == []


def test_a_vision_language_model(make_reward_model, tmp_path, examples):
    reward_model = make_reward_model(mode="isolated", head_dim=64)
    before = of(reward_model)
    reward_model.score_many(examples)
    assert of(reward_model) == before
    reward_model.save_pretrained(tmp_path)
    assert told(before, of(yojo.RewardModel.from_pretrained(tmp_path))) == []
    fewer = yojo.RewardModel.from_pretrained(tmp_path, processor_options={"max_pixels": 3136})
    assert told(before, of(fewer)) and all(name.startswith("processor.image") for name in told(before, of(fewer)))


def test_the_same_in_another_process(make_reward_model, tmp_path):
    """Hashes of Python's strings differ from process to process, and with them the order of sets and vocabularies."""
    reward_model = make_reward_model(layers=1, mode="isolated", head_dim=8)
    reward_model.save_pretrained(tmp_path)
    code = (
        "import json, yojo\nfrom yojo.saving.identity import reward_model_fingerprint as of\n"
        f"print(json.dumps(of(yojo.RewardModel.from_pretrained({str(tmp_path)!r}))))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told(of(reward_model), json.loads(result.stdout.splitlines()[-1])) == []


@pytest.mark.parametrize("family", ["Molmo2", "Gemma 3", "SmolVLM", "Mistral 3", "PaliGemma"])
def test_families_with_their_own_processors(tmp_path, family):
    if family.lower() in tiny.LACKING:
        pytest.skip(tiny.LACKING[family.lower()])
    reward_model = real_processors.reward_model(family, "isolated")[0]
    reward_model.save_pretrained(tmp_path)
    assert told(of(reward_model), of(yojo.RewardModel.from_pretrained(tmp_path))) == []


def change_head(reward_model):
    reward_model.model.score.weight2.data[0, 0] += 1e-6


def change_separator(reward_model):
    base = reward_model.model
    base.get_input_embeddings().weight.data[base.yojo.separator_id, 3] += 1e-6


def change_one_weight(reward_model):
    reward_model.model.model.layers[1].mlp.up_proj.weight.data[7, 5] *= 1.0001


def change_template(reward_model):
    reward_model.processor.chat_template = "{{ messages[0].content }}"


def change_token(reward_model):
    reward_model.processor.add_tokens(["which"])


def change_end(reward_model):
    reward_model.processor.eos_token = "a"


@pytest.mark.parametrize(
    "change, name",
    [
        (change_head, ["weights.head"]),
        (change_separator, ["weights.backbone", "weights.head"]),
        (change_one_weight, ["weights.backbone"]),
        (change_template, ["chat_template"]),
        (change_token, ["tokenizer"]),
        (change_end, ["tokenizer"]),
        (lambda reward_model: reward_model.model.to(torch.bfloat16), ["dtype", "weights.backbone", "weights.head"]),
        (lambda reward_model: setattr(reward_model.model.config, "rms_norm_eps", 1e-3), ["config"]),
    ],
)
def test_what_changes_a_score_shows(stock, change, name):
    reward_model = full(stock)
    before = of(reward_model)
    change(reward_model)
    assert told(before, of(reward_model)) == name


def test_a_change_of_one_number_in_a_large_weight_shows(stock):
    """Samples are 1024 numbers of a large tensor."""
    reward_model = yojo.RewardModel(*with_head(backbone(hidden_size=128, intermediate_size=256), stock))
    before = of(reward_model)
    weight = reward_model.model.model.layers[0].mlp.down_proj.weight
    assert weight.numel() > 16384
    told_apart = 0
    for place in (1, 777, 20001):
        kept = weight.data.view(-1)[place].clone()
        weight.data.view(-1)[place] += 0.01
        told_apart += told(before, of(reward_model)) == ["weights.backbone"]
        weight.data.view(-1)[place] = kept
    assert told_apart == 3 and of(reward_model) == before


def test_settings(stock):
    assert told(of(full(stock)), of(full(stock, attn_implementation="eager"))) == []  # rounding at most
    found = {}
    for name, options in {
        "isolated": {},
        "mode": {"mode": "comparative"},
        "pooling": {"pooling": "last"},
        "scale_scores": {"scale_scores": False},
        "turn": {"turn": "generation_prompt"},
        "loss": {"loss": "plackett_luce"},
    }.items():
        found[name] = of(yojo.RewardModel(*with_head(backbone(), stock, **options)))
    first = found.pop("isolated")
    assert {name: told(first, other) for name, other in found.items()} == {
        "mode": ["settings.mode"],
        "pooling": ["settings.pooling"],
        "scale_scores": ["settings.scale_scores"],
        "turn": ["settings.turn"],
        "loss": [],  # is of training alone
    }


# ---- adapters ----


def change_alpha(stock):
    return adapted(stock, lora(lora_alpha=64))


def change_scale(stock):
    reward_model = adapted(stock)
    for module in reward_model.model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    return reward_model


def change_adapter_weight(stock):
    reward_model = adapted(stock)
    next(p for name, p in reward_model.model.named_parameters() if "lora_B" in name).data[0, 0] += 1e-6
    return reward_model


def disabled(stock):
    reward_model = adapted(stock)
    reward_model.model.disable_adapter_layers()
    return reward_model


def another_one_active(stock):
    reward_model = adapted(stock)
    reward_model.model.add_adapter("other", lora())
    moved(reward_model.model, ("other",), seed=5)
    reward_model.model.set_adapter("other")
    return reward_model


@pytest.mark.parametrize("change", [change_alpha, change_scale, change_adapter_weight, disabled, another_one_active])
def test_what_changes_an_adapter_shows(stock, change):
    before, after = adapted(stock), change(stock)
    assert not torch.equal(scores(before), scores(after)) or change is change_adapter_weight
    assert set(told(of(before), of(after))) - {"weights.head"} == {"weights.adapter"}


def test_what_changes_no_score_of_an_adapter_shows_not(stock):
    before = of(adapted(stock))
    assert told(before, of(adapted(stock, lora(lora_dropout=0.5)))) == []
    assert told(before, of(adapted(stock, adapter_name="mine"))) == []
    reward_model = adapted(stock)
    reward_model.model.add_adapter("idle", lora())
    reward_model.model.set_adapter("default")
    assert told(before, of(reward_model)) == []
    reward_model.model.get_base_model().config.update({"pad_token_id": 3, "use_cache": False})  # as Trainers do
    assert told(before, of(reward_model)) == []
    # The head itself is trained: what is not in modules_to_save is the same.
    assert before["weights"]["adapter"] is not None and of(full(stock))["weights"]["adapter"] is None


def test_an_adapter_and_its_merge_are_two(stock, tmp_path):
    reward_model = adapted(stock)
    reward_model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = yojo.RewardModel.from_pretrained(tmp_path / "merged")
    assert set(told(of(reward_model), of(merged))) == {"weights.adapter", "weights.backbone"}


def test_other_base_weights_show(stock, tmp_path):
    backbone(seed=4).save_pretrained(tmp_path)
    load_processor(stock).save_pretrained(tmp_path)
    assert told(of(adapted(stock)), of(adapted(tmp_path))) == [
        "weights.backbone",
        "weights.head",
    ]  # the separator's row


# ---- where weights lie, dates ----


def test_offloaded_weights_are_read(stock, tmp_path):
    reward_model = full(stock)
    reward_model.save_pretrained(tmp_path / "m")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "disk", "lm_head": "disk"}
    loaded = yojo.RewardModel.from_pretrained(tmp_path / "m", device_map=places, offload_folder=tmp_path / "off")
    assert any(parameter.is_meta for parameter in loaded.model.parameters())
    assert told(of(reward_model), of(loaded)) == []


def test_weights_that_cannot_be_read_are_an_error(stock):
    reward_model = full(stock)
    reward_model.model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"model.norm.weight is on the meta device: its numbers cannot be read"):
        of(reward_model)


def test_the_date_that_a_template_prints(tmp_path):
    def made(day):
        kind = tokenizer_of_kind("bytes", "chatml")
        kind.chat_template = "{{ strftime_now('%Y') }}" + kind.chat_template
        yojo.dates.settle(kind, day)
        return text_model(kind, mode="isolated", head_dim=8)

    one, other = made("2026-01-02"), made("2026-01-03")
    assert of(one)["date"] == "2026-01-02" and told(of(one), of(other))[-1] == "date"
    one.save_pretrained(tmp_path)
    assert told(of(one), of(yojo.RewardModel.from_pretrained(tmp_path))) == []
    assert transformers.__version__ not in json.dumps(of(one))
