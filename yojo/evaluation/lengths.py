"""How far a judge prefers the longer response, and how far it should."""

import dataclasses
import math

import numpy as np

from yojo.evaluation.metrics import kendall_tau


@dataclasses.dataclass(frozen=True)
class LengthBias:
    """How far a judge prefers the longer response, and how far it should.

    Attributes:
        items: number of items looked at.
        left_out: items that were refused or have one response.
        kendall: mean over the items that have one of Kendall's tau-b between score and number of characters.
        pairs: pairs of responses of an item that are ranked differently and differ in length; the shares are over these.
        judge: share of them in which the longer response scores higher, a tie counting half.
        labels: share of them in which the longer response is the better one.
        equal: pairs ranked differently whose responses are of equal length, apart from the rest.
    """

    items: int
    left_out: int
    kendall: float
    pairs: int
    judge: float
    labels: float
    equal: int


def length_bias(items):
    """How far a judge prefers the longer response, by its scores averaged over orders.

    Args:
        items: list of `Judged`.

    Returns:
        LengthBias; NaN where nothing can be computed.
    """
    items = list(items)
    scored = [item for item in items if item.scores is not None and len(item.rankings) > 1]
    taus, judge, labels, pairs, equal = [], 0.0, 0, 0, 0
    for item in scored:
        scores, lengths, ranks = item.mean, np.asarray(item.lengths), np.asarray(item.rankings)
        taus.append(kendall_tau(scores, -lengths))
        decided = ranks[:, None] != ranks
        longer = decided & (lengths[:, None] > lengths)
        pairs += int(longer.sum())
        equal += int((decided & (lengths[:, None] == lengths)).sum()) // 2
        judge += float((longer * (1 + np.sign(scores[:, None] - scores)) / 2).sum())
        labels += int((longer & (ranks[:, None] < ranks)).sum())
    return LengthBias(
        items=len(scored),
        left_out=len(items) - len(scored),
        kendall=_mean(taus),
        pairs=pairs,
        judge=judge / pairs if pairs else math.nan,
        labels=labels / pairs if pairs else math.nan,
        equal=equal,
    )


def _mean(values):
    values = [value for value in values if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan
