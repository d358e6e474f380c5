"""`GroupScorer`: a judge asked for the rewards of whole groups; each call ends with all of them, or with an error."""

import dataclasses
import logging
import math
import numbers
import os
import time

import torch

from yojo.config import YojoConfig
from yojo.judges.judge import Refusal, answers_through, checked_scores
from yojo.rewards.groups import drawn_order
from yojo.rewards.normalize import NORMALIZE, normalized
from yojo.rewards.threads import Late, waited

logger = logging.getLogger(__name__)

TREATMENTS = ("score", "lowest", "none", "raise")
ORDERS = ("drawn", "given")
LONGEST = 1e9  # seconds of a deadline, 31 years: what exchanges between processes add to it must fit into 64 bits of ns
PAUSE = 1.0  # seconds in front of the first retry; twice as many in front of each one after


class RewardError(RuntimeError):
    """There are no rewards: the judge failed, did not answer in time, or gave what is no score. It is never a reward.

    Attributes:
        kind: for programs, why a `GroupCollator` has none for a sample: "late", "crowded" (too many wait), "incomplete", "closed";
            None for all else.
    """

    def __init__(self, *args, kind=None):
        super().__init__(*args)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Rewarded:
    """The rewards of one group.

    Attributes:
        rewards: N floats in the order of the completions; None where there is none to give ("none" as treatment, or
            "lowest" in a group of which nothing was judged).
        scores: N floats, what the judge gave; None for a completion that it was not shown.
        places: N ints, at which place among the responses the judge saw a completion; None as for scores.
        treated: N strings or None: for what a completion was not judged, "empty", "truncated" or "forged".
        forged: N bools: whether a completion holds the text of the judge's separator.
        tokens: tokens that the judge's packed rows took for the group, where it says so (a `yojo.RewardModel`); or None.
        retries: how often the judge was asked again.
        seconds: that the judge took for all groups of the call.
    """

    rewards: list
    scores: list
    places: list
    treated: list
    forged: list
    tokens: int | None = None
    retries: int = 0
    seconds: float = 0.0


class GroupScorer:
    """A judge asked for the rewards of whole groups.

    A group is one example to the judge: its distinct completions in an order that is drawn, packed with other groups into
    rows of a token budget. Equal completions are judged once and share a score.

    Args:
        judge: anything with `score_many(examples)`, see `yojo.judges.Judge`.
        normalize: scale of the rewards within a group, "none", "centre", "standardise", "rank" or "softmax" (see
            `yojo.rewards.normalize.normalized`).
        empty: what becomes of a completion without a character but blanks, which no judge is shown: "lowest", the lowest
            reward of the group's judged ones; "none", None in place of a reward; "raise", an error; or a number, its reward
            before `normalize`.
        truncated: the same for completions that were cut off at the length limit; "score" judges them as they are.
        forged: the same for completions that hold the text of the judge's separator. Judged, it is plain text: no
            response can pass for two, or be read anywhere but at its own end.
        order: "drawn": the responses of a group stand in an order drawn from `seed`, `draw`, the prompt and the texts; of a
            judge in comparative mode each place has its own bias. "given": as they come.
        seed: int, of the orders.
        retries: how often a judge that raises or refuses is asked again; TypeError and ValueError, which say that an input is
            wrong, are raised at once.
        deadline: seconds for one call, retries included; None: no end.
        token_budget: tokens of a packed row, for a judge that packs them (a `yojo.RewardModel`).
        log_text: whether logs hold names of groups and what errors say, which may be text of samples; else errors' types alone.

    Raises:
        TypeError, ValueError: an argument that does not fit the above.
    """

    def __init__(
        self,
        judge,
        *,
        normalize="none",
        empty="lowest",
        truncated="score",
        forged="score",
        order="drawn",
        seed=0,
        retries=2,
        deadline=600.0,
        token_budget=8192,
        log_text=True,
    ):
        if isinstance(judge, type) or not callable(getattr(judge, "score_many", None)):
            raise TypeError(f"judge must have score_many(examples), as a yojo.RewardModel has, got {_instead(judge)}")
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZE)}, got {normalize!r}")
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
        _check_treatment("empty", empty, TREATMENTS[1:])
        _check_treatment("truncated", truncated, TREATMENTS)
        _check_treatment("forged", forged, TREATMENTS)
        check_int("seed", seed)
        check_int("retries", retries, 0)
        check_int("token_budget", token_budget, 1)
        if deadline is not None and (not _is_number(deadline) or not 0 < deadline <= LONGEST):
            raise ValueError(f"deadline must be seconds above 0 and finite, or None for no end, got {deadline!r}")
        self.judge, self.normalize, self.order, self.seed = judge, normalize, order, seed
        self.empty, self.truncated, self.forged = empty, truncated, forged
        self.retries, self.deadline, self.token_budget, self.log_text = retries, deadline, token_budget, log_text
        self._warned = False

    @property
    def separator(self):
        """Text of the judge's separator; of one that has no config, YOJO's own."""
        return getattr(getattr(self.judge, "config", None), "separator", YojoConfig.separator)

    def score(self, groups, draw=None):
        """The rewards of groups.

        Args:
            groups: list of `yojo.rewards.Group`.
            draw: what tells this drawing of orders from others, beside the seed: anything that JSON has.

        Returns:
            list of `Rewarded`, one a group.

        Raises:
            RewardError: the judge failed after all retries, did not answer by the deadline, gave scores that are not finite or
                too few of them; or a completion whose treatment is "raise".
            TypeError, ValueError: a group that cannot be judged; the message names it.
        """
        until = None if self.deadline is None else time.monotonic() + self.deadline
        self._warn_of_templates(groups)
        shown = [_Shown(self, group, draw) for group in groups]
        asked = [one for one in shown if one.responses]
        start = time.monotonic()
        answers, retries = self._ask([one.example() for one in asked], until)
        seconds = time.monotonic() - start
        found = dict(zip(map(id, asked), answers, strict=True))
        return [one.rewarded(*found.get(id(one), ([], None)), retries, seconds) for one in shown]

    def _warn_of_templates(self, groups):
        """Say once that a prompt, a string, looks as if a chat template had made it: the judge puts it into its own."""
        marks = () if self._warned else _template_marks(self.judge)
        for group in groups if marks else ():
            found = [mark for mark in marks if isinstance(group.prompt, str) and mark in group.prompt]
            if found:
                self._warned = True
                logger.warning(
                    "%s: the prompt holds %s: if a chat template has been applied to it, the judge sees it as the text of a user "
                    "turn, within another template, and its scores are not those of the question; hand over chat messages",
                    group.name if self.log_text else "a group",
                    ", ".join(found),
                )
                return

    def _ask(self, examples, until):
        """[(scores of each example's responses, tokens or None)], and how often the judge was asked again."""
        found, left, retries = {}, dict(enumerate(examples)), 0
        while left:
            why, cause = None, None
            try:
                answers, tokens = waited(self._judged, list(left.values()), until=until, device=_device(self.judge))
            except Late:
                raise RewardError(self._late(len(left))) from None
            except (RewardError, TypeError, ValueError):
                raise
            except Exception as error:
                why, cause = f"{type(error).__name__}: {error}", error
            else:
                for place, answer, count in zip(list(left), answers, tokens, strict=True):
                    if isinstance(answer, Refusal):
                        why = f"{left[place].name}: {answer}"
                    else:
                        found[place] = _finite(left.pop(place), answer), count
            if why is None:
                continue
            pause = PAUSE * 2**retries
            if retries == self.retries:
                raise RewardError(f"the judge was asked {retries + 1} times and gave no scores: {why}") from cause
            if until is not None and time.monotonic() + pause >= until:
                raise RewardError(f"{self._late(len(left))}; the last time it failed: {why}") from cause
            said = why if self.log_text else "refused" if cause is None else type(cause).__name__
            logger.warning("no scores, asking the judge again in %g s: %s", pause, said)
            time.sleep(pause)
            retries += 1
        return [found[place] for place in range(len(examples))], retries

    def _judged(self, examples):
        """What the judge says of examples, checked, and tokens of each."""
        if not answers_through(self.judge, "score_encoded"):
            found, tokens = self.judge.score_many(examples), [None] * len(examples)
        else:
            encode = self.judge.collator.encode
            encoded = (encode(example, place, rankings=False) for place, example in enumerate(examples))
            done = {scored.place: scored for scored in self.judge.score_encoded(encoded, self.token_budget)}
            found = [done[place].scores for place in range(len(examples))]
            tokens = [done[place].tokens for place in range(len(examples))]
        try:
            return checked_scores(examples, found), tokens
        except (TypeError, ValueError) as error:
            raise RewardError(str(error)) from error

    def _late(self, count):
        return f"the judge gave no scores of {count} groups within the deadline of {self.deadline:g} s"


class _Shown:
    """What of a group the judge is shown."""

    def __init__(self, scorer, group, draw):
        self.scorer, self.group = scorer, group
        self.forged = [scorer.separator in text for text in group.completions]
        self.treatments = [self._treatment(place) for place in range(len(group.completions))]
        judged = [text for text, (_, how) in zip(group.completions, self.treatments, strict=True) if how == "score"]
        distinct = list(dict.fromkeys(judged))
        if scorer.order == "drawn":
            distinct = [distinct[n] for n in drawn_order(distinct, scorer.seed, draw, group.key)]
        self.responses = distinct

    def example(self):
        return self.group.example(self.responses)

    def _treatment(self, place):
        """(why, what becomes of it) of a completion that is not judged; (None, "score") for one that is."""
        group, scorer = self.group, self.scorer
        for why, applies, how in (
            ("empty", not group.completions[place].strip(), scorer.empty),
            ("truncated", group.truncated is not None and group.truncated[place], scorer.truncated),
            ("forged", self.forged[place], scorer.forged),
        ):
            if applies and how == "raise":
                text = group.completions[place][:80]
                raise RewardError(f"{group.name}: completion {place} is {why}, and {why}='raise': {text!r}")
            if applies and how != "score":
                return why, how
        return None, "score"

    def rewarded(self, answer, tokens, retries, seconds):
        place_of = {text: place for place, text in enumerate(self.responses)}
        scores, places = [], []
        for text, (_, how) in zip(self.group.completions, self.treatments, strict=True):
            place = place_of[text] if how == "score" else None
            places.append(place)
            scores.append(None if place is None else answer[place])
        lowest = min(answer, default=None)
        rewards = [
            {"score": score, "lowest": lowest, "none": None}[how] if isinstance(how, str) else float(how)
            for score, (_, how) in zip(scores, self.treatments, strict=True)
        ]
        return Rewarded(
            rewards=normalized(rewards, self.scorer.normalize),
            scores=scores,
            places=places,
            treated=[why for why, _ in self.treatments],
            forged=self.forged,
            tokens=tokens,
            retries=retries,
            seconds=seconds,
        )


def _device(judge):
    """The CUDA device of a judge's model; None for one that has none there."""
    parameters = getattr(getattr(judge, "model", None), "parameters", None)
    first = next(iter(parameters()), None) if callable(parameters) else None
    return first.device if first is not None and first.device.type == "cuda" else None


def _template_marks(judge):
    """The special tokens of a judge's tokenizer, but for those that people may well write (`<s>`)."""
    processor = getattr(judge, "processor", None)
    found = getattr(getattr(processor, "tokenizer", processor), "all_special_tokens", ())
    return [token for token in found if len(token) > 4]


def _instead(judge):
    """What somebody gave in place of a judge, and what makes one of it."""
    if isinstance(judge, type):
        return f"the class {judge.__name__}; pass an object of it"
    if isinstance(judge, (str, os.PathLike)):
        return f"{os.fspath(judge)!r}; yojo.judges.load_judge({os.fspath(judge)!r}) makes one of a name or a folder"
    if isinstance(judge, torch.nn.Module):
        return f"{type(judge).__name__}; yojo.RewardModel(model, processor) makes one of a patched model"
    return type(judge).__name__


def _finite(example, scores):
    scores = scores.tolist()
    for place, score in enumerate(scores):
        if not math.isfinite(score):
            raise RewardError(f"{example.name}: the judge's score of response {place} is {score}, which is no reward")
    return scores


def _check_treatment(name, value, allowed):
    if isinstance(value, str):
        if value in allowed:
            return
    elif _is_number(value) and math.isfinite(value):
        return
    raise ValueError(f"{name} must be one of {', '.join(allowed)}, or a finite number, got {value!r}")


def check_int(name, value, least=None):
    """Raise a TypeError or a ValueError where an argument is no int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _is_number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
