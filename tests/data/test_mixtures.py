"""Mixtures of data sets, and draws of responses."""

import itertools
import random

import hypothesis
import pyarrow
import pytest
import torch
from data_cases import GOOD, write_lines
from hypothesis import strategies as st
from pyarrow import parquet

import yojo
from yojo import data


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.5, 1, 1.5, 2, 3.7]), min_size=4, max_size=4),
    epochs=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_every_record_is_seen_as_often_as_its_weight_says(sizes, weights, epochs, seed):
    weights = weights[: len(sizes)]
    mixture = data.Mixture([range(100 * s, 100 * s + size) for s, size in enumerate(sizes)], weights)
    seen = [index for epoch in range(epochs) for index in mixture.order(epoch, seed)]
    start = 0
    for size, weight in zip(sizes, weights, strict=True):
        per_epoch = max(1, int(weight * size + 0.5 + 1e-9))
        counts = {seen.count(index) for index in range(start, start + size)}
        # Never is one record seen twice more than another.
        low = epochs * per_epoch // size
        assert counts <= {low, low + 1} and sum(start <= index < start + size for index in seen) == epochs * per_epoch
        start += size
    assert all(len(mixture) == len(mixture.order(epoch, seed)) for epoch in range(epochs))


def test_halves_and_doubles():
    mixture = data.Mixture([[f"a{i}" for i in range(6)], [f"b{i}" for i in range(4)], ["c0"]], [0.5, 1, 2])
    assert len(mixture) == 3 + 4 + 2
    epochs = [[mixture[i] for i in mixture.order(epoch, 0)] for epoch in range(4)]
    halves = [{name for name in epoch if name[0] == "a"} for epoch in epochs]
    assert len(halves[0]) == 3 and halves[0] | halves[1] == {f"a{i}" for i in range(6)} == halves[2] | halves[3]
    assert halves[0] != halves[2]  # the next round is shuffled anew
    assert all(epoch.count("c0") == 2 for epoch in epochs)
    assert mixture.order(1, 0) == mixture.order(1, 0) != mixture.order(1, 1)
    assert sorted(epochs[0], key=lambda name: name[0]) != epochs[0]  # sources are mixed, not one behind the other
    assert mixture.locate(6) == (1, 0) and mixture[10] == "c0"
    with pytest.raises(IndexError, match="record 11 of 11"):
        mixture[11]


def test_the_order_is_the_same_everywhere():
    # Written down once: other processes, machines and Python versions must come to the same.
    mixture = data.Mixture([range(3), range(2)], [1, 2])
    assert [mixture.order(epoch, 7) for epoch in (0, 1)] == [[1, 4, 3, 2, 4, 0, 3], [4, 0, 3, 3, 2, 4, 1]]


@pytest.mark.parametrize(
    "datasets, weights, message",
    [
        ([], None, "no datasets"),
        ([[1], []], None, "dataset 1 of the mixture is empty"),
        ([[1]], [1, 2], "2 weights for 1 datasets"),
        ([[1]], [0], "a weight must be a number above 0, got 0; leave a dataset out"),
        ([[1]], [float("inf")], "a weight must be a number above 0"),
        ([[1]], ["1"], "a weight must be a number above 0, got '1'"),
    ],
)
def test_mixtures_that_make_no_sense(datasets, weights, message):
    with pytest.raises(ValueError, match=message):
        data.Mixture(datasets, weights)


def test_spawned_workers_and_mixtures_of_files(tmp_path):
    paths = [write_lines(tmp_path / "a.jsonl", [GOOD] * 4), tmp_path / "b.parquet"]
    parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 4), paths[1], row_group_size=3)
    mixture = data.Mixture([data.load(path) for path in paths], [1, 0.5])
    mixture[0], mixture[4]  # opens both files before the worker starts
    loader = torch.utils.data.DataLoader(
        mixture, sampler=mixture.order(0, 0), num_workers=1, collate_fn=list, multiprocessing_context="spawn"
    )
    found = [example.id for (example,) in loader]
    assert len(found) == 6 and found == [mixture[i].id for i in mixture.order(0, 0)]
    with pytest.raises(ValueError, match="epoch must be 0 or more"):
        mixture.order(-1, 0)


def choose(example, count, seed):
    return data.take_responses(example, data.draw_responses(example, random.Random(seed), count=count, shuffle=False))


@hypothesis.settings(deadline=None)
@hypothesis.given(
    rankings=st.lists(st.integers(1, 3), min_size=1, max_size=6), seed=st.integers(0, 99), share=st.floats(0, 1)
)
def test_chosen_responses_can_be_compared(rankings, seed, share):
    example = yojo.Example("x", [str(i) for i in range(len(rankings))], rankings=rankings, id="e")
    count = 1 + round(share * (len(rankings) - 1))
    chosen = choose(example, count, seed)
    assert len(chosen.responses) == count and chosen.id == "e" and chosen.responses == sorted(chosen.responses)
    if count > 1 and len(set(rankings)) > 1:
        assert len(set(chosen.rankings)) > 1
    for (a, rank_a), (b, rank_b) in itertools.combinations(zip(chosen.responses, chosen.rankings, strict=True), 2):
        assert (rank_a < rank_b) == (rankings[int(a)] < rankings[int(b)])
    if count < len(rankings):
        assert sorted(set(chosen.rankings)) == list(range(1, len(set(chosen.rankings)) + 1))
    assert chosen == choose(example, count, seed)


def test_every_pair_that_can_be_compared_is_drawn():
    example = yojo.Example("x", ["a", "b", "c"], rankings=[1, 1, 2])
    drawn = {tuple(choose(example, 2, i).responses) for i in range(50)}
    assert drawn == {("a", "c"), ("b", "c")}
    assert len(choose(yojo.Example("x", ["a", "b"]), 1, 0).responses) == 1
    assert choose(example, 4, 0) == example
    with pytest.raises(ValueError, match="example: count must be at least 1, got 0"):
        choose(example, 0, 0)


def test_chosen_targets_sum_to_one():
    example = yojo.Example("x", ["a", "b", "c"], rankings=[0.5, 0.0, 0.5])
    for i in range(20):
        chosen = choose(example, 2, i)
        assert sorted(chosen.rankings) == [0, 1] and "b" in chosen.responses
    assert choose(example, 3, 0).rankings == [0.5, 0.0, 0.5]
    singles = {choose(example, 1, i).rankings[0] for i in range(20)}
    assert singles == {1.0}


def test_shuffled_responses_keep_their_ranks():
    example = yojo.Example("x", list("abcd"), rankings=[1, 2, 3, 4], images=["a.png"])
    orders = set()
    for i in range(20):
        other = data.take_responses(example, data.draw_responses(example, random.Random(i)))
        assert [("abcd".index(text) + 1) for text in other.responses] == other.rankings and other.images == ["a.png"]
        orders.add(tuple(other.responses))
    assert len(orders) > 5
    unranked = yojo.Example("x", ["a", "b"])
    assert sorted(data.take_responses(unranked, data.draw_responses(unranked, random.Random(0))).responses) == [
        "a",
        "b",
    ]
