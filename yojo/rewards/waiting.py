"""What a collator holds: samples that wait for the rest of their group, keys that have ended, and what is counted."""

import collections
import concurrent.futures
import dataclasses
import typing

from yojo.rewards.groups import Group, with_key


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion that waits for its reward.

    Attributes:
        completion: str.
        truncated: True, False or None.
        since: when it came, by the collator's clock.
        future: of its `Reward`.
    """

    completion: str
    truncated: bool | None
    since: float
    future: concurrent.futures.Future = dataclasses.field(default_factory=concurrent.futures.Future)


@dataclasses.dataclass(eq=False)
class Waiting:
    """The samples of one key, until they have their rewards or an error.

    Attributes:
        key: what the framework calls the group.
        first: `Group` of the first sample: the prompt and the media, which the others share.
        size: samples that make the group whole.
        due: when the group ends whatever it lacks, by the collator's clock; later, when its rewards are due.
        samples: list of `Sample`, in the order they came.
        ended: its samples have been answered, or are being.
    """

    key: typing.Hashable
    first: Group
    size: int
    due: float
    samples: list = dataclasses.field(default_factory=list)
    ended: bool = False

    @property
    def missing(self):
        """Samples that have not come."""
        return self.size - len(self.samples)

    def group(self):
        """The `Group` of all that came."""
        flags = [sample.truncated for sample in self.samples]
        made = dataclasses.replace(
            self.first,
            completions=[sample.completion for sample in self.samples],
            truncated=None if all(flag is None for flag in flags) else flags,
        )
        return with_key(made, self.first.key)

    def shares_objects(self, group):
        """Whether a group has the first sample's prompt and its very media, so that their content need not be compared."""
        return (
            isinstance(group.prompt, str)  # messages are copied, and may hold media
            and self.first.prompt == group.prompt
            and self.first.tools is group.tools
            and self.first.literal_tags == group.literal_tags
            and _same_items(self.first.images, group.images)
            and _same_items(self.first.videos, group.videos)
        )


def _same_items(own, others):
    others = () if others is None else others
    if not isinstance(others, (list, tuple)):
        return False
    return len(own) == len(others) and all(one is other for one, other in zip(own, others, strict=True))


class Ended:
    """Keys whose group has ended, and how; bounded in number and in time.

    Args:
        most: keys, at most; the oldest are forgotten first.
        seconds: after which a key is forgotten.
    """

    def __init__(self, most, seconds):
        self.most, self.seconds = most, seconds
        self._how = collections.OrderedDict()  # key -> (when, how)

    def __len__(self):
        return len(self._how)

    def add(self, key, when, how):
        """Remember how a key's group ended."""
        self._how.pop(key, None)
        self._how[key] = when, how
        while len(self._how) > self.most:
            self._how.popitem(last=False)

    def get(self, key):
        """How a key's group ended; None where it has not, or is forgotten."""
        return self._how[key][1] if key in self._how else None

    def forget(self, now):
        """Forget what is older than `seconds`."""
        while self._how and self.due() <= now:
            self._how.popitem(last=False)

    def due(self):
        """When the oldest is forgotten; None: there is none."""
        return next(iter(self._how.values()))[0] + self.seconds if self._how else None

    def clear(self):
        """Forget everything."""
        self._how.clear()


@dataclasses.dataclass
class Tally:
    """Values that are counted, added up, and of which the largest is kept."""

    count: int = 0
    sum: float = 0.0
    max: float = 0.0

    def add(self, value):
        """Count a value of at least 0."""
        self.count, self.sum, self.max = self.count + 1, self.sum + value, max(self.max, value)

    def named(self, name):
        """dict: name_count, name_sum, name_max and name_mean (0.0 where nothing was counted)."""
        mean = self.sum / self.count if self.count else 0.0
        return {f"{name}_count": self.count, f"{name}_sum": self.sum, f"{name}_max": self.max, f"{name}_mean": mean}
