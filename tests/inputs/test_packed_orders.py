"""Responses in several orders behind one prompt: `RewardModel.score_orders` and what it is made of."""

import itertools

import pytest
import torch

import yojo
from yojo.inputs.orders import checked_orders, ordered, put_back

KINDS = {
    "comparative": {"mode": "comparative"},
    "permuted": {"mode": "comparative", "permutations": 2},
    "isolated": {"mode": "isolated"},
    "mean": {"mode": "comparative", "pooling": "response_mean"},
    "released": {"mode": "comparative", "format": "mr2rm", "pooling": "last"},
}


@pytest.fixture(scope="module", params=KINDS)
def reward_model(request, make_reward_model):
    return make_reward_model(layers=2, **KINDS[request.param])


def test_every_order_scores_as_a_pass_of_its_own(reward_model, examples):
    for example in examples:
        orders = list(itertools.permutations(range(len(example.responses))))[:7]
        found = reward_model.score_orders(example, orders)
        assert found.shape == (len(orders), len(example.responses)) and found.dtype == torch.float32
        for row, order in zip(found, orders, strict=True):
            alone = reward_model.score_many([ordered(example, order)])[0]
            assert torch.allclose(row[list(order)], alone, rtol=0, atol=2e-6)
    differ = (found - found.mean(0)).abs().max() > 1e-4
    config = reward_model.config
    assert bool(differ) == (
        config.mode == "comparative" and config.permutations == 1
    )  # of two responses, 2 are all orders


def test_the_prompt_is_paid_once(make_reward_model, examples):
    reward_model = make_reward_model(layers=1)
    (encoded,) = reward_model.encode_orders(examples[0], [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)])
    single = reward_model.collator.encode(examples[0])
    responses = sum(map(len, single.responses))
    assert encoded.num_tokens(reward_model.config) == len(single.prompt_ids) + 3 * responses
    assert len(reward_model.collator.pack([encoded])["input_ids"][0]) == encoded.num_tokens(reward_model.config)
    assert encoded.rankings is None and encoded.orders == 3


def test_orders_that_are_none(make_reward_model, examples):
    reward_model = make_reward_model(layers=1)
    for orders in ([], [(0, 1)], [(0, 1, 2, 2)], [(1, 2, 3, 4)]):
        with pytest.raises(ValueError, match=r"orders must be at least one order of the responses 0\.\.3"):
            reward_model.score_orders(examples[0], orders)
        with pytest.raises(ValueError, match="orders"):
            reward_model.collator.encode(examples[0]).in_orders(orders, reward_model.config)
    with pytest.raises(TypeError, match="orders must be a list of tuples"):
        checked_orders([0, 1], 2)
    with pytest.raises(TypeError, match="orders must be a list of tuples"):
        checked_orders([(0.0, 1.0)], 2)


def test_a_response_that_overflows_is_named_by_its_number(make_reward_model, examples, caplog):
    reward_model = make_reward_model(layers=1)
    with torch.no_grad():
        reward_model.model.score.bias2.fill_(float("nan"))
    reward_model.score_orders(examples[2], [(0, 1, 2), (2, 1, 0)])
    assert "example 'e2': the scores of responses 0, 1, 2 are not finite" in caplog.text


def test_scores_find_their_places():
    example = yojo.Example("p", ["a", "b", "c"], rankings=[1, 2, 3])
    turned = ordered(example, (2, 0, 1))
    assert turned.responses == ["c", "a", "b"] and turned.rankings == [3, 1, 2]
    found = put_back([torch.tensor([0.0, 1, 2]), torch.tensor([30.0, 10, 20])], [(0, 1, 2), (2, 0, 1)])
    assert found.tolist() == [[0, 1, 2], [10, 20, 30]]
