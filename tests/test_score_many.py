"""`RewardModel.score_many` and the stream below it: workers, windows, and rows that memory does not suffice for."""

import logging

import pytest
import torch

import yojo


@pytest.fixture(scope="module")
def reward_model(make_reward_model):
    return make_reward_model(layers=2, mode="isolated")


@pytest.fixture()
def many(examples):
    return [yojo.Example(e.prompt, e.responses, images=e.images, id=f"{n}.{e.id}") for n in range(4) for e in examples]


@pytest.mark.parametrize("budget", [60, 8192])
def test_scores_are_the_same_to_the_bit_for_any_number_of_workers(reward_model, many, budget):
    expected = reward_model.score_many(many, token_budget=budget)
    for workers in (1, 2):
        found = reward_model.score_many(iter(many), token_budget=budget, workers=workers)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for example, scores in zip(many, expected, strict=True):
        assert torch.allclose(reward_model.score_many([example])[0], scores, rtol=0, atol=2e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_example_that_a_worker_cannot_encode_is_named(reward_model, many, workers):
    many[7] = yojo.Example("p", ["r"], images=["none.png"], id="the seventh")
    with pytest.raises(ValueError, match="example 'the seventh': image 0: no such file: none.png"):
        reward_model.score_many(many, workers=workers)
    many[7] = "no example"
    with pytest.raises(TypeError, match="got str at place 7"):
        reward_model.score_many(many, workers=workers)


class Short:
    """Memory that suffices for so many tokens."""

    def __init__(self, reward_model, monkeypatch, limit, error):
        self.rows, begin = [], reward_model._begin_row

        def begun(encoded, *rest):
            tokens = sum(item.num_tokens(reward_model.config) for item in encoded)
            if tokens > limit:
                raise error
            self.rows.append(tokens)
            return begin(encoded, *rest)

        monkeypatch.setattr(reward_model, "_begin_row", begun)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "python", "cpu"])
def test_a_row_that_memory_does_not_suffice_for_is_halved(reward_model, many, monkeypatch, caplog, error):
    expected = reward_model.score_many(many)
    sizes = [reward_model.collator.encode(e).num_tokens(reward_model.config) for e in many]
    limit = max(sizes) + 10
    short = Short(reward_model, monkeypatch, limit, error)
    with caplog.at_level(logging.WARNING):
        found = reward_model.score_many(many, token_budget=4 * max(sizes))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=2e-6)
    said = [r.getMessage() for r in caplog.records if "out of memory with" in r.getMessage()]
    assert said and "at most from now on" in said[0] and len(said) <= 4  # and not at every row
    assert max(short.rows) <= limit


def test_an_example_that_does_not_fit_by_itself_is_named(reward_model, many, monkeypatch):
    longest = max(reward_model.collator.encode(e).num_tokens(reward_model.config) for e in many)
    Short(reward_model, monkeypatch, longest - 1, torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"))
    with pytest.raises(
        MemoryError, match=r"^example 'e\d': out of memory with \d+ tokens in a row of its own: CUDA out"
    ):
        reward_model.score_many(
            [yojo.Example(e.prompt, e.responses, images=e.images, id=e.id.split(".")[1]) for e in many]
        )
    encoded = [reward_model.collator.encode(e, rankings=False) for e in many]
    found = sorted(reward_model.score_encoded(encoded, errors="return"), key=lambda one: one.place)
    failed = [one for one in found if one.error is not None]
    assert len(found) == len(many) and 0 < len(failed) < len(many)
    assert all(one.scores is None and one.tokens == longest for one in failed)
    assert all(one.scores.isfinite().all() for one in found if one.error is None)


def test_an_example_that_the_model_refuses_takes_no_other_with_it(reward_model, many, monkeypatch):
    expected, begin = reward_model.score_many(many), reward_model._begin_row

    def begun(encoded, *rest):
        if any(item.name == "example '1.e2'" for item in encoded):
            raise ValueError("example '1.e2': there is no place for its features")
        return begin(encoded, *rest)

    monkeypatch.setattr(reward_model, "_begin_row", begun)
    encoded = [reward_model.collator.encode(e, rankings=False) for e in many]
    found = sorted(reward_model.score_encoded(encoded, errors="return"), key=lambda one: one.place)
    assert [one.place for one in found if one.error is not None] == [7] and "no place" in str(found[7].error)
    for one, other in zip(found, expected, strict=True):
        assert one.error is not None or torch.allclose(one.scores, other, rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="no place for its features"):
        reward_model.score_many(many)


def test_wrong_arguments(reward_model, many):
    with pytest.raises(ValueError, match="token_budget must be at least 1, got 0"):
        reward_model.score_many(many, token_budget=0)
    with pytest.raises(ValueError, match="workers must be 0 or more, got -2"):
        reward_model.score_many(many, workers=-2)
    with pytest.raises(ValueError, match="errors must be 'raise' or 'return', got 'skip'"):
        list(reward_model.score_encoded([], errors="skip"))
    assert reward_model.score_many([]) == []
