"""What is measured of groups of rewards against the truth, and of a whole run: numbers in, numbers out."""

import itertools
import math


def groups(rewards, right):
    """What rewards are worth within groups.

    Args:
        rewards: list of groups, each a list of N floats; None where a response was given none.
        right: list of groups, each a list of N bools, the truth.

    Returns:
        dict:
            accuracy: share of responses that are right.
            spread: mean over groups of the rewards' standard deviation (of N) within the group, in the reward's own unit.
            useless: share of groups whose rewards are all equal, to 1e-6 of their size: GRPO learns nothing from them.
            settled: share of groups whose responses are all right or all wrong: there is nothing to learn, whatever a
                reward may prefer in them.
            pairs: how many pairs of a right and a wrong response of one group there are.
            pairwise: share of those pairs in which the right one has the higher reward; a tie is half a pair. None without
                pairs.
            best: share of the unsettled groups whose highest reward belongs to a right response; those that tie for it
                share. None without such groups.
    """
    spreads, useless, settled, pairs, won, best = [], 0, 0, 0, 0.0, []
    for values, truth in zip(rewards, right, strict=True):
        known = [(value, good) for value, good in zip(values, truth, strict=True) if value is not None]
        values = [value for value, _ in known]
        spreads.append(_deviation(values))
        useless += not values or max(values) - min(values) <= 1e-6 * max(1.0, abs(max(values)), abs(min(values)))
        settled += len(set(truth)) == 1
        good, bad = ([value for value, is_good in known if is_good is wanted] for wanted in (True, False))
        pairs += len(good) * len(bad)
        won += sum((a > b) + 0.5 * (a == b) for a in good for b in bad)
        if good and bad:
            first = [is_good for value, is_good in known if value == max(values)]
            best.append(sum(first) / len(first))
    flat = [good for truth in right for good in truth]
    return {
        "accuracy": sum(flat) / len(flat),
        "spread": sum(spreads) / len(spreads),
        "useless": useless / len(rewards),
        "settled": settled / len(rewards),
        "pairs": pairs,
        "pairwise": won / pairs if pairs else None,
        "best": sum(best) / len(best) if best else None,
    }


def win_rate(ours, theirs):
    """How often one policy's response beats another's to the same prompt; a tie is half a win.

    It is in [0, 1] whatever the scores' unit, and needs no score to mean the same in two groups. A comparative reward model
    fixes its scores up to a constant of each group only, so that their mean over groups says little.

    Args:
        ours, theirs: lists of groups of scores; group n of both was scored together.

    Returns:
        float: the mean over groups of the share of pairs that is won.
    """
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        shares.append(sum((x > y) + 0.5 * (x == y) for x in a for y in b) / (len(a) * len(b)))
    return sum(shares) / len(shares)


def over_optimisation(proxy, truth):
    """How far a policy went on to please its reward while it got worse.

    With proxy P_t and truth A_t at evaluations t = 0 ... T, and t* the first at which A_t is highest:

        fall = max(0, A_t* - A_T) where P_T > P_t*, else 0
        apart = share of the steps t -> t + 1 with P_(t+1) > P_t and A_(t+1) < A_t

    Args:
        proxy, truth: lists of T + 1 floats.

    Returns:
        dict of `fall`, in the unit of the truth, and `apart`, in [0, 1].

    Raises:
        ValueError: lists of different lengths, or of fewer than two evaluations.
    """
    if len(proxy) != len(truth) or len(truth) < 2:
        raise ValueError(f"proxy and truth need the same evaluations, two or more: got {len(proxy)} and {len(truth)}")
    peak = max(range(len(truth)), key=lambda t: (truth[t], -t))
    moves = [(proxy[t + 1] - proxy[t], truth[t + 1] - truth[t]) for t in range(len(truth) - 1)]
    return {
        "fall": max(0.0, truth[peak] - truth[-1]) if proxy[-1] > proxy[peak] else 0.0,
        "apart": sum(up > 0 > down for up, down in moves) / len(moves),
    }


def setback(truth):
    """How unsteady a run was: the mean over its evaluations of how far the truth fell from one to the next, 0 for a rise.

    Args:
        truth: list of floats, two or more.

    Raises:
        ValueError: fewer.
    """
    if len(truth) < 2:
        raise ValueError(f"truth needs two evaluations or more, got {len(truth)}")
    return sum(max(0.0, a - b) for a, b in itertools.pairwise(truth)) / (len(truth) - 1)


def _deviation(values):
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
