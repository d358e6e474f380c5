"""Judges that look at nothing a judge should look at: length, place, chance. Whoever is not better than these judges nothing."""

import dataclasses
import hashlib

import torch

from yojo.inputs.digests import example_key

UNITS = ("characters", "words")


@dataclasses.dataclass(frozen=True)
class Length:
    """The longer response is better.

    Attributes:
        unit: "characters", or "words", what stands between blanks.
        shortest: the shorter one is better.

    Raises:
        ValueError: another unit.

    Example:
        >>> yojo.judges.Length("words").score_many([yojo.Example("How many?", ["Two.", "I see two."])])
        [tensor([1., 3.])]
    """

    unit: str = "characters"
    shortest: bool = False

    @property
    def order_free(self):
        """True: a response is measured by itself."""
        return True

    def __post_init__(self):
        if self.unit not in UNITS:
            raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {self.unit!r}")
        _check_bool("shortest", self.shortest)

    def score_many(self, examples):
        """list of [N] float32, the lengths of each example's responses; below zero where the shortest is best."""
        sign = -1 if self.shortest else 1
        return [_float32(sign * self._length(text) for text in example.responses) for example in examples]

    def _length(self, text):
        return len(text) if self.unit == "characters" else len(text.split())

    def fingerprint(self):
        """All that changes a score, a dict."""
        return {"judge": "Length", "unit": self.unit, "shortest": self.shortest}


@dataclasses.dataclass(frozen=True)
class Place:
    """The response that stands first is best, the next one second, ...

    Attributes:
        last: the one that stands last is best.
    """

    last: bool = False

    @property
    def order_free(self):
        """False: the order is all there is."""
        return False

    def __post_init__(self):
        _check_bool("last", self.last)

    def score_many(self, examples):
        """list of [N] float32: 0, -1, -2, ... for each example; 0, 1, 2, ... where the last is best."""
        sign = 1 if self.last else -1
        return [_float32(sign * place for place in range(len(example.responses))) for example in examples]

    def fingerprint(self):
        """All that changes a score, a dict."""
        return {"judge": "Place", "last": self.last}


@dataclasses.dataclass(frozen=True)
class Random:
    """Chance: a number between 0 and 1 that depends on the seed, the prompt, the response and its place, and on nothing else.

    So it is the same in every process, in any order and any company, and another for the same response in another place.

    Attributes:
        seed: int.
    """

    seed: int = 0

    @property
    def order_free(self):
        """False: the number of a response depends on its place."""
        return False

    def __post_init__(self):
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise TypeError(f"seed must be an int, got {self.seed!r}")

    def score_many(self, examples):
        """list of [N] float32, uniform in [0, 1).

        Raises:
            ValueError: an image or a video that cannot be read, whose content is part of the prompt.
        """
        return [self._scores(example) for example in examples]

    def _scores(self, example):
        try:
            prompt = example_key(dataclasses.replace(example, responses=["-"], rankings=None))
        except OSError as error:
            raise ValueError(f"{example.name}: {error}") from error
        return _float32(self._number(prompt, place, text) for place, text in enumerate(example.responses))

    def _number(self, prompt, place, text):
        found = hashlib.blake2b(f"{self.seed} {prompt} {place} {text}".encode(), digest_size=8)
        return (int.from_bytes(found.digest(), "big") >> 40) / 2**24  # 24 bits, as many as float32 has

    def fingerprint(self):
        """All that changes a score, a dict."""
        return {"judge": "Random", "seed": self.seed}


def _check_bool(name, value):
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def _float32(values):
    return torch.tensor(list(values), dtype=torch.float32)
