"""Rewards of a group, put on a scale of their own: centred, standardised, ranked, or as shares of one."""

import math
import statistics

NORMALIZE = ("none", "centre", "standardise", "rank", "softmax")
EPSILON = (
    1e-4  # beside the deviation, as in GRPO: differences that are nothing but rounding must not become whole rewards
)


def normalized(rewards, how):
    """The rewards of one group on another scale; None, which is no reward, stays None and counts for nothing.

    Args:
        rewards: list of N floats, or None.
        how: "none": as they are; "centre": less their mean; "standardise": that, divided by the sample standard deviation
            (N - 1) plus 1e-4, as GRPO does; "rank": the share of the others that each is better than, ties by half, 0 to 1
            (0.5 for one by itself); "softmax": exp(reward) divided by the sum of them, which add up to 1.

    Returns:
        list of N floats, or None.

    Raises:
        ValueError: another `how`.
    """
    if how not in NORMALIZE:
        raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {how!r}")
    known = [reward for reward in rewards if reward is not None]
    if how == "none" or not known:
        return list(rewards)
    made = iter({"centre": _centre, "standardise": _standardise, "rank": _rank, "softmax": _softmax}[how](known))
    return [None if reward is None else next(made) for reward in rewards]


def _centre(rewards):
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def _standardise(rewards):
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    scale = statistics.stdev(rewards) + EPSILON
    return [reward / scale for reward in _centre(rewards)]


def _rank(rewards):
    others = len(rewards) - 1
    if not others:
        return [0.5]
    return [
        (sum(other < reward for other in rewards) + (sum(other == reward for other in rewards) - 1) / 2) / others
        for reward in rewards
    ]


def _softmax(rewards):
    most = max(rewards)
    shares = [math.exp(reward - most) for reward in rewards]
    total = math.fsum(shares)
    return [share / total for share in shares]
