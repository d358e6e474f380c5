"""`Group`: one prompt and the N completions that a policy has sampled for it; what identifies it, and in which order it is judged."""

import dataclasses
import functools
import hashlib
import json
import typing

from yojo.inputs.digests import example_key
from yojo.inputs.example import Example


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt and the N completions that a policy has sampled for it.

    Attributes:
        prompt: a string or chat messages, as for `yojo.Example`.
        completions: N >= 1 strings; they may be empty, and equal.
        images, videos: as for `yojo.Example`.
        truncated: for each completion whether it was cut off at the length limit, True, False or None (not known); or None.
        tools: as for `yojo.Example`.
        literal_tags: as for `yojo.Example`.
        id: how errors name the group.

    Raises:
        TypeError, ValueError: anything that does not fit the above; the message names the group.
    """

    prompt: str | list
    completions: typing.Sequence[str]
    images: typing.Sequence = ()
    videos: typing.Sequence = ()
    truncated: typing.Sequence | None = None
    tools: typing.Sequence | None = None
    literal_tags: bool = False
    id: typing.Any = None

    def __post_init__(self):
        if isinstance(self.completions, str) or not isinstance(self.completions, (list, tuple)):
            raise TypeError(
                f"{self.name}: completions must be a list of strings, got {type(self.completions).__name__}"
            )
        if not self.completions:
            raise ValueError(f"{self.name}: no completions: at least one is needed")
        for place, text in enumerate(self.completions):
            if not isinstance(text, str):
                raise TypeError(f"{self.name}: completion {place} must be a string, got {type(text).__name__}")
        if self.truncated is not None:
            if len(self.truncated) != len(self.completions):
                count = len(self.truncated)
                raise ValueError(f"{self.name}: truncated has {count} entries for {len(self.completions)} completions")
            for flag in self.truncated:
                if flag is not None and not isinstance(flag, bool):
                    raise TypeError(f"{self.name}: truncated must hold True, False or None, got {flag!r}")

    @property
    def name(self):
        """How errors name the group."""
        return "group" if self.id is None else f"group {self.id!r}"

    def example(self, responses):
        """The group as a `yojo.Example` of these responses."""
        media = {"images": self.images, "videos": self.videos}
        return Example(self.prompt, responses, **media, tools=self.tools, literal_tags=self.literal_tags, id=self.id)

    @functools.cached_property
    def key(self):
        """Digest that tells the group from those of other prompts, str of 32 hexadecimal digits.

        Of the prompt to the last blank, the tools, and images and videos by content, wherever they lie; not of the completions.

        Raises:
            TypeError, ValueError: a prompt or media that no `yojo.Example` takes.
            OSError: a file that cannot be read.
        """
        return example_key(self.example(["-"]))


def with_key(group, key):
    """A group whose key is known already: its media are not read for it again."""
    vars(group)["key"] = key
    return group


def drawn_order(texts, seed, draw, key):
    """An order of texts that depends on them, and on what is drawn with, but not on the order they come in.

    Args:
        texts: N different strings.
        seed: int.
        draw: what else tells one drawing from others: anything that JSON has, such as [step, call].
        key: str, of the group.

    Returns:
        list of 0..N-1: which text stands at each place. Each of the N! orders is as likely as any other.
    """
    salt = json.dumps([seed, draw, key], sort_keys=True).encode()

    def lot(place):
        return hashlib.blake2b(texts[place].encode("utf-8", "surrogatepass"), key=_short(salt)).digest()

    return sorted(range(len(texts)), key=lot)


def _short(salt):
    return hashlib.blake2b(salt, digest_size=32).digest()
