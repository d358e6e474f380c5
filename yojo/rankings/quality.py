"""How far votes agree with each other and with a ranking: curl, feedback, majorities, annotators."""

import dataclasses

import numpy as np

from yojo.rankings.scores import hodge_rank


@dataclasses.dataclass(frozen=True)
class Majority:
    """What the majorities of pairs say of a ranking.

    Attributes:
        pairs: how many pairs of items have a majority: more votes for one than for the other.
        agree: how many of these the ranking has in that order.
        tied: how many of these the ranking has as equal.
        condorcet: whether the best item has a majority against every other one; None where that cannot be said: several are
            best, or it lost to none and was not compared with all.
    """

    pairs: int
    agree: int
    tied: int
    condorcet: bool | None

    @property
    def share(self):
        """Share of the pairs that the ranking agrees with, float; None without pairs."""
        return self.agree / self.pairs if self.pairs else None


def curl(tally):
    """Share of the mean margins that no scores explain, HodgeRank's residual.

    It is what goes round in circles and what few votes leave to chance: where each pair has one vote, all margins are 1 or -1,
    and much of them is no difference of scores, whoever voted.

    Args:
        tally: `Tally`.

    Returns:
        float: 0 where the margins are differences of scores, 1 where they go round in circles; None where all are 0.
    """
    counts = tally.counts
    margins = np.divide(tally.wins - tally.wins.T, counts, out=np.zeros_like(counts), where=counts > 0)
    scores = np.zeros(len(counts))
    for items in tally.components:
        if len(items) > 1:
            scores[items] = hodge_rank(tally.only(items))
    whole = float((counts * margins**2).sum())
    rest = float((counts * (margins - (scores[:, None] - scores[None, :])) ** 2)[counts > 0].sum())
    return rest / whole if whole > 0 else None


def feedback(tally, ranks):
    """Share of the decided votes that go against a ranking, by weight.

    Args:
        tally: `Tally`.
        ranks: [N] int64, 1 = best.

    Returns:
        float in [0, 1]; None where no vote is decided. Votes between items of the same rank go against nothing.
    """
    decided = tally.decided
    worse = ranks[:, None] > ranks[None, :]
    return float(decided[worse].sum() / decided.sum()) if decided.any() else None


def majority(tally, ranks):
    """`Majority` of a ranking.

    Args:
        tally: `Tally`.
        ranks: [N] int64, 1 = best; of items that no votes connect they are not compared.
    """
    ahead = np.round(tally.decided - tally.decided.T, 9) > 0
    agree, tied = ahead & (ranks[:, None] < ranks[None, :]), ahead & (ranks[:, None] == ranks[None, :])
    best = np.flatnonzero(ranks == 1)
    condorcet = None
    if len(best) == 1 and len(ranks) > 1:
        others = np.arange(len(ranks)) != best[0]
        compared = tally.counts[best[0]] > 0
        if ahead[best[0]][others].all():
            condorcet = True
        elif (~ahead[best[0]] & compared & others).any():
            condorcet = False
    return Majority(int(ahead.sum()), int(agree.sum()), int(tied.sum()), condorcet)


def by_annotator(tally, ranks):
    """What each annotator's votes are and how far the ranking agrees with them.

    Args:
        tally: `Tally`.
        ranks: [N] int64, 1 = best.

    Returns:
        dict: name -> dict of votes, ties and abstentions (how many), and agreement: of the decided votes between items of
        different ranks, the share that the ranking agrees with; None without such votes.
    """
    found = {}
    ahead = ranks[tally.second] - ranks[tally.first]  # above 0 where the ranking has the first item higher
    decided = ~tally.is_tie & ~tally.is_abstention & (ahead != 0)
    agrees = decided & ((ahead > 0) == (tally.share == 1))
    for number, name in enumerate(tally.annotators):
        own = tally.annotator == number
        found[name] = {
            "votes": int(own.sum()),
            "ties": int((own & tally.is_tie).sum()),
            "abstentions": int((own & tally.is_abstention).sum()),
            "agreement": float(agrees[own].sum() / decided[own].sum()) if decided[own].any() else None,
        }
    return found
