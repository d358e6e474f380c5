"""What tests of rankings share: random votes, and files of them."""

import itertools
import json

import numpy as np

from yojo.rankings import Vote
from yojo.rankings.votes import Tally


def random_votes(seed, count=5, per_pair=2, coverage=1.0, ties=0.2, annotators=1):
    """Votes on items a, b, c, ...: each pair `per_pair` times, winners by chance; a path connects them whatever happens."""
    rng = np.random.default_rng(seed)
    names = [chr(97 + i) for i in range(count)]
    votes = []
    for i, j in itertools.combinations(range(count), 2):
        if j == i + 1 or rng.random() < coverage:
            for k in range(per_pair):
                winner = "tie" if rng.random() < ties else str(rng.choice(["first", "second"]))
                votes.append(Vote(names[i], names[j], winner, f"who{k % annotators}"))
    return votes


def clear_votes(names, per_pair=1):
    """Votes of which each says that what stands first in `names` is better."""
    return [Vote(a, b, "first") for a, b in itertools.combinations(names, 2) for _ in range(per_pair)]


def flipped(winner):
    return {"first": "second", "second": "first"}.get(winner, winner)


def tally_of(votes, **options):
    """A `Tally` with the place of each name: (tally, dict)."""
    made = Tally.of(votes, **options)
    return made, {name: place for place, name in enumerate(made.items)}


def by_name(method, votes, **options):
    """dict name -> score."""
    tally, place = tally_of(votes)
    scores = method(tally, **options)
    return {name: float(scores[i]) for name, i in sorted(place.items())}


def write_votes(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_of(questions, seed=0, models=6, **options):
    """Records of votes, those of `random_votes` on each of so many questions."""
    return [
        {"question": f"q{q}", "model_a": vote.first, "model_b": vote.second, "winner": f"{_SAYS[vote.winner]}"}
        | ({"judge": vote.annotator} if vote.annotator else {})
        for q in range(questions)
        for vote in random_votes(seed + q, models, **options)
    ]


_SAYS = {"first": "model_a", "second": "model_b", "tie": "tie"}


def response_rows(questions, models=6):
    """Records of responses of models a, b, c, ... to questions q0, q1, ..."""
    return [
        {"question": f"q{q}", "prompt": f"What is {q}?", "model": chr(97 + m), "response": f"{chr(97 + m)} says {q}"}
        for q in range(questions)
        for m in range(models)
    ]
