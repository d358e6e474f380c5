"""What became slower: `python -m bench.compare NEW` holds new result lines against those in bench/results.

Lines are compared where they are about the same (`bench.schema.identity`), the GPU or CPU included; commit, date and
versions may differ. 1 is returned when something is slower or takes more memory, 2 when nothing can be compared.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from bench import schema
from bench.points import VARIANTS, machines, memory, point, ratio, seconds, times


@dataclasses.dataclass(frozen=True)
class Change:
    """One line beside its older counterpart.

    Attributes:
        old: the older line.
        new: the newer line.
        threshold: ratio beyond which a change counts.
    """

    old: dict
    new: dict
    threshold: float

    @property
    def time(self):
        """New time over old time."""
        return self.new["seconds"] / self.old["seconds"]

    @property
    def memory(self):
        """New peak memory over old; None where either is unknown. From nothing to something is infinite."""
        if self.old["peak_bytes"] == 0 and self.new["peak_bytes"]:
            return float("inf")
        return ratio(self.new, self.old, "peak_bytes")

    @property
    def apart(self):
        """Whether no round of one took as long as a round of the other."""
        old, new = self.old["seconds_all"], self.new["seconds_all"]
        return max(old) < min(new) or max(new) < min(old)

    @property
    def slower(self):
        """By more than the threshold, and not by chance."""
        return self.time > self.threshold and self.apart

    @property
    def faster(self):
        """The same the other way round."""
        return self.time < 1 / self.threshold and self.apart

    @property
    def hungrier(self):
        """Takes more memory, by more than the threshold."""
        return self.memory is not None and self.memory > self.threshold

    def flags(self):
        """In words."""
        named = {"slower": self.slower, "faster": self.faster, "more memory": self.hungrier}
        return ", ".join(name for name, holds in named.items() if holds)


def changes(new, old, threshold):
    """Lines that have a counterpart, worst first: what is slower or takes more memory, then by the ratio of times."""
    before = {schema.identity(line): line for line in old}
    found = [Change(before[schema.identity(line)], line, threshold) for line in new if schema.identity(line) in before]
    return sorted(found, key=lambda one: (not (one.slower or one.hungrier), -one.time))


def without_counterpart(lines, others):
    """How many lines have none among the others."""
    known = {schema.identity(line) for line in others}
    return sum(schema.identity(line) not in known for line in lines)


def name_of(line):
    """What was measured, without its sizes."""
    words = [line["bench"], VARIANTS.get(line["variant"]), line["part"], line["impl"]]
    words += [line["fuse"] if line["fuse"] != "none" else None, line["pass"], line["dtype"]]
    words += [f"K={line['permutations']}" if line["permutations"] else None]
    return " ".join(word for word in words if word)


def sizes_of(line):
    """Model and sizes."""
    words = [line["model"] or ""]
    if line["prompt_tokens"] is not None:
        words.append(str(point(line)))
    elif line["responses"] is not None:
        words.append(f"{line['responses']} responses")
    if line["bench"] == "attention" and line["head_dim"] is not None:
        words.append(f"{line['heads']}:{line['kv_heads']} x {line['head_dim']}")
    return "; ".join(filter(None, words))


def table(found, plain=False):
    """Changes as a rich table, of ASCII characters alone where it is to be plain."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.ASCII if plain else box.ROUNDED)
    for name in ("what", "model and sizes"):
        shown.add_column(name, overflow="fold")
    for name in ("old (shortest to longest)", "new (shortest to longest)", "time", "memory"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for one in found:
        cells = [_with_spread(one.old), _with_spread(one.new), times(one.time), _memory(one)]
        shown.add_row(name_of(one.new), sizes_of(one.new), *cells, one.flags())
    return shown


def _with_spread(line):
    shortest, longest = min(line["seconds_all"]), max(line["seconds_all"])
    return f"{seconds(line['seconds'])} ({seconds(shortest)} to {seconds(longest)})"


def _memory(one):
    if one.memory is None:
        return ""
    sizes = f" ({memory(one.old['peak_bytes'])} to {memory(one.new['peak_bytes'])})" if one.hungrier else ""
    return times(one.memory) + sizes


def read(path):
    """The result lines of a file, or of all files of a folder.

    Raises:
        ValueError: there is no such file, or a line breaks the schema.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    return schema.read(*(sorted(path.glob("*.jsonl")) if path.is_dir() else [path]))


def main(arguments=None):
    """Print the comparison; 0, 1 or 2, as the module says."""
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("new", help="file or folder of new result lines")
    parser.add_argument("--against", default="bench/results", help="file or folder of the lines to compare with")
    parser.add_argument("--slower", type=float, default=1.10, help="ratio beyond which a change counts")
    options = parser.parse_args(arguments)
    if options.slower < 1:
        parser.error(f"--slower is a ratio of at least 1, got {options.slower}")
    try:
        new, old = read(options.new), read(options.against)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = changes(new, old, options.slower)
    if not found:
        print(f"nothing can be compared: {options.new} has {_what(new)}, {options.against} has {_what(old)}", file=sys.stderr)  # fmt: skip
        return 2
    console = Console(width=None if sys.stdout.isatty() else 240)  # a file has no width to keep to
    console.print(table(found, plain=not console.is_terminal))
    slower, faster, hungrier = (sum(getattr(one, name) for one in found) for name in ("slower", "faster", "hungrier"))
    print(f"{len(found)} lines compared: {slower} slower, {faster} faster, {hungrier} with more memory (beyond {times(options.slower)})")  # fmt: skip
    print(f"without a counterpart: {without_counterpart(new, old)} of {options.new}, {without_counterpart(old, new)} of {options.against}")  # fmt: skip
    return int(slower + hungrier > 0)


def _what(lines):
    return f"{len(lines)} lines of {', '.join(machines(lines))}" if lines else "no lines"


if __name__ == "__main__":
    sys.exit(main())
