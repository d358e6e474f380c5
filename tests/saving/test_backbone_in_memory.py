"""A reward model whose backbone is in memory already: patched there, and only if it is the one that was saved."""

import pytest
import saved_cases
import torch
import transformers
from saved_cases import adapted, backbone, scores

import yojo


@pytest.fixture()
def folders(tmp_path):
    """(backbone's folder, reward model's folder, reward model)."""
    base, made = tmp_path / "base", tmp_path / "reward-model"
    backbone().save_pretrained(base)
    reward_model = adapted(base)
    reward_model.save_pretrained(made)
    return base, made, reward_model


def test_it_scores_as_it_did_and_there_is_no_second_one(folders):
    base, made, reward_model = folders
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    loaded = yojo.RewardModel.from_pretrained(made, model=model)
    assert torch.equal(scores(loaded), scores(reward_model))
    assert loaded.model.base_model.model is model


def test_a_full_model(tmp_path):
    backbone().save_pretrained(tmp_path / "base")
    reward_model = yojo.RewardModel(*saved_cases.patched(tmp_path / "base"))
    reward_model.save_pretrained(tmp_path / "made")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made")
    assert torch.equal(scores(yojo.RewardModel.from_pretrained(tmp_path / "made", model=model)), scores(reward_model))


def test_other_weights_another_class_and_options_that_come_too_late(folders):
    base, made, _ = folders
    with pytest.raises(ValueError, match="an adapter trained on other weights"):
        yojo.RewardModel.from_pretrained(made, model=backbone(seed=1))
    with pytest.raises(TypeError, match="model must be a Qwen2ForCausalLM, .* got Qwen2Model"):
        yojo.RewardModel.from_pretrained(made, model=transformers.AutoModel.from_pretrained(base))
    with pytest.raises(ValueError, match="in memory already: dtype cannot be chosen any more"):
        yojo.RewardModel.from_pretrained(made, model=backbone(), dtype="bfloat16")
