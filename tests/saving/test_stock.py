"""Checkpoints of transformers' own Trainer and of `model.save_pretrained`: the head and the settings come back, or an error."""

import functools
import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from saved_cases import backbone, patched, scores, tokenizer

import yojo


@pytest.fixture()
def trained(tmp_path):
    """(reward model, folder that transformers wrote of it)."""
    backbone().save_pretrained(tmp_path / "base")
    model, processor = patched(tmp_path / "base")
    with torch.no_grad():
        model.get_input_embeddings().weight[model.yojo.separator_id] += 0.5  # no mean any more
    model.save_pretrained(tmp_path / "stock")
    processor.save_pretrained(tmp_path / "stock")
    return yojo.RewardModel(model, processor), tmp_path / "stock"


def again(folder, processor=None, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    processor = transformers.AutoTokenizer.from_pretrained(folder) if processor is None else processor
    return yojo.RewardModel(yojo.patch(model.eval(), processor, **options), processor)


@pytest.mark.parametrize("shards", [False, True])
def test_a_stock_checkpoint_comes_back_with_its_head_and_mode(trained, tmp_path, shards):
    reward_model, folder = trained
    if shards:
        folder = tmp_path / "shards"
        reward_model.model.save_pretrained(folder, max_shard_size="4KB")
        reward_model.processor.save_pretrained(folder)
        assert (folder / "model.safetensors.index.json").is_file()
    for loaded in (again(folder), again(folder, mode="isolated"), yojo.RewardModel.from_pretrained(folder)):
        assert loaded.config == reward_model.config
        assert torch.equal(scores(loaded), scores(reward_model))
    loaded.save_pretrained(tmp_path / "ours")
    assert torch.equal(scores(yojo.RewardModel.from_pretrained(tmp_path / "ours")), scores(reward_model))


def test_pickled_weights_have_their_head_too(trained, tmp_path):
    reward_model, folder = trained
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(scores(again(folder)), scores(reward_model))


def test_the_separators_row_is_kept_where_the_tokenizer_must_learn_it_again(trained):
    reward_model, folder = trained
    assert torch.equal(scores(again(folder, tokenizer())), scores(reward_model))
    late = transformers.AutoModelForCausalLM.from_pretrained(folder)
    processor = tokenizer()
    yojo.patch(yojo.patch(late.eval()), processor)
    assert torch.equal(scores(yojo.RewardModel(late, processor)), scores(reward_model))
    other = tokenizer()
    other.add_tokens(["<other>"])
    with pytest.raises(
        ValueError, match="was saved with the separator .* as token 258, in this tokenizer it would be 259"
    ):
        again(folder, other)


def test_a_saved_reward_model_that_is_loaded_as_a_plain_one_has_its_head_too(trained, tmp_path):
    reward_model, _ = trained
    reward_model.save_pretrained(tmp_path / "ours")
    assert torch.equal(scores(again(tmp_path / "ours")), scores(reward_model))


def test_other_options_than_the_checkpoints_are_refused(trained):
    _, folder = trained
    with pytest.raises(ValueError, match="was saved as a reward model with mode='isolated', head_dim=8, and is to be"):
        again(folder, mode="comparative", head_dim=16)


def test_a_head_that_cannot_be_found_is_an_error_that_names_the_way_out(trained, tmp_path):
    reward_model, folder = trained
    config = transformers.AutoConfig.from_pretrained(folder)
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "other", config=config, ignore_mismatched_sizes=True
    )
    with pytest.raises(ValueError, match=f"{tmp_path / 'other'} holds no value head .*del model.config.yojo"):
        yojo.patch(other, tokenizer())
    assert not hasattr(other, "score")
    made = transformers.AutoModelForCausalLM.from_config(config)  # the head would fit, on weights that are random
    with pytest.raises(ValueError, match="holds a value head, but not the weights of this model"):
        yojo.patch(made, tokenizer())
    del made.config.yojo
    yojo.patch(made, tokenizer(), mode="comparative")
    adrift = type(made)(reward_model.model.config.__class__(**{**config.to_dict(), "_name_or_path": ""}))
    with pytest.raises(ValueError, match="it does not know the folder it came from"):
        yojo.patch(adrift, tokenizer())


def test_a_damaged_record_is_an_error(trained):
    _, folder = trained
    config = json.loads((folder / "config.json").read_text())
    for yojo_settings, message in (
        ({"mode": "sideways"}, "config.yojo does not fit this version of YOJO: mode must be"),
        ({**config["yojo"], "head_dim": 9}, "its value head does not fit its config.yojo"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"yojo": yojo_settings}))
        with pytest.raises(ValueError, match=message):
            again(folder)


def test_unpatched_it_is_a_plain_model_again(trained):
    _, folder = trained
    loaded = again(folder)
    yojo.unpatch(loaded.model)
    assert not hasattr(loaded.model.config, "yojo")
    yojo.patch(loaded.model, loaded.processor, mode="comparative")


@pytest.mark.parametrize("load", ["transformers", "peft", "new"])
def test_an_adapter_with_a_head_wants_a_patched_model(tmp_path, load):
    backbone().save_pretrained(tmp_path / "base")
    model, processor = patched(tmp_path / "base")
    settings = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False)
    model = peft.get_peft_model(model, settings).eval()
    model.save_pretrained(tmp_path / "adapter")  # as checkpoints of transformers' Trainer are
    plain = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, tmp_path / "base")
    if load == "transformers":
        late = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    else:
        late = peft.PeftModel.from_pretrained(plain(), tmp_path / "adapter") if load == "peft" else None
        late = late or peft.get_peft_model(plain(), settings)
    with pytest.raises(ValueError, match="adapter 'default' has a value head of its own .*patch the base model first"):
        yojo.patch(late, processor)
    first = yojo.patch(plain().eval(), processor, mode="isolated", head_dim=8)
    loaded = yojo.RewardModel(peft.PeftModel.from_pretrained(first, tmp_path / "adapter").eval(), processor)
    assert torch.equal(scores(loaded), scores(yojo.RewardModel(model, processor)))
    merged = yojo.unpatch(loaded.model.merge_and_unload())
    yojo.patch(merged, processor)  # there is no adapter any more


def test_folders_of_others_are_named(tmp_path):
    (tmp_path / "reward_model_config.json").write_text("{}")
    with pytest.raises(ValueError, match="released code: `yojo import"):
        yojo.RewardModel.from_pretrained(tmp_path)
    (tmp_path / "reward_model_config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="an adapter that PEFT saved.*PeftModel.from_pretrained"):
        yojo.RewardModel.from_pretrained(tmp_path)


def test_weights_of_every_shape_can_be_compared():
    """A buffer that is one number (Gemma 4's clipped layers have some) has no rows; an embedding may have got some more."""
    from yojo.patching import recorded

    number, rows = torch.tensor(1.5), torch.arange(12.0).view(4, 3)
    assert recorded._alike(number, number.clone()) and not recorded._alike(number, number + 1)
    assert recorded._alike(torch.cat([rows, rows[:1]]), rows) and not recorded._alike(rows[:3], rows)
