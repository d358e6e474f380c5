"""The tiles that `bench.tune_attention` timed: which are the fastest, and how they get into `yojo_kernels/tuning.py`."""

import math
import re
import typing

import torch

from bench import lines
from yojo_kernels import tuning
from yojo_kernels.tuning import Tile

WORTH = 1.02  # times as fast as the tile in use: less is noise


class Chosen(typing.NamedTuple):
    """A tile that is faster than the one in use.

    Attributes:
        kernel, chip, dtype, head_dim: what it is for; the dtype by its name.
        used, tile: the tile in use and the fastest.
        gain: how many times as fast it is, the geometric mean over the rows that were timed.
    """

    kernel: str
    chip: int
    dtype: str
    head_dim: int
    used: Tile
    tile: Tile
    gain: float


def read(path):
    """The lines of a file of tiles, the later of two about the same tile; none where there is no file."""
    found = {identity(line): line for line in lines.read(path)}
    for line in found.values():
        if not {"milliseconds", "error"} & set(line):
            line["error"] = "the process ended, or was ended, while this tile was tried"
    return list(found.values())


def identity(line):
    """What a line is about."""
    return *_group(line), tuple(line["tile"])


def _group(line):
    """What those lines have in common whose times can be compared."""
    return line["kernel"], line["chip"], line["dtype"], line["head_dim"], tuple(line.get("rows", ()))


def chosen(path, allowed=lambda choice: True):
    """`Chosen` for each kernel and head dim whose tile in use was beaten, by the fastest tile that is allowed.

    Args:
        path: file of `bench.tune_attention --json`.
        allowed: function (Chosen) -> bool.
    """
    groups, found = {}, []
    for line in read(path):
        if "milliseconds" in line:
            groups.setdefault(_group(line), []).append(line)
    for (*key, _), timed in groups.items():
        used = next((line for line in timed if line["in_use"]), None)
        if used is None:
            continue
        for line in sorted(timed, key=_time):
            gain = math.exp((_time(used) - _time(line)) / len(line["milliseconds"]))
            choice = Chosen(*key, Tile(*used["tile"]), Tile(*line["tile"]), gain)
            if gain < WORTH:
                break
            if allowed(choice):
                found.append(choice)
                break
    return found


def _time(line):
    return sum(map(math.log, line["milliseconds"]))


def passes_the_gate(choice):
    """Whether the kernel, compiled with the tile for all that it would be launched with, breaks no rule of
    `yojo_kernels.aot`: where scores that are capped have a tile of their own, not for those."""
    from yojo_kernels import aot

    dtype, capped = getattr(torch, choice.dtype), _is_capped_apart(choice)
    kernels = ("key_grad", "value_grad") if choice.kernel == "key_grad" else (choice.kernel,)
    return not any(
        aot.compile_kernel(*configuration, choice.tile).problems()
        for configuration in aot.configurations((choice.chip,), (dtype,), (choice.head_dim,), kernels)
        if not (capped and aot.FEATURES[configuration[-1]].get("HAS_SOFTCAP"))
    )


def _is_capped_apart(choice):
    """Whether `tuning.CAPPED` has a tile of its own beside the one that would be written."""
    dtype = getattr(torch, choice.dtype)
    tile, capped = (tuning.tile(choice.kernel, choice.head_dim, dtype, choice.chip, is_capped) for is_capped in (False, True))  # fmt: skip
    return tile != capped


def use(choices):
    """Have kernels launched with these tiles, for the rest of the process."""
    for one in choices:
        entry = tuning.TILES[one.kernel, getattr(torch, one.dtype).itemsize * 8, one.chip]
        entry[tuning.padded(one.head_dim)] = one.tile
    tuning._known_tile.cache_clear()


def written_into(source, choices):
    """The text of `yojo_kernels/tuning.py` with these tiles in it.

    Raises:
        ValueError: a table is not found in the text as one line.
    """
    for one in choices:
        bits = getattr(torch, one.dtype).itemsize * 8
        head = f'    ("{one.kernel}", {bits}, {one.chip}): {{'
        table = source.partition("\nTILES = {\n")[2].partition("\n}")[0]
        found = [line for line in table.split("\n") if line.startswith(head)]
        if len(found) != 1:
            raise ValueError(
                f"tuning.py has {len(found)} lines that begin with {head.strip()}, not one: edit it by hand"
            )
        (line,) = found
        entries = {
            int(dim): tuple(map(int, numbers.split(",")))
            for dim, numbers in re.findall(r"(\d+): Tile\(([\d, ]+)\)", line)
        }
        entries[tuning.padded(one.head_dim)] = tuple(one.tile)
        body = ", ".join(f"{dim}: Tile({', '.join(map(str, entries[dim]))})" for dim in sorted(entries))
        source = source.replace(line, f"{head}{body}}},", 1)  # that of TILES, the first one
    return source
