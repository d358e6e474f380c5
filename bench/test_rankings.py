"""How well each method finds a ranking again that simulated votes are drawn from, beside figures that were stated before.

19 items, 171 pairs. Two worlds: in one, the better item wins the more surely the further apart the two are (Bradley-Terry
with normal log strengths; their spread is not stated with those figures, and 0.87 fits them within 0.03); in the other, each
vote is turned round with one probability, whatever the gap. Measured are Kendall's tau to the truth, and how often the best
of 4 items is the true one; of both, what is expected when items that tie are put in an order at random.

Everything is computed on one core. Result lines go into the folder `rankings` of --results, since they are no times of passes.
"""

import dataclasses
import functools
import importlib.metadata
import statistics
import time

import numpy as np
import pytest
import torch

from bench import conftest, lines
from yojo.evaluation.metrics import best_of_n, pairs
from yojo.rankings import METHODS, Vote
from yojo.rankings.scores import ranks_of
from yojo.rankings.votes import Tally

SPREAD = 0.87  # standard deviation of log strengths
ITEMS, OF_FOUR = 19, 100  # sets of four items that are looked at, of a question
QUESTIONS = {"quick": 10, "usual": 100, "full": 400}


@dataclasses.dataclass(frozen=True)
class World:
    """Where votes are from.

    Attributes:
        name: of it.
        flipped: with what probability a vote is turned round; None for Bradley-Terry.
        votes: of a pair, each by an annotator of its own.
        coverage: share of the pairs that have votes.
    """

    name: str
    flipped: float | None
    votes: int
    coverage: float


WORLDS = (
    World("bt-dense", None, 3, 1.0),
    World("bt-sparse", None, 3, 0.3),
    World("flip20-dense", 0.2, 3, 1.0),
    World("flip35-sparse", 0.35, 3, 0.3),
)
WAYS = {name: (name, {}) for name in METHODS} | {"pged, once": ("pged", {"denoise_ensemble": False})}
# World -> of Bradley-Terry and HodgeRank, Borda, Kemeny (which was a local search), PGED: (tau, best of 4), as stated before.
STATED = {
    "bt-dense": ((0.80, 0.83), (0.80, 0.82), (0.72, 0.76), (0.74, 0.80)),
    "bt-sparse": ((0.61, 0.66), (0.59, 0.65), (0.57, 0.62), (0.51, 0.60)),
    "flip20-dense": ((0.86, 0.87), (0.86, 0.86), (0.94, 0.94), (0.85, 0.84)),
    "flip35-sparse": ((0.40, 0.49), (0.42, 0.50), (0.38, 0.48), (0.34, 0.48)),
}
COLUMN = {"bradley_terry": 0, "hodge_rank": 0, "borda": 1, "kemeny": 2, "pged": 3}
ROUNDING, ERRORS = 0.02, 4  # of what was stated, by how many standard errors of what is measured it may be off


@functools.lru_cache(maxsize=1)
def questions(world, count):
    """list of (`Tally`, [N] true ranks of its items): questions whose votes connect all items."""
    rng = np.random.default_rng(1)
    made = []
    while len(made) < count:
        tally = Tally.of(votes(world, rng))
        if len(tally.components) == 1 and len(tally.items) == ITEMS:
            made.append((tally, np.array([int(name[1:]) + 1 for name in tally.items])))
    return made


def votes(world, rng):
    """The votes of one question on m00, the best, to m18."""
    strengths = np.sort(SPREAD * rng.normal(size=ITEMS))[::-1]
    made = []
    for i in range(ITEMS):
        for j in range(i + 1, ITEMS):
            if rng.random() >= world.coverage:
                continue
            wins = 1 / (1 + np.exp(strengths[j] - strengths[i])) if world.flipped is None else 1 - world.flipped
            for k in range(world.votes):
                made.append(
                    Vote(f"m{i:02}", f"m{j:02}", "first" if rng.random() < wins else "second", f"annotator {k}")
                )
    return made


def recovery(world, way, count):
    """How well a way finds the truth again: dict of figures, of so many questions."""
    method, options = WAYS[way]
    taus, bests, seconds = [], [], []
    for number, (tally, truth) in enumerate(questions(world, count)):
        start = time.perf_counter()
        scores = METHODS[method](tally, **options)
        seconds.append(time.perf_counter() - start)
        ranked = -ranks_of(scores)
        right, tied, count_of_pairs = pairs(ranked, truth)
        taus.append((2 * right + tied) / count_of_pairs - 1)
        rng = np.random.default_rng(number)
        fours = [rng.choice(ITEMS, 4, replace=False) for _ in range(OF_FOUR)]
        bests.append(statistics.mean(best_of_n(ranked[four], truth[four]) for four in fours))
    error = lambda values: statistics.stdev(values) / len(values) ** 0.5  # noqa: E731
    return {
        "tau": statistics.mean(taus),
        "tau_error": error(taus),
        "best_of_4": statistics.mean(bests),
        "best_of_4_error": error(bests),
        "seconds": statistics.median(seconds),
        "questions": count,
    }


def stated(world, way):
    """(tau, best of 4) as stated before, or None."""
    return STATED[world.name][COLUMN[way]] if way in COLUMN else None


@pytest.fixture(scope="module")
def found(request):
    """Result lines, each appended to the file of results and shown at the end beside what was stated."""
    made = []
    yield made
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n\nKendall's tau / best of 4, and (as stated before); milliseconds a question")
        for line in made:
            before = "" if line["stated"] is None else "({:.2f} / {:.2f})".format(*line["stated"])
            print(
                f"{line['world']:<14} {line['way']:<16} {line['tau']:.3f} / {line['best_of_4']:.3f}  {before:<15}"
                f"{line['seconds'] * 1e3:8.1f} ms"
            )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_recovery(benchmark, request, found, world, way):
    option = request.config.getoption
    if option("--device") == "cuda":
        pytest.skip("rankings are computed on a CPU: --device cpu")
    count = QUESTIONS["quick" if option("--quick") else "full" if option("--full") else "usual"]
    questions(world, count)
    benchmark.group = "rankings"
    measured = benchmark.pedantic(recovery, args=(world, way, count), rounds=1)
    line = {"world": world.name, **dataclasses.asdict(world), "items": ITEMS, "way": way, "options": WAYS[way][1]}
    line |= measured | {"stated": stated(world, way)} | provenance(request)
    found.append({name: value for name, value in line.items() if name != "name"})
    if option("--results") is not None:
        folder = request.config.invocation_params.dir / option("--results") / "rankings"
        folder.mkdir(parents=True, exist_ok=True)
        lines.append(folder / "recovery.jsonl", found[-1])
    for value, before in zip(("tau", "best_of_4"), stated(world, way) or (), strict=False):
        off = measured[value] - before
        if way == "kemeny":  # exact here: it may be better than a local search, never worse
            off = min(off, 0)
        assert abs(off) <= ROUNDING + ERRORS * measured[f"{value}_error"], (
            f"{value} {measured[value]:.3f}, stated {before}"
        )


def provenance(request):
    """Commit, date, processor and versions."""
    place = conftest.provenance(torch.device("cpu"), request.config.getoption("--commit"))
    versions = {name: importlib.metadata.version(name) for name in ("choix", "numpy", "scipy")}
    return {name: place[name] for name in ("cpu", "commit", "date")} | {"versions": versions}
