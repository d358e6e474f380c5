"""How well scores order responses: best-of-N and pairwise accuracy, Kendall's tau, NDCG, spread, accuracy by position."""

import math

import numpy as np


def best_of_n(scores, rankings):
    """Share of the highest scores that belong to a response of the best rank; 0, 1 or, where scores tie, between.

    Args:
        scores: [N] floats, higher is better.
        rankings: [N] numbers, 1 = best.

    Returns:
        float in [0, 1]: what choosing among the highest scores at random is expected to get right.
    """
    scores, rankings = np.asarray(scores, dtype=np.float64), np.asarray(rankings)
    top = scores == scores.max()
    return float((top & (rankings == rankings.min())).sum() / top.sum())


def top1_strict(scores, rankings):
    """Whether every highest score belongs to a response of the best rank: a tie at the top of right and wrong is wrong.

    Args:
        scores: [N] floats, higher is better.
        rankings: [N] numbers, 1 = best.

    Returns:
        float: 0 or 1.
    """
    return float(best_of_n(scores, rankings) == 1)


def is_tied(scores, rankings):
    """Whether the highest score is shared by a response of the best rank and another one: the choice falls by lot.

    Args:
        scores: [N] floats, higher is better.
        rankings: [N] numbers, 1 = best.

    Returns:
        bool.
    """
    return 0 < best_of_n(scores, rankings) < 1


def pairs(scores, rankings):
    """Pairs of responses that are ranked differently.

    Args:
        scores: [N] floats, higher is better.
        rankings: [N] numbers, 1 = best.

    Returns:
        (right, tied, count): floats; of `count` pairs, `right` have the higher score on the better response, and `tied`
        have equal scores.
    """
    scores, rankings = np.asarray(scores, dtype=np.float64), np.asarray(rankings)
    better = rankings[:, None] < rankings[None, :]
    difference = scores[:, None] - scores[None, :]
    return float((better & (difference > 0)).sum()), float((better & (difference == 0)).sum()), float(better.sum())


def kendall_tau(scores, rankings):
    """Kendall's tau-b of scores against ranks.

    Args:
        scores: [N] floats, higher is better.
        rankings: [N] numbers, 1 = best.

    Returns:
        float: 1 for the same order, -1 for the reverse; NaN where either is all tied.
    """
    scores, rankings = np.asarray(scores, dtype=np.float64), np.asarray(rankings, dtype=np.float64)
    above = np.triu_indices(len(scores), 1)
    by_score = np.sign(scores[:, None] - scores[None, :])[above]
    by_rank = np.sign(rankings[None, :] - rankings[:, None])[above]
    norm = math.sqrt((by_score != 0).sum() * (by_rank != 0).sum())
    return float((by_score * by_rank).sum() / norm) if norm else float("nan")


def ndcg(scores, rankings):
    """Normalised discounted cumulative gain of the order that scores give.

    A response gains 2^w - 1, w being how many different ranks are worse than its own, and counts 1 / log2(1 + place) at its
    place, from 1; responses with equal scores share what their places count. The sum is divided by its largest value.

    Args:
        scores: [N] floats, higher is better.
        rankings: [N] numbers, 1 = best.

    Returns:
        float in (0, 1]: 1 for the order of the ranks; NaN where all ranks tie.
    """
    scores = np.asarray(scores, dtype=np.float64)
    _, level = np.unique(-np.asarray(rankings), return_inverse=True)  # 0 for the worst rank
    gain = 2.0**level - 1
    discount = 1 / np.log2(np.arange(len(scores)) + 2)
    _, tied, sizes = np.unique(-scores, return_inverse=True, return_counts=True)
    shared = np.bincount(np.repeat(np.arange(len(sizes)), sizes), weights=discount) / sizes
    best = (np.sort(gain)[::-1] * discount).sum()
    return float((gain * shared[tied]).sum() / best) if best else float("nan")


def ranking_metrics(samples):
    """Metrics of many samples.

    Args:
        samples: list of (scores, rankings) of one sample each, N >= 1 responses in the order they stood in the row.

    Returns:
        dict of floats; nothing that cannot be computed is in it.

        best_of_n: mean of `best_of_n` over samples whose responses are not all tied.
        pairwise: share of right pairs over all pairs ranked differently, equal scores counting half.
        kendall_tau: mean over the samples that have one.
        score_mean: of all scores.
        score_spread: mean over samples of the standard deviation of a sample's scores.
        best_at_1, best_at_2, ...: `best_of_n` over the samples whose only best response stood at that place of the row.
    """
    ranked = [(scores, ranks) for scores, ranks in samples if len(set(map(float, ranks))) > 1]
    metrics = {}
    if ranked:
        metrics["best_of_n"] = float(np.mean([best_of_n(*sample) for sample in ranked]))
        right, tied, count = np.sum([pairs(*sample) for sample in ranked], axis=0)
        metrics["pairwise"] = float((right + tied / 2) / count)
        taus = [tau for tau in (kendall_tau(*sample) for sample in ranked) if not math.isnan(tau)]
        if taus:
            metrics["kendall_tau"] = float(np.mean(taus))
    if samples:
        metrics["score_mean"] = float(np.mean(np.concatenate([np.asarray(s, dtype=np.float64) for s, _ in samples])))
        spread = [np.std(np.asarray(s, dtype=np.float64)) for s, _ in samples if len(s) > 1]
        if spread:
            metrics["score_spread"] = float(np.mean(spread))
    by_place = {}
    for scores, ranks in ranked:
        best = [place for place, rank in enumerate(ranks) if rank == min(ranks)]
        if len(best) == 1:
            by_place.setdefault(best[0] + 1, []).append(best_of_n(scores, ranks))
    metrics.update({f"best_at_{place}": float(np.mean(by_place[place])) for place in sorted(by_place)})
    return metrics
