"""What a judge is: anything with `score_many(examples) -> list of [N]`; and what it gives, checked."""

import typing

import numpy as np
import torch


@typing.runtime_checkable
class Judge(typing.Protocol):
    """Anything that scores examples: a `yojo.RewardModel`, a stock classifier, a baseline, an object of yours.

    A judge may also have `fingerprint()`, a dict of all that changes its scores, strings and numbers at any depth, by which
    scores that are kept in files are told from another judge's (`fingerprint_of`).
    """

    def score_many(self, examples):
        """Score many examples.

        Args:
            examples: list of `yojo.Example`.

        Returns:
            list with N numbers for each (a tensor, an array, a list), in the order of its responses; higher is better.
        """


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
        list of [N] float32 tensors on the CPU. They may hold numbers that are not finite.

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
