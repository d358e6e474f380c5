"""An adapter means something on one base model, and a folder holds all that changes a score, or saving it is refused."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from peft import IA3Config, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from saved_cases import adapted, backbone, lora, moved, patched, scores, tokenizer

import yojo
from yojo.converting.merge import merge
from yojo.files import saved
from yojo.files.saved import ADAPTER_FILE, BESIDE_FILE, CONFIG_FILE
from yojo.patching import fingerprints
from yojo.training import resume


@pytest.fixture()
def base_path(tmp_path):
    backbone().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(path, **options):
    return yojo.RewardModel.from_pretrained(path, **options)


def comes_back(reward_model, path, tolerance=0.0, **options):
    reward_model.save_pretrained(path)
    loaded = load(path, **options)
    assert (scores(loaded) - scores(reward_model)).abs().max() <= tolerance
    return loaded


def change(file, name, function):
    weights = {key: tensor.clone() for key, tensor in load_file(file).items()}
    weights[name] = function(weights[name])
    save_file(weights, file, metadata={"format": "pt"})


# ---- the base model ----


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_other_weights_under_the_same_name_are_refused(base_path, tmp_path, name, caplog):
    reward_model = adapted(base_path)
    comes_back(reward_model, tmp_path / "rm")
    change(base_path / "model.safetensors", name, lambda weight: weight + 1e-4)
    for call in (load, lambda path: merge(path, tmp_path / "merged")):
        with pytest.raises(
            ValueError, match=f"trained on other weights than {base_path} holds .1 of .*{name}"
        ) as error:
            call(tmp_path / "rm")
    assert "base_model=" in str(error.value) and "check_base=False" in str(error.value)
    with caplog.at_level(logging.WARNING):
        assert not torch.equal(scores(load(tmp_path / "rm", check_base=False)), scores(reward_model))
    assert "other weights" in caplog.text
    merge(tmp_path / "rm", tmp_path / "merged", check_base=False)


def test_another_base_model_given_by_hand_is_refused(base_path, tmp_path):
    adapted(base_path).save_pretrained(tmp_path / "rm")
    shutil.copytree(base_path, tmp_path / "copy")
    load(tmp_path / "rm", base_model=tmp_path / "copy")
    backbone(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained on other weights than .*other holds"):
        load(tmp_path / "rm", base_model=tmp_path / "other")


def test_an_older_folder_without_fingerprints_loads(base_path, tmp_path):
    adapted(base_path).save_pretrained(tmp_path / "rm")
    description = json.loads((tmp_path / "rm" / CONFIG_FILE).read_text())
    del description["weights"], description["beside"]
    (tmp_path / "rm" / CONFIG_FILE).write_text(json.dumps(description))
    backbone(seed=5).save_pretrained(base_path)
    load(tmp_path / "rm")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("trained", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_the_same_weights_are_known_in_every_dtype_and_others_are_not(stored, trained, loaded):
    file = {"w": torch.randn(200, 100, generator=torch.Generator().manual_seed(0)).to(stored)}
    was = fingerprints.describe(fingerprints.take({"w": file["w"].to(trained)}))
    same = fingerprints.take({"w": file["w"].to(loaded)})
    differ, unknown = fingerprints.compare(was, same, {"w"})
    assert not differ
    assert not unknown or {trained, loaded} == {torch.bfloat16, torch.float16}
    other = fingerprints.take({"w": (file["w"].float() * 1.01).to(stored).to(loaded)})
    differ, unknown = fingerprints.compare(was, other, {"w"})
    assert differ or {trained, loaded} == {torch.bfloat16, torch.float16} and unknown


def test_a_model_in_shards_or_on_other_devices_is_the_same(base_path, tmp_path):
    adapted(base_path).save_pretrained(tmp_path / "rm")
    transformers.AutoModelForCausalLM.from_pretrained(base_path).save_pretrained(tmp_path / "s", max_shard_size="4KB")
    assert len(list((tmp_path / "s").glob("model-*.safetensors"))) > 2
    load(tmp_path / "rm", base_model=tmp_path / "s")


@pytest.mark.parametrize("tied", [True, False])
def test_fingerprints_see_the_same_tensors_below_an_adapter_and_after_the_patch(tied):
    model = backbone(tie_word_embeddings=tied)
    before = fingerprints.tensors_of(model)
    assert "model.embed_tokens.weight" in before and "lm_head.weight" not in before
    config = lora(target_modules=["q_proj", "embed_tokens", "lm_head"], trainable_token_indices=None)
    model = get_peft_model(yojo.patch(model, tokenizer()), config)
    after = fingerprints.tensors_of(yojo.patch.__globals__["unwrap"](model))
    assert list(after) == list(before)
    assert not fingerprints.changed(fingerprints.take(before), after)


# ---- a full model ----


def test_weights_of_another_save_of_the_same_size_are_refused(tmp_path):
    for name, seed in (("a", 0), ("b", 3)):
        backbone(seed=seed).save_pretrained(tmp_path / f"base-{name}")
        model, processor = patched(tmp_path / f"base-{name}")
        comes_back(yojo.RewardModel(model, processor), tmp_path / name)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights it was saved with"):
        load(tmp_path / "a")
    load(tmp_path / "a", check_files=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_settings_changed_by_hand_are_refused(base_path, tmp_path, name):
    yojo.RewardModel(*patched(base_path)).save_pretrained(tmp_path / "rm")
    file = tmp_path / "rm" / name
    file.write_text(file.read_text() + " ")
    with pytest.raises(ValueError, match=f"{name} is not the file that .*check_files=False"):
        load(tmp_path / "rm")
    load(tmp_path / "rm", check_files=False)
    file.unlink()
    with pytest.raises(ValueError, match=f"is not whole: {name} is missing"):
        load(tmp_path / "rm")


def test_a_file_that_would_be_read_beside_the_saved_ones_is_refused(base_path, tmp_path):
    yojo.RewardModel(*patched(base_path)).save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="preprocessor_config.json was not there when"):
        saved.check_hashes(tmp_path / "rm", saved.read_description(tmp_path / "rm"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "added_tokens.json").write_text("{}")
    with pytest.raises(ValueError, match="holds added_tokens.json of another model"):
        yojo.RewardModel(*patched(base_path)).save_pretrained(tmp_path / "mine")


# ---- beside the adapter ----


@pytest.mark.parametrize("words", [("norm",), ("embed_tokens",), ("down_proj", "bias")])
@pytest.mark.parametrize("frozen_again", [False, True])
def test_weights_trained_beside_an_adapter_are_saved_with_it(base_path, tmp_path, words, frozen_again):
    reward_model = adapted(base_path)
    model = reward_model.model
    for name, parameter in model.named_parameters():
        if any(word in name for word in words):
            parameter.requires_grad_(True)
    moved(model, words, seed=4)
    if frozen_again:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    loaded = comes_back(reward_model, tmp_path / "rm")
    assert set(load_file(tmp_path / "rm" / BESIDE_FILE)) == set(
        name for name in fingerprints.tensors_of(model.get_base_model()) if any(word in name for word in words)
    )
    again = comes_back(loaded, tmp_path / "again")  # frozen in this model, and still other weights than the base's
    assert torch.equal(scores(again), scores(reward_model))
    merged = merge(tmp_path / "rm", tmp_path / "merged")
    assert (scores(merged) - scores(reward_model)).abs().max() <= 1e-5
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    reward_model.save_pretrained(tmp_path / "gathered", state_dict=state)
    assert torch.equal(scores(load(tmp_path / "gathered")), scores(reward_model))
    live = adapted(base_path)
    resume.load_weights(live.model, tmp_path / "rm")
    assert torch.equal(scores(live), scores(reward_model))


def test_nothing_is_saved_beside_an_adapter_alone(base_path, tmp_path):
    comes_back(adapted(base_path), tmp_path / "rm")
    assert not (tmp_path / "rm" / BESIDE_FILE).exists()


def test_weights_beside_an_adapter_that_are_missing_are_an_error(base_path, tmp_path):
    reward_model = adapted(base_path)
    moved(reward_model.model, ["norm"])
    reward_model.save_pretrained(tmp_path / "rm")
    (tmp_path / "rm" / BESIDE_FILE).unlink()
    with pytest.raises(ValueError, match=f"{BESIDE_FILE} is missing"):
        load(tmp_path / "rm")
    with pytest.raises(ValueError, match=f"{BESIDE_FILE} is missing or damaged"):
        load(tmp_path / "rm", check_files=False)


# ---- adapters of other names, kinds and states ----


@pytest.mark.parametrize(
    "config",
    [
        lora(use_dora=True),
        lora(use_rslora=True, lora_alpha=5),
        lora(init_lora_weights="pissa"),
        lora(modules_to_save=["score", "embed_tokens"]),
        lora(target_modules=["q_proj", "embed_tokens"]),
        lora(bias="all"),
        lora(trainable_token_indices={"embed_tokens": [1, 2]}),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], modules_to_save=["score"]),
    ],
    ids=["dora", "rslora", "pissa", "embedding copied", "embedding adapted", "biases", "token rows", "ia3"],
)
def test_adapters_of_other_kinds_come_back(base_path, tmp_path, config):
    comes_back(adapted(base_path, config), tmp_path / "rm", 1e-6)


def test_an_adapter_of_another_name_comes_back(base_path, tmp_path):
    reward_model = adapted(base_path, adapter_name="judge")
    comes_back(reward_model, tmp_path / "rm")
    assert (tmp_path / "rm" / ADAPTER_FILE).is_file() and not (tmp_path / "rm" / "judge").exists()


def test_of_several_adapters_the_active_one_is_saved(base_path, tmp_path):
    reward_model = adapted(base_path)
    reward_model.model.add_adapter("second", lora(r=3))
    reward_model.model.set_adapter("second")
    moved(reward_model.model, ["second"])
    comes_back(reward_model, tmp_path / "rm")
    first = scores(reward_model)
    reward_model.model.set_adapter("default")
    assert not torch.equal(first, scores(reward_model))
    comes_back(reward_model, tmp_path / "rm")
    reward_model = adapted(base_path, lora(modules_to_save=None))
    reward_model.model.add_adapter("second", lora(modules_to_save=None))
    reward_model.model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="2 adapters at once|other adapters in some layers"):
        reward_model.save_pretrained(tmp_path / "rm")


def test_a_head_trained_by_hand_beside_an_adapter_without_it_comes_back(base_path, tmp_path):
    reward_model = adapted(base_path, lora(modules_to_save=None))
    moved(reward_model.model, ["score."])
    comes_back(reward_model, tmp_path / "rm")


def test_an_adapter_merged_in_place_is_saved_as_what_it_is(base_path, tmp_path):
    reward_model = adapted(base_path)
    reward_model.model.merge_adapter()
    comes_back(reward_model, tmp_path / "rm", 1e-5)
    assert not (tmp_path / "rm" / BESIDE_FILE).exists()


def test_an_adapter_that_does_not_score_is_not_saved(base_path, tmp_path):
    reward_model = adapted(base_path)
    with reward_model.model.disable_adapter(), pytest.raises(ValueError, match="adapter is disabled"):
        reward_model.save_pretrained(tmp_path / "rm")
    comes_back(reward_model, tmp_path / "rm")


def test_an_adapter_that_adds_tokens_is_refused(base_path, tmp_path):
    model, processor = patched(base_path)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(model, config)
    with pytest.raises(ValueError, match="PROMPT_TUNING puts tokens of its own before the prompt"):
        yojo.RewardModel(model, processor).save_pretrained(tmp_path / "rm")


# ---- generation settings ----


@pytest.mark.parametrize("kind", ["full", "merged"])
def test_generation_settings_that_transformers_calls_invalid_are_kept(base_path, tmp_path, kind):
    settings = {"do_sample": False, "temperature": 0.9, "top_p": 0.6}
    (base_path / "generation_config.json").write_text(json.dumps(settings))
    if kind == "full":
        model, processor = patched(base_path)
        before = model.generation_config
        comes_back(yojo.RewardModel(model, processor), tmp_path / "rm")
        assert model.generation_config is before
    else:
        adapted(base_path).save_pretrained(tmp_path / "adapter")
        merge(tmp_path / "adapter", tmp_path / "rm")
    saved = json.loads((tmp_path / "rm" / "generation_config.json").read_text())
    assert settings.items() <= saved.items()


# ---- resuming ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lora_alpha": 64}, "lora_alpha 8, now 64"),
        ({"use_rslora": True}, "use_rslora False, now True"),
        ({"target_modules": ["q_proj", "k_proj"]}, "target_modules"),
        ({"r": 4}, "r 2, now 4"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
    ],
)
def test_weights_are_not_put_into_an_adapter_of_another_make(base_path, tmp_path, options, message):
    adapted(base_path).save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match=f"saved with another adapter than .*{message}"):
        resume.load_weights(adapted(base_path, lora(**options)).model, tmp_path / "rm")
    resume.load_weights(adapted(base_path, lora(lora_dropout=0.3)).model, tmp_path / "rm")


def test_weights_are_not_put_onto_another_base_model(base_path, tmp_path):
    adapted(base_path).save_pretrained(tmp_path / "rm")
    backbone(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was trained on another base model .*weights differ"):
        resume.load_weights(adapted(tmp_path / "other").model, tmp_path / "rm")


@pytest.mark.parametrize("adapter", [True, False])
def test_unpatched_after_loading_the_base_has_the_row_it_came_with(tmp_path, adapter):
    """The separator took a spare row of the embedding: not the base model's, which an adapter leaves as it is."""
    backbone(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    if adapter:
        made = adapted(tmp_path / "base")
    else:
        made = yojo.RewardModel(*patched(tmp_path / "base"))
    made.save_pretrained(tmp_path / "saved")
    model = yojo.RewardModel.from_pretrained(tmp_path / "saved").model
    base = yojo.unpatch(model.unload() if adapter else model)
    source = tmp_path / ("base" if adapter else "saved")
    stock = transformers.AutoModelForCausalLM.from_pretrained(source)
    assert torch.equal(base.get_input_embeddings().weight, stock.get_input_embeddings().weight)
