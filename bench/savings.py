"""What one pass saves in FLOPs on the real shapes, counted without running anything."""

import dataclasses
import functools

from bench import models
from bench.points import count as number
from bench.points import times
from bench.sweeps import COUNTS, LENGTHS, MIDDLE, PROMPTS, Point
from bench.ways import Twin


@dataclasses.dataclass(frozen=True)
class Savings:
    """Ratios as a report shows them.

    Attributes:
        each: tokens of a response.
        counts: N of the columns.
        shapes: dict name of a shape -> rows of cells: the prompt, then "comparative / isolated" for each N.
    """

    each: int
    counts: tuple[int, ...]
    shapes: dict


@functools.cache
def count():
    """`Savings` of the shapes for GPUs at the prompts of the sweeps, and of a short prompt with long responses."""
    each, longest = MIDDLE["cuda"][2], max(LENGTHS["cuda"])
    prompts = PROMPTS["cuda"]
    cases = [(*prompts[0], longest), *((kind, tokens, each) for kind, tokens in prompts)]
    shapes = {}
    for name, shape in models.SHAPES["cuda"].items():
        twin = Twin(shape)
        shapes[name] = [
            [_name(kind, tokens, length, each), *(_cell(twin, Point(kind, tokens, n, length)) for n in COUNTS)]
            for kind, tokens, length in cases
        ]
    return Savings(each, COUNTS, shapes)


def _name(kind, tokens, length, each):
    name = f"{kind}, {number(tokens)} tokens"
    return name if length == each else f"{name}, responses of {number(length)}"


def _cell(twin, point):
    flops = twin.flops_of_passes(twin.batches(twin.encoded(point)))
    ratios = [times(flops["single"] / flops[f"yojo_{mode}"]) for mode in ("comparative", "isolated")]
    return ratios[0] if ratios[0] == ratios[1] else " / ".join(ratios)
