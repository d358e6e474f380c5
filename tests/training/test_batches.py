"""Orders, draws, shares and rows of global batches."""

import yojo
from yojo.training.batches import Drawn, GlobalBatches, rows_of, shares


def test_three_of_many_have_two_ranks_wherever_there_are_two():
    ranks = [1, 1, 1, 1, 1, 1, 2]
    example = yojo.Example("q", [f"r{n}" for n in range(7)], rankings=ranks)
    tied = yojo.Example("q", [f"r{n}" for n in range(7)], rankings=[1] * 7)
    drawn = Drawn([example, tied], max_responses=3)
    for epoch in range(50):
        assert sorted(drawn[epoch, 0].example.rankings) == [1, 1, 2]
        assert drawn[epoch, 1].example.rankings == [1, 1, 1] and len(set(drawn[epoch, 1].order)) == 3


def test_an_epoch_has_every_example_once():
    batches = GlobalBatches(list(range(10)), 4, seed=3)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    assert len(batches) == 3 and [len(batch) for batch in first] == [4, 4, 2]
    for epoch, found in enumerate((first, second)):
        keys = [key for batch in found for key in batch]
        assert {key[0] for key in keys} == {epoch} and sorted(key[1] for key in keys) == list(range(10))
    assert [key[1] for batch in first for key in batch] != [key[1] for batch in second for key in batch]
    assert [len(batch) for batch in GlobalBatches(list(range(10)), 4, drop_last=True)] == [4, 4]


def test_shares_and_rows():
    costs = [9.0, 1.0, 1.0, 1.0, 5.0, 4.0, 3.0]
    found = shares(costs, 2)
    assert sorted(place for share in found for place in share) == list(range(7))
    loads = [sum(costs[place] for place in share) for share in found]
    assert max(loads) - min(loads) <= 1.0
    assert shares([1.0, 2.0], 3) == [[1], [0], []]
    rows = rows_of([60, 30, 200, 40, 10], 100)
    assert sorted(place for row in rows for place in row) == list(range(5))
    assert [2] in rows and len(rows) == 3  # what is larger than a row has one to itself
    assert all(sum([60, 30, 200, 40, 10][place] for place in row) <= 100 for row in rows if row != [2])
