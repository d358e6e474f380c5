"""What `bench/test_rankings.py` measures: figures stated before are found again, and the stored ones are whole."""

from pathlib import Path

import pytest

from bench import lines
from bench import test_rankings as recovery
from yojo.rankings import METHODS

STORED = Path(__file__).parents[2] / "bench" / "results" / "rankings" / "recovery.jsonl"


@pytest.mark.parametrize("world", recovery.WORLDS, ids=lambda world: world.name)
def test_figures_are_found_again(world):
    for way in ("bradley_terry", "hodge_rank", "borda", "pged"):
        found = recovery.recovery(world, way, 12)
        for value, before in zip(("tau", "best_of_4"), recovery.stated(world, way), strict=True):
            assert abs(found[value] - before) <= recovery.ROUNDING + recovery.ERRORS * found[f"{value}_error"], way


def test_worlds_are_what_they_say():
    world = recovery.World("x", 0.2, 3, 0.5)
    votes = [vote for question in range(20) for vote in recovery.votes(world, recovery.np.random.default_rng(question))]
    assert len(votes) == pytest.approx(20 * 171 * 3 * 0.5, rel=0.05)
    assert sum(vote.winner == "second" for vote in votes) / len(votes) == pytest.approx(0.2, abs=0.03)


def test_stored_figures_are_of_all_ways():
    stored = {(line["world"], line["way"]): line for line in lines.read(STORED)}
    assert set(stored) == {(world.name, way) for world in recovery.WORLDS for way in recovery.WAYS}
    assert {way for _, way in stored} >= set(METHODS)
    for (name, way), line in stored.items():
        world = next(world for world in recovery.WORLDS if world.name == name)
        before = recovery.stated(world, way)
        assert line["stated"] == (None if before is None else list(before))
        assert 0 < line["tau"] < 1 and line["questions"] >= 100 and line["commit"] and line["versions"]["scipy"]
