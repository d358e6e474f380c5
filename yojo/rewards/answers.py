"""How the samples of a group are answered: each future with a `Reward` of its own, or with an error of its own."""

import dataclasses
import math
import traceback

from yojo.rewards.scorer import RewardError


@dataclasses.dataclass(frozen=True)
class Reward:
    """What one sample gets.

    Attributes:
        reward: float; None where there is none to give, by the treatments of `yojo.rewards.GroupScorer`.
        score: float, what the judge gave; None for a completion that it was not shown.
        place: int, at which place among the responses the judge saw it; None as for score.
        treated: for what it was not judged, "empty", "truncated" or "forged"; or None.
        group_size: completions that were scored together, this one among them.
        missing: samples of the group that never came: above 0 only with `incomplete="score"`.
        seconds: from its arrival to its reward.
    """

    reward: float | None
    score: float | None
    place: int | None
    treated: str | None
    group_size: int
    missing: int
    seconds: float


def checked(batch, rewarded):
    """What `score` gave, if it is one `Rewarded` for each group with a reward for each sample.

    Args:
        batch: list of `yojo.rewards.waiting.Waiting`.
        rewarded: what `score` returned.

    Raises:
        RewardError: it is something else, or a reward is not finite.
    """
    if not isinstance(rewarded, (list, tuple)):
        raise RewardError(f"score must return a list with a Rewarded for each group, got {type(rewarded).__name__}")
    if len(rewarded) != len(batch):
        raise RewardError(f"score gave rewards of {len(rewarded)} groups, it was asked for {len(batch)}")
    for one, found in zip(batch, rewarded, strict=True):
        for name in ("rewards", "scores", "places", "treated"):
            values, count = getattr(found, name), len(one.samples)
            if len(values) != count:
                raise RewardError(f"key {one.key!r}: score gave {len(values)} {name} for {count} samples")
        for reward in found.rewards:
            if reward is not None and not math.isfinite(reward):
                raise RewardError(f"key {one.key!r}: score gave a reward of {reward}")
    return rewarded


def give(waiting, rewarded, now):
    """Give each sample of a `Waiting` its reward of a `Rewarded`, at the time `now`; cancelled ones get none."""
    size, missing = len(waiting.samples), waiting.missing
    found = zip(rewarded.rewards, rewarded.scores, rewarded.places, rewarded.treated, strict=True)
    for sample, values in zip(waiting.samples, found, strict=True):
        if sample.future.set_running_or_notify_cancel():
            sample.future.set_result(Reward(*values, size, missing, now - sample.since))


def let_go(error):
    """What the frames of an exception hold (groups with their images) must not live as long as a future that somebody keeps."""
    seen = set()  # `raise error from error` is its own cause
    while isinstance(error, BaseException) and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def fail(waiting, error):
    """Give each sample of a `Waiting` an error of the same meaning."""
    for sample in waiting.samples:
        if sample.future.set_running_or_notify_cancel():
            sample.future.set_exception(_own(error))


def _own(error):
    """An exception of one future's own: each that raises it writes its own traceback into it."""
    kind = next((kind for kind in (RewardError, TypeError, ValueError) if isinstance(error, kind)), None)
    text = str(error) if kind is not None else f"score raised {type(error).__name__}: {error}"
    made = (kind or RewardError)(text)
    if isinstance(made, RewardError):
        made.kind = getattr(error, "kind", None)
    made.__cause__ = error
    return made
