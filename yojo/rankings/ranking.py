"""`aggregate`: the votes of one question -> `Ranking`, with how sure it is."""

import dataclasses

import numpy as np

from yojo.rankings import quality
from yojo.rankings.scores import check_count, method_of, ranks_of
from yojo.rankings.votes import TIES, Tally

DRAWS = 200
SLOW, DRAWS_OF_SLOW = ("elo", "kemeny"), 20  # many orders, an integer program, in each draw
DIGITS = 9  # of scores in files: what is beyond them is what an iteration leaves open
DISCONNECTED = ("refuse", "mark")


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
    """Items of one question, ranked.

    Attributes:
        items: N names, sorted.
        scores: [N] float64, higher is better; of another scale for each method.
        ranks: [N] int64, dense (1, 2, 2, 3), 1 = best. Where the votes leave the items in several components, each has
            ranks of its own, from 1: nothing says how those of two components stand.
        components: tuple of tuples of names, the connected parts of the graph of comparisons, largest first; one where
            there is a ranking of all items.
        method, options: what made it, and with which options (a dict).
        seed: of all draws.
        votes, ties, abstentions: how many votes there are, and how many of them are ties and abstentions.
        curl: share of the margins that no scores explain (`quality.curl`), or None.
        feedback: share of the decided votes that go against the ranking (`quality.feedback`), or None.
        majority: `quality.Majority`.
        annotators: dict, name -> what `quality.by_annotator` says.
        draws: [B, N] int64: places of the items, 1 + how many are better, when the votes are drawn again with replacement;
            0 in a draw that leaves the items of the component unconnected.
    """

    items: tuple
    scores: np.ndarray
    ranks: np.ndarray
    components: tuple
    method: str
    options: dict
    seed: int
    votes: int
    ties: int
    abstentions: int
    curl: float | None
    feedback: float | None
    majority: quality.Majority
    annotators: dict
    draws: np.ndarray

    @property
    def connected(self):
        """Whether the votes connect all items, so that there is one ranking of them."""
        return len(self.components) == 1

    @property
    def best(self):
        """Tuple of the names of rank 1; None where there is not one ranking of all items."""
        return tuple(self.items[i] for i in np.flatnonzero(self.ranks == 1)) if self.connected else None

    @property
    def stability(self):
        """Share of the draws in which an item keeps its place, [N] float64; NaN without draws."""
        if not len(self.draws):
            return np.full(len(self.items), np.nan)
        return (self.draws == self._places()).mean(axis=0)

    @property
    def best_stability(self):
        """Share of the draws in which the best items are the same; None without draws or without one ranking."""
        if not len(self.draws) or not self.connected:
            return None
        return float(((self.draws == 1) == (self.ranks == 1)).all(axis=1).mean())

    @property
    def unconnected_draws(self):
        """How many draws leave some component unconnected."""
        return int((self.draws == 0).any(axis=1).sum())

    def label_stability(self, items):
        """How sure it is that the best of some items is the best of them.

        Args:
            items: their numbers, in any order; one of them has a better rank than all others.

        Returns:
            float: share of the draws in which that one is better than all others; None without draws or without one
            ranking.
        """
        if not len(self.draws) or not self.connected:
            return None
        items = np.asarray(items)
        items = items[np.argsort(self.ranks[items], kind="stable")]
        drawn = self.draws[:, items]
        return float((drawn[:, :1] < drawn[:, 1:]).all(axis=1).mean())

    def to_dict(self):
        """All of it but the draws, as JSON takes it; items from the best, by name where they tie."""
        parts = []
        number = {name: place for place, name in enumerate(self.items)}
        for component in self.components:
            own = sorted((number[name] for name in component), key=lambda i: (self.ranks[i], self.items[i]))
            part = {
                "items": [self.items[i] for i in own],
                "ranks": self.ranks[own].tolist(),
                "scores": (np.round(self.scores[own], DIGITS) + 0.0).tolist(),  # no -0.0
            }
            if len(self.draws):
                part["stability"] = self.stability[own].tolist()
            parts.append(part)
        whole = parts[0] if self.connected else {"items": None, "ranks": None, "scores": None}
        return {
            "connected": self.connected,
            **whole,
            "components": parts if not self.connected else None,
            "votes": self.votes,
            "ties": self.ties,
            "abstentions": self.abstentions,
            "curl": self.curl,
            "feedback": self.feedback,
            "majority": dataclasses.asdict(self.majority),
            "best_stability": self.best_stability,
            "draws": len(self.draws),
            "unconnected_draws": self.unconnected_draws,
            "annotators": self.annotators,
            "method": self.method,
            "options": self.options,
            "seed": self.seed,
        }

    def _places(self):
        """[N] int64: 1 + how many items of the component are better."""
        places = np.empty(len(self.items), dtype=np.int64)
        for component in self.components:
            own = np.flatnonzero(np.isin(self.items, component))
            places[own] = _places(self.ranks[own])
        return places


def aggregate(votes, method="bradley_terry", *, ties="half", disconnected="refuse", draws=None, seed=0, **options):
    """Rank the items of one question by its votes.

    The order of the votes and the names of the items decide nothing: items that the votes do not tell apart tie.

    Args:
        votes: sequence of `Vote`.
        method: a key of `yojo.rankings.METHODS`.
        ties: "half", a tie is half a vote for either item; "drop", it says nothing.
        disconnected: what to do where no votes lead from some items to others, which then have no common ranking: "refuse",
            or "mark", a ranking of each component.
        draws: how often the votes are drawn again, with replacement, to see how stable the ranking is; 200 by default, 20
            with elo and kemeny. A draw that leaves the items unconnected ranks none: nothing is kept in it.
        seed: of the draws.
        **options: of the method: prior (bradley_terry, plackett_luce, rank_centrality), step and orders (elo),
            denoise_ensemble (pged).

    Returns:
        `Ranking`.

    Raises:
        TypeError, ValueError: a bad argument; votes that connect not all items, unless disconnected="mark".

    Example:
        >>> votes = [yojo.rankings.Vote("a", "b", "first"), yojo.rankings.Vote("c", "b", "second")]
        >>> dict(zip((ranking := yojo.rankings.aggregate(votes)).items, ranking.ranks.tolist()))
        {'a': 1, 'b': 2, 'c': 3}
    """
    run, options, draws = settings(method, options, ties, draws, seed)
    if disconnected not in DISCONNECTED:
        raise ValueError(f"disconnected must be one of {', '.join(DISCONNECTED)}, got {disconnected!r}")
    tally = Tally.of(votes, ties)
    parts = tally.components
    if len(parts) > 1 and disconnected == "refuse":
        raise ValueError(
            f"votes connect {len(tally.items)} items into {len(parts)} components ({_names(tally, parts)}), and nothing says "
            "how one stands to another: there is no ranking of all; disconnected='mark' ranks each by itself"
        )
    given = options | ({"seed": seed} if method == "elo" else {})
    scores, ranks = np.zeros(len(tally.items)), np.ones(len(tally.items), dtype=np.int64)
    for items in parts:
        if len(items) > 1:
            scores[items] = run(tally.only(items), **given)
            ranks[items] = ranks_of(scores[items])
    drawn = _drawn(tally, parts, run, given, draws, seed)
    order = np.argsort(np.array(tally.items))  # from here on as names are sorted
    return Ranking(
        items=tuple(tally.items[i] for i in order),
        scores=scores[order],
        ranks=ranks[order],
        components=tuple(sorted((_sorted_names(tally, part) for part in parts), key=lambda part: (-len(part), part))),
        method=method,
        options=options | {"ties": ties},
        seed=seed,
        votes=len(tally.first),
        ties=int(tally.is_tie.sum()),
        abstentions=int(tally.is_abstention.sum()),
        curl=quality.curl(tally),
        feedback=quality.feedback(tally, ranks),
        majority=quality.majority(tally, ranks),
        annotators=quality.by_annotator(tally, ranks),
        draws=drawn[:, order],
    )


def settings(method, options, ties, draws, seed):
    """(function, dict of all its options, number of draws) of what `aggregate` is given, or what is wrong with it."""
    run, options = method_of(method, options)
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
    draws = (DRAWS_OF_SLOW if method in SLOW else DRAWS) if draws is None else draws
    check_count("draws", draws, least=0)
    check_count("seed", seed, least=0)
    return run, options, draws


def _drawn(tally, parts, run, options, draws, seed):
    rng = np.random.default_rng(seed)
    found = np.zeros((draws, len(tally.items)), dtype=np.int64)
    for row in found:
        again = tally.take(np.sort(rng.integers(len(tally.first), size=len(tally.first))))
        connected = {tuple(part) for part in again.components}
        for items in parts:
            if tuple(items) in connected:
                scores = run(again.only(items), **options) if len(items) > 1 else np.zeros(1)
                row[items] = _places(ranks_of(scores))
    return found


def _places(ranks):
    return 1 + (ranks[None, :] < ranks[:, None]).sum(axis=1)


def _sorted_names(tally, part):
    return tuple(sorted(tally.items[i] for i in part))


def _names(tally, parts, most=60):
    text = " | ".join(", ".join(_sorted_names(tally, part)) for part in parts)
    return text if len(text) <= most else text[: most - 3] + "..."
