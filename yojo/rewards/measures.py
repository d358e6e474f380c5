"""What is worth watching of a call: spread and ties within groups, score against length, what was not judged, cost."""

import math

from yojo.inputs.digests import media_of

EQUAL = 1e-6  # scores that are nearer to each other than this, relative to their size, are a tie


def measures(groups, rewarded):
    """Metrics of some groups.

    Args:
        groups: list of `yojo.rewards.Group`.
        rewarded: list of `yojo.rewards.Rewarded`, one each.

    Returns:
        dict: name -> float; without those that nothing can be said of.
            score: mean of the judge's scores.
            spread: mean over groups of the standard deviation (N) of scores within.
            ties: share of groups whose scores are all equal, to 1e-6 of their size: they teach nothing.
            length_correlation: correlation of score and length in characters, each less its group's mean.
            images: mean number of images and videos that a group shows the judge.
            duplicates: share of completions that repeat one before in their group.
            empty, truncated, forged: share of completions that are; truncated only where it is known.
            not_judged: share of completions that the judge was not shown.
            seconds: that the judge took; tokens: of its packed rows, where it says so; retries: how often it was asked again.
    """
    if not groups:
        return {}
    scores = [[score for score in one.scores if score is not None] for one in rewarded]
    judged = [found for found in scores if found]
    texts = [text for group in groups for text in group.completions]
    known = [flag for group in groups for flag in group.truncated or () if flag is not None]
    found = {
        "images": sum(len(media_of(group.example(["-"]))) for group in groups) / len(groups),
        "duplicates": sum(len(group.completions) - len(set(group.completions)) for group in groups) / len(texts),
        "empty": sum(not text.strip() for text in texts) / len(texts),
        "forged": sum(map(sum, (one.forged for one in rewarded))) / len(texts),
        "not_judged": sum(score is None for one in rewarded for score in one.scores) / len(texts),
        "seconds": rewarded[0].seconds,
        "retries": float(rewarded[0].retries),
    }
    if known:
        found["truncated"] = sum(known) / len(known)
    if judged:
        found["score"] = math.fsum(map(math.fsum, judged)) / sum(map(len, judged))
        found["spread"] = math.fsum(map(_deviation, judged)) / len(judged)
        found["ties"] = sum(map(_tied, judged)) / len(judged)
    tokens = [one.tokens for one in rewarded if one.tokens is not None]
    if tokens:
        found["tokens"] = float(sum(tokens))
    correlation = _length_correlation(groups, rewarded)
    if correlation is not None:
        found["length_correlation"] = correlation
    return found


def _centred(numbers):
    mean = math.fsum(numbers) / len(numbers)
    return [number - mean for number in numbers]


def _deviation(numbers):
    return math.sqrt(math.fsum(number**2 for number in _centred(numbers)) / len(numbers))


def _tied(numbers):
    return max(numbers) - min(numbers) <= EQUAL * max(1.0, max(map(abs, numbers)))


def _length_correlation(groups, rewarded):
    """None where all scores of every group are equal, or all lengths."""
    scores, lengths = [], []
    for group, one in zip(groups, rewarded, strict=True):
        pairs = [(s, len(t)) for s, t in zip(one.scores, group.completions, strict=True) if s is not None]
        if pairs and not _tied([score for score, _ in pairs]):
            scores += _centred([score for score, _ in pairs])
            lengths += _centred([length for _, length in pairs])
    product = math.fsum(s * n for s, n in zip(scores, lengths, strict=True))
    size = math.sqrt(math.fsum(s * s for s in scores) * math.fsum(n * n for n in lengths))
    return product / size if size else None
