"""What a judge is: anything with `score_many(examples) -> list of [N]`; and what it gives, checked."""

import dataclasses
import typing

import numpy as np
import torch


@typing.runtime_checkable
class Judge(typing.Protocol):
    """Anything that scores examples: a `yojo.RewardModel`, a stock classifier, a baseline, an object of yours.

    A judge may also have

    - `fingerprint()`, a dict of all that changes its scores, strings and numbers at any depth, by which scores that are
      kept in files are told from another judge's (`fingerprint_of`);
    - `order_free`, a bool: True where by construction no score depends on the order of the responses (`order_free`);
    - `score_each(examples, errors="raise")`, for judges that have many requests under way at once: it takes an iterable of
      examples, reads it a few ahead, and yields (place, scores) in any order as they come, where the place counts the
      examples from 0 and the scores are an [N] float32 tensor or a `Refusal`. With errors="return" an example that cannot
      be scored yields the TypeError or ValueError that says why instead, and the others go on.
    """

    def score_many(self, examples):
        """Score many examples.

        Args:
            examples: list of `yojo.Example`.

        Returns:
            list with N numbers for each (a tensor, an array, a list), in the order of its responses; higher is better. Or a
            `Refusal` in their place, for an example of which it gave no usable verdict.
        """


@dataclasses.dataclass(frozen=True)
class Refusal:
    """What a judge returns in place of an example's N scores when it gave no usable verdict: it is no score, and no tie.

    Attributes:
        reason: why, in a line.

    Raises:
        TypeError, ValueError: a reason that is no text, or says nothing.
    """

    reason: str

    def __post_init__(self):
        if not isinstance(self.reason, str):
            raise TypeError(f"reason must be a string, got {self.reason!r}")
        if not self.reason.strip():
            raise ValueError("reason is empty: say why there is no verdict")

    def __str__(self):
        return f"the judge gave no verdict: {self.reason}"


def order_free(judge):
    """Whether by construction no score of a judge depends on the order of the responses.

    Args:
        judge: see `Judge`.

    Returns:
        bool: what its `order_free` says; False for a judge that does not say.

    Raises:
        TypeError: it says something that is no bool.
    """
    found = getattr(judge, "order_free", False)
    if not isinstance(found, bool):
        raise TypeError(f"{type(judge).__name__}.order_free must be True or False, a property, got {found!r}")
    return found


def answers_through(judge, method):
    """Whether a judge's scores may be asked of a method of its own in place of its `score_many`.

    Not of one that lies below it: a class that changes the scores of a `yojo.RewardModel` in a `score_many` of its own, or hands
    on to one what it does not have itself, has the inherited `score_encoded`, too, whose scores are not its own.

    Args:
        judge: see `Judge`.
        method: name of the other method, such as "score_each".
    """
    for held in (getattr(judge, "__dict__", {}), *map(vars, type(judge).__mro__)):
        if method in held or "score_many" in held:
            return method in held
    return False


def fingerprint_of(judge):
    """All that changes the scores of a judge, a dict: what its `fingerprint()` says.

    Raises:
        TypeError: a judge that has none, or one that is no dict.
    """
    name = type(judge).__name__
    if not callable(getattr(judge, "fingerprint", None)):
        raise TypeError(
            f"{name} has no fingerprint(): give it such a method, which returns a dict of all that changes its scores (its "
            "name, its weights' hash, its settings), or pass fingerprint={...}, so that its scores are told from another's"
        )
    found = judge.fingerprint()
    if not isinstance(found, dict) or not found:
        raise TypeError(f"{name}.fingerprint() must return a dict of all that changes its scores, got {found!r}")
    return found


def checked_scores(examples, found):
    """What a judge gave, in one form.

    Args:
        examples: list of `yojo.Example`, as the judge got them.
        found: what its `score_many` returned.

    Returns:
        list of [N] float32 tensors on the CPU, which may hold numbers that are not finite; and of the `Refusal`s among them.

    Raises:
        TypeError: something that holds no numbers.
        ValueError: scores for fewer or more examples, or for fewer or more responses of one; the message names it.
    """
    if isinstance(found, (str, bytes, dict)) or not hasattr(found, "__iter__"):
        raise TypeError(f"score_many must return a list with N scores for each example, got {type(found).__name__}")
    found = list(found)
    if len(found) != len(examples):
        raise ValueError(f"the judge gave scores for {len(found)} examples, it was asked for {len(examples)}")
    return [_checked(example, scores) for example, scores in zip(examples, found, strict=True)]


def _checked(example, scores):
    if isinstance(scores, Refusal):
        return scores
    try:
        # Of any other number of responses there is no telling whose score is whose.
        made = _as_tensor(scores).to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{example.name}: the judge's scores are no numbers: {scores!r} ({error})") from error
    count = len(example.responses)
    if made.shape != (count,):
        shape = f"{made.shape[0]} scores" if made.ndim == 1 else f"scores of shape {list(made.shape)}"
        raise ValueError(f"{example.name}: the judge gave {shape} for {count} responses")
    return made


def _as_tensor(scores):
    """Numbers of any kind as a tensor; torch would drop what is imaginary, and takes no array in another order or of objects."""
    if isinstance(scores, np.ndarray):
        if scores.dtype.kind == "O":
            return _as_tensor(scores.tolist())
        if scores.dtype.kind not in "biuf":
            raise TypeError(f"an array of {scores.dtype}")
        scores = np.array(scores, np.float64)
    made = torch.as_tensor(scores).detach()
    if made.is_complex():
        raise TypeError("complex numbers have no order")
    return made
