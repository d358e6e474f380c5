"""What result lines are about (machines, points, ways to score, sweeps), and how their numbers are written."""

import math
import re
from typing import NamedTuple

from bench import schema

# variant -> how tables and pictures call it, in the order they show it
VARIANTS = {
    "single": "single passes",
    "single_batch": "padded batch",
    "released": "released code",
    "prefix_cache": "prefix cache",
    "flex": "FlexAttention",
    "kv_gather": "keys gathered",
    "sdpa": "dense SDPA",
    "yojo_comparative": "YOJO comparative",
    "yojo_isolated": "YOJO isolated",
    "yojo_permuted": "YOJO permuted",
}
HEADLINE_MODEL = "qwen3-vl-4b"
# What a sweep runs over -> what stays the same in it.
SWEEPS = {
    "responses": ("prompt", "prompt_tokens", "response_tokens", "samples"),
    "prompt_tokens": ("responses", "response_tokens", "samples"),
    "response_tokens": ("prompt", "prompt_tokens", "responses", "samples"),
}


class Point(NamedTuple):
    """What is scored: the sizes of prompt and responses."""

    prompt: str | None
    prompt_tokens: int | None
    responses: int | None
    response_tokens: float | None
    samples: int

    @property
    def tokens(self):
        """Of the packed row."""
        return round((self.prompt_tokens or 0) + (self.responses or 0) * (self.response_tokens or 0))

    def __str__(self):
        name = f"{count(self.prompt_tokens)} + {count(self.responses)} x {count(self.response_tokens)}"
        name += f", {self.prompt}" if self.prompt else ""
        return name + (f", {self.samples} samples" if self.samples > 1 else "")


class Way(NamedTuple):
    """How it is scored."""

    variant: str
    fuse: str
    permutations: int
    impl: str
    mode: str

    def __str__(self):
        name = VARIANTS[self.variant]
        name += f" K={self.permutations}" if self.variant == "yojo_permuted" else ""
        return name + (f", {self.fuse}" if self.fuse != "none" else "")


def point(line):
    """The point of a line."""
    return Point(*(line[name] for name in Point._fields[:-1]), line["samples"] or 1)


def way(line):
    """The way of a line; no fusing is "none", however it is written."""
    return Way(line["variant"], line["fuse"] or "none", line["permutations"] or 0, line["impl"], line["mode"] or "")


def in_order(ways):
    """Ways in the order of `VARIANTS`, those that are not fused first."""
    places = list(VARIANTS)
    return sorted(ways, key=lambda way: (places.index(way.variant), way.fuse != "none", *way[1:]))


def names_of(ways):
    """way -> name, with what tells two ways apart where their names alone do not."""
    names = {}
    for one in ways:
        namesakes = [other for other in ways if str(other) == str(one)]
        apart = [field for field in ("impl", "mode") if len({getattr(other, field) for other in namesakes}) > 1]
        names[one] = ", ".join([str(one), *(getattr(one, field) for field in apart)])
    return names


def machine(line):
    """The GPU or CPU that a line was measured on."""
    return line["gpu"] or line["cpu"]


def machines(lines):
    """All machines, GPUs first."""
    return [name for _, name in sorted({(line["gpu"] is None, machine(line)) for line in lines})]


def models(lines):
    """(model, dtype) of lines, the headline's model first."""
    found = {(line["model"] or "", line["dtype"] or "") for line in lines}
    return sorted(found, key=lambda pair: (pair[0] != HEADLINE_MODEL, pair))


def of_model(lines, model):
    """The lines of a pair that `models` gives."""
    return [line for line in lines if (line["model"] or "", line["dtype"] or "") == model]


def ordered(lines):
    """Lines by what they are about, so that nothing depends on the order in which they were measured."""
    return sorted(lines, key=lambda line: _sortable(schema.identity(line)))


def rows_of(lines, key):
    """{key of a line: lines}, sorted by key; None stands before everything."""
    rows = {}
    for line in lines:
        rows.setdefault(key(line), []).append(line)
    return {name: rows[name] for name in sorted(rows, key=_sortable)}


def _sortable(values):
    return [(value is not None, value) for value in values]


class Scores:
    """The score lines of one model on one machine.

    Attributes:
        lines: them.
        points: {point: {way: line}}, by size.
        ways: all ways, in order.
        names: way -> name.
    """

    def __init__(self, lines):
        self.lines = lines
        self.points = {
            place: {way(line): line for line in found}
            for place, found in rows_of(lines, lambda line: point(line)).items()
        }
        self.ways = in_order({way(line) for line in lines})
        self.names = names_of(self.ways)

    def single(self, place):
        """The line of N stock passes at a point, which everything is compared with; None where it was not measured."""
        found = [self.points[place][one] for one in self.ways if one[:2] == ("single", "none") if self.has(place, one)]
        return found[0] if found else None

    def has(self, place, one):
        """Whether a way was measured at a point."""
        return one in self.points.get(place, {})

    def speedup(self, line):
        """Time of N stock passes / time of a line; None where either is missing."""
        single = self.single(point(line))
        return single and single["seconds"] / line["seconds"]

    def flops_ratio(self, line):
        """FLOPs of N stock passes / FLOPs of a line: what computing less alone would gain; None where unknown."""
        return ratio(self.single(point(line)), line, "flops")

    def best(self, place, variant):
        """The fastest line of a variant at a point, fused or not; None where there is none."""
        found = [line for one, line in self.points.get(place, {}).items() if one.variant == variant]
        return min(found, key=lambda line: line["seconds"], default=None)

    def sweep(self, over, fewest=2):
        """The points that differ in `over` (a key of `SWEEPS`) alone and have the most values of it; [] for too few.

        A prompt's kind may change with its length: prompts of words are short, those of videos long.
        """
        groups = {}
        for place in self.points:
            groups.setdefault(tuple(getattr(place, name) for name in SWEEPS[over]), []).append(place)

        def size(places):
            values = {getattr(place, over) for place in places}
            return len(values), sum(len(self.points[place]) for place in places)

        found = max(groups.values(), key=size, default=[])
        found = [place for place in found if getattr(place, over) is not None]
        if len({getattr(place, over) for place in found}) < fewest:
            return []
        return sorted(found, key=lambda place: (getattr(place, over), place.prompt or ""))


def ratio(above, below, field):
    """above[field] / below[field]; None where a line or its field is missing, or the one below is 0."""
    if above is None or below is None or above[field] is None or not below[field]:
        return None
    return above[field] / below[field]


def breakdowns(lines):
    """{(variant, fuse, point): {part: line}} of profiled passes, those that are not fused first."""
    found = [line for line in lines if line["bench"] == "forward" and line["part"] is not None]
    groups = rows_of(found, lambda line: (line["variant"], line["fuse"] or "none", *point(line)))
    groups = dict(sorted(groups.items(), key=lambda group: group[0][1] != "none"))
    return {
        (variant, fuse, Point(*sizes)): {line["part"]: line for line in group}
        for (variant, fuse, *sizes), group in groups.items()
    }


def provenance(lines):
    """Machine, versions, dates and commits behind some lines: all there are."""

    def all_of(field):
        return ", ".join(sorted({line[field] for line in lines if line[field] is not None}))

    words = [", ".join(machines(lines))]
    for field, before in [("driver", "driver"), ("torch", "torch"), ("triton", "triton"),
                          ("transformers", "transformers"), ("date", ""), ("commit", "commit")]:  # fmt: skip
        if all_of(field):
            words.append(f"{before} {all_of(field)}".strip())
    return "; ".join(words)


def rate_unit(lines):
    """(how many of it are 1 TFLOP/s, its name): TFLOP/s of GPUs, GFLOP/s of CPUs."""
    return (1, "TFLOP/s") if any(line["gpu"] is not None for line in lines) else (1000, "GFLOP/s")


# ---- numbers in words ----


def digits(value, per=1):
    """Three significant digits of value * per; "" for None."""
    if value is None:
        return ""
    value *= per
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    if rounded == 0:
        return "0"
    if abs(rounded) < 1e-3:
        return f"{rounded:.2e}"
    places = 2 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(places, 0)}f}"


def times(value):
    """A ratio."""
    return "" if value is None else digits(value) + "x"


def percent(value):
    """A share of 1."""
    return "" if value is None else digits(100 * value) + " %"


def seconds(value):
    """A time, in the unit that suits it."""
    return _in_unit(value, ((1, "s"), (1e-3, "ms"), (1e-6, "us")))


def memory(value):
    """Bytes, in the unit that suits them."""
    return _in_unit(value, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")))


def _in_unit(value, units):
    """In the first unit of which there is one, else in the last."""
    if value is None:
        return ""
    size, name = next((unit for unit in units if float(f"{value / unit[0]:.3g}") >= 1), units[-1])
    return f"{digits(value / size)} {name}"


def count(value):
    """A number of tokens or responses: exact where it is whole."""
    if value is None:
        return ""
    return f"{value:,.0f}" if float(value).is_integer() else digits(value)


def slug(*words):
    """A file name of some words."""
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-.")
