"""`RewardModel.score_many` is one row ahead of the device: it waits once a row, and not before the next one was begun."""

import contextlib

import pytest
import torch
from family_cases import patched, samples_of
from pretend import Pretend

import yojo
from yojo import reward_model as reward_models


@pytest.fixture(autouse=True)
def no_inference_mode(monkeypatch):
    """The pretended device's tensors know nothing of it."""
    monkeypatch.setattr(
        torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else contextlib.nullcontext()
    )


@pytest.fixture()
def reward_model():
    model, collator = patched("qwen3_vl", mode="isolated")
    return yojo.RewardModel(model, collator.processor)


def encoded(reward_model, count):
    samples = [sample for name, sample in samples_of("qwen3_vl").items() if "video" not in name]
    return [reward_model.collator.from_processed(*samples[n % len(samples)]) for n in range(count)]


def test_a_row_is_waited_for_behind_the_next(reward_model, monkeypatch):
    expected = [reward_model._score_row([item])[0] for item in encoded(reward_model, 5)]
    with Pretend() as device:
        reward_model.model.to(device.name)
        items, begin, order = encoded(reward_model, 5), reward_model._begin_row, []

        def begun(row, *rest):
            order.append(sum(device.waits.values()))
            result = begin(row, *rest)
            order.append(sum(device.waits.values()))
            return result

        monkeypatch.setattr(reward_model.collator, "encode", lambda example, place, rankings: items[place])
        monkeypatch.setattr(reward_model, "_begin_row", begun)
        device.waits.clear()
        scores = reward_model.score_many(range(5), token_budget=1)
    assert order == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]  # waits before and behind each row's beginning
    assert sum(device.waits.values()) == 5
    assert len(scores) == 5 and all(score.device.type == "cpu" for score in scores)
    for one, other in zip(scores, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=2e-6)


def test_on_a_cpu_a_row_is_done_before_the_next(reward_model, monkeypatch):
    items, order = encoded(reward_model, 3), []
    monkeypatch.setattr(reward_model.collator, "encode", lambda example, place, rankings: order.append(place) or items[place])  # fmt: skip
    monkeypatch.setattr(reward_models, "_named_scores", lambda *some: order.append("done") or [torch.zeros(1)])
    assert len(reward_model.score_many(range(3), token_budget=1)) == 3
    assert order == [0, "done", 1, "done", 2, "done"]


def test_an_example_that_cannot_be_encoded_is_named_while_a_row_is_under_way(reward_model, monkeypatch):
    items = encoded(reward_model, 3)

    def encode(example, place, rankings):
        if place == 2:
            raise ValueError("example 2: it is broken")
        return items[place]

    with Pretend() as device:
        reward_model.model.to(device.name).train()
        monkeypatch.setattr(reward_model.collator, "encode", encode)
        with pytest.raises(ValueError, match="example 2: it is broken"):
            reward_model.score_many(range(3), token_budget=1)
        assert reward_model.model.training and not reward_model.model.yojo.eval_mode.inside
        monkeypatch.setattr(reward_model.collator, "encode", lambda example, place, rankings: items[place])
        assert len(reward_model.score_many(range(2), token_budget=1)) == 2
