"""Groups whose rows are spread over processes: what each process has is told to all, and each group is scored by one."""

import atexit
import dataclasses
import datetime

import torch.distributed as dist

MARGIN = 120.0  # seconds that one process may come later than another, beside what the judge may take


def is_spread():
    """Whether there are other processes that have rows of their own."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Exchange:
    """Objects told to every process, through a gloo group of its own, so that nothing else's traffic is disturbed.

    Every process has to make one, at the same point of its program.

    Args:
        deadline: seconds that a process may be busy between two exchanges; None: torch's own limit, half an hour.
    """

    def __init__(self, deadline):
        seconds = 1800.0 if deadline is None else deadline + MARGIN
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=seconds))
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._of = dist.group.WORLD
        atexit.register(self._end)  # gloo's threads, met by the end of a program, abort it

    def is_current(self):
        """Whether torch.distributed is still the one that this was made in."""
        return self._of is dist.group.WORLD

    def _end(self):
        if dist.is_initialized() and self.is_current():
            dist.destroy_process_group(self.group)

    def all(self, value):
        """list: the values of all processes, by rank.

        Raises:
            RuntimeError: another process has ended, or does not come.
        """
        found = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        return found


class Alone:
    """The exchange of a process that has all rows."""

    rank, world = 0, 1

    def all(self, value):
        """[value]."""
        return [value]


@dataclasses.dataclass(frozen=True)
class Whole:
    """A whole group, whoever has its rows.

    Attributes:
        key: its prompt's, a string.
        members: (rank, row) of each completion, in the order of ranks and rows.
        owner: rank that scores it: it has the most rows, and so the prompt with its images.
    """

    key: str
    members: tuple
    owner: int


def whole_groups(keys, group_size):
    """The groups that rows of several processes make up.

    Args:
        keys: list of W lists, the key of each row of each process.
        group_size: rows of a group. A prompt that comes up several times has as many groups: consecutive rows of one.

    Returns:
        list of `Whole`, in the order of their first rows.

    Raises:
        ValueError: a prompt whose rows make up no whole groups; the message says how many there are and where.
    """
    members = {}
    for rank, own in enumerate(keys):
        for row, key in enumerate(own):
            members.setdefault(key, []).append((rank, row))
    for found in members.values():
        if len(found) % group_size:
            rank, row = found[0]
            counts = ", ".join(
                f"{sum(r == rank for r, _ in found)} on process {rank}" for rank in sorted({r for r, _ in found})
            )
            raise ValueError(
                f"an incomplete group: {len(found)} completions of the prompt of row {row} of process {rank} ({counts}), and "
                f"groups of {group_size}. All completions of a prompt must come in one call: let the batch over all "
                "processes be a multiple of num_generations, gather=True where processes share groups, and group_size the "
                "number of completions of a prompt; prompts that differ in a blank, or in their images, are different ones"
            )
    groups = [
        Whole(key, tuple(found[start : start + group_size]), _owner(found[start : start + group_size]))
        for key, found in members.items()
        for start in range(0, len(found), group_size)
    ]
    return sorted(groups, key=lambda group: group.members[0])


def _owner(members):
    ranks = [rank for rank, _ in members]
    return max(sorted(set(ranks)), key=ranks.count)
