"""`set_mode`: a patched model in another mode."""

import pytest
import torch

import yojo
from yojo.patching.modes import set_mode


def test_it_scores_as_if_it_had_been_patched_so(make_reward_model, examples, tmp_path):
    saved = make_reward_model(layers=1)
    saved.save_pretrained(tmp_path / "m")
    for options in ({"mode": "isolated"}, {"permutations": 3}, {"mode": "comparative"}, {}):
        expected = make_reward_model(layers=1, **options)
        found = yojo.RewardModel.from_pretrained(tmp_path / "m", **options)
        assert found.config == expected.config
        for one, other in zip(found.score_many(examples), expected.score_many(examples), strict=True):
            assert torch.equal(one, other)
        assert found.fingerprint()["settings"] == expected.fingerprint()["settings"]
    found.save_pretrained(tmp_path / "again")
    set_mode(found.model, permutations=2)
    found.save_pretrained(tmp_path / "other")
    assert yojo.RewardModel.from_pretrained(tmp_path / "again").config.permutations == 1
    assert yojo.RewardModel.from_pretrained(tmp_path / "other").config.permutations == 2


def test_a_mode_that_is_named_begins_with_one_order(make_reward_model):
    model = make_reward_model(layers=1, permutations=4)
    set_mode(model.model, "isolated")
    assert (model.model.yojo.config.mode, model.model.yojo.config.permutations) == ("isolated", 1)


def test_a_reward_model_made_before_keeps_its_mode_and_says_so(make_reward_model, examples):
    before = make_reward_model(layers=1)
    scores, told = before.score_many(examples), before.fingerprint()
    set_mode(before.model, "isolated")
    after = yojo.RewardModel(before.model, before.processor)
    assert all(map(torch.equal, before.score_many(examples), scores)) and before.fingerprint() == told
    assert after.fingerprint()["settings"]["mode"] == "isolated" and not before.order_free and after.order_free


def test_what_does_not_go_together(make_reward_model):
    model = make_reward_model(layers=1, mode="isolated").model
    for options, message in (
        ({"permutations": 2}, "permutations has no meaning in isolated mode"),
        ({"mode": "alone"}, "mode must be one of"),
        ({"permutations": 0}, "permutations must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            set_mode(model, **options)
    released = make_reward_model(layers=1, format="mr2rm", pooling="last").model
    with pytest.raises(ValueError, match="format='mr2rm' is the paper's comparative row"):
        set_mode(released, "isolated")
