"""Finds the fastest tiles of the attention kernels on the GPU at hand, to be written into `yojo_kernels/tuning.py`.

    python -m bench.tune_attention [--head-dims 64 128 256] [--dtype bfloat16] [--json FILE]

For each head dim and kernel every candidate is compiled, checked against the tile in use and timed on four rows, from a
short one to one of 32k tokens; the other kernels keep their tiles. Candidates that do not fit or compile are listed as such.
The fastest has the least geometric mean over the rows: being 5 % slower on the short row counts as much as on the long one.
"""

import argparse
import contextlib
import functools
import math
import statistics
import sys

import torch

from bench import lines, tiles
from bench.attention_peers import Case, mix, one
from bench.pretended_driver import pretended
from bench.smoke import UNUSABLE, usable
from bench.timing import measure
from yojo_kernels import multi_response_attention, tuning
from yojo_kernels.tuning import Tile

CANDIDATES = {
    "forward": [
        Tile(m, n, warps, stages)
        for m, n, warps in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (128, 32, 8), (64, 64, 4), (64, 64, 8), (64, 32, 4), (64, 32, 8), (256, 64, 8))
        for stages in (1, 2, 3, 4)
    ],
    "query_grad": [
        Tile(m, n, warps, stages)
        for m, n, warps in ((128, 128, 8), (128, 64, 8), (128, 32, 8), (64, 64, 4), (64, 128, 8), (64, 32, 8), (64, 32, 4))
        for stages in (1, 2, 3)
    ],
    "key_grad": [
        Tile(m, n, warps, stages)
        for m, n, warps in ((64, 128, 8), (32, 128, 8), (128, 64, 8), (32, 128, 4), (64, 64, 4), (64, 64, 8), (32, 64, 4), (32, 64, 8), (16, 64, 8))
        for stages in (1, 2, 3)
    ],
}  # fmt: skip
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


def shapes_of(head_dim):
    """What is timed: a short row, one of a long prompt, a packed mix, and one of 32k tokens."""
    return [
        one(2048, 4, 100, head_dim=head_dim),
        one(8192, 8, 256, head_dim=head_dim),
        mix(16384, head_dim=head_dim),
        one(32768, 4, 512, head_dim=head_dim),
    ]


def fits(kernel, tile, head_dim, dtype, chip):
    """Whether a tile has a chance: the pipelined operands alone must fit into shared memory."""
    dim, size = tuning.padded(head_dim), dtype.itemsize
    streamed = 2 * dim * size * (tile.block_m if kernel == "key_grad" else tile.block_n)
    return streamed * tile.num_stages <= tuning.SHARED_MEMORY[chip]


def run(case, kernel):
    """(results to compare, function to time) of the pass that a kernel belongs to."""
    inputs = (case.query, case.key, case.value)
    forward = functools.partial(multi_response_attention, *inputs, case.isolated, impl="triton")
    if kernel == "forward":
        with torch.no_grad():
            return [forward()], torch.no_grad()(forward)
    backward = functools.partial(torch.autograd.grad, forward(), inputs, case.grad, retain_graph=True)
    return backward(), backward


def time_of(cases, kernel, tile, expected, device, compares=True):
    """Milliseconds on each case; a string that says why there are none."""
    times = []
    for case, results in zip(cases, expected, strict=True):
        with tuning.forced(**{kernel: tile}):
            try:
                got, timed = run(case, kernel)
                for one_result, other in zip(got, results, strict=True) if compares else ():
                    error = (one_result.float() - other.float()).norm() / other.float().norm()
                    if not error <= TOLERANCE[other.dtype]:
                        return f"wrong: relative error {error:.1e}"
                times.append(1e3 * statistics.median(measure(timed, device)))
            except Exception as error:  # noqa: BLE001 - whatever the compiler cannot do is a line of the table
                return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:100]
    return times


def tune(shapes, kernels, dtype, device, candidates, known=(), append=lambda line: None, most=None, compares=True):
    """Lines (dicts) of every candidate, fastest first, for each kernel.

    Args:
        shapes: rows to time, of one head dim.
        kernels: names.
        dtype, device: of the tensors.
        candidates: kernel -> tiles to try beside the one in use.
        known: lines of an earlier run: what they are about is not tried again.
        append: function (line), called before a tile is tried (with neither times nor error) and when it has been.
        most: how many candidates to try, at most.
        compares: False where kernels are launched into nothing.
    """
    cases = [Case(shape, dtype, device) for shape in shapes]
    head_dim, found = shapes[0].head_dim, []
    chip = tuning.chip_of(device) if device.type == "cuda" else 90
    known = {tiles.identity(line): line for line in known}
    for kernel in kernels:
        used = tuning.attention(kernel, head_dim, dtype, device)
        tried = [used, *(t for t in candidates[kernel] if t != used and fits(kernel, t, head_dim, dtype, chip))][:most]
        about = {"kernel": kernel, "chip": chip, "dtype": str(dtype).removeprefix("torch."), "head_dim": head_dim}
        rows, expected = [], None
        for tile in tried:
            line = about | {"rows": list(map(str, shapes)), "tile": list(tile), "in_use": tile == used}
            if tiles.identity(line) in known:
                rows.append(known[tiles.identity(line)])
                continue
            append(line)
            if expected is None:
                expected = [run(case, kernel)[0] for case in cases]
            times = time_of(cases, kernel, tile, expected, device, compares)
            rows.append(line | ({"error": times} if isinstance(times, str) else {"milliseconds": times}))
            append(rows[-1])
            if isinstance(times, str) and not usable(device):
                raise Unusable
        rows.sort(key=lambda row: sum(map(math.log, row["milliseconds"])) if "milliseconds" in row else math.inf)
        for row in rows:
            what = row.get("error") or " ".join(f"{ms:9.3f}" for ms in row["milliseconds"])
            print(
                f"{kernel:<10} {head_dim:>4} {str(tuple(row['tile'])):<18} {'in use' if row['in_use'] else '':<7} {what}"
            )
        found += rows
    return found


class Unusable(Exception):
    """An error left the GPU so that nothing runs on it any more."""


def main(argv=None):
    """Print the tables; with --json also write them, one object per line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune_attention", description=__doc__.partition("\n")[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=(64, 128, 256))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--kernels", nargs="+", default=tuple(CANDIDATES), choices=tuple(CANDIDATES))
    parser.add_argument(
        "--json", metavar="FILE", help="append a JSON line for each tile; those in FILE are not tried again"
    )
    parser.add_argument("--most", type=int, help="try so many tiles of a kernel at most")
    parser.add_argument(
        "--pretended", action="store_true", help="compile and launch into nothing: needs no GPU, times nothing"
    )
    options = parser.parse_args(argv)
    if not (options.pretended or torch.cuda.is_available()):
        parser.error("tiles are timed on a GPU, and torch finds none")
    device = torch.device("cpu" if options.pretended else "cuda")
    about = {"gpu": None if options.pretended else torch.cuda.get_device_name(), "torch": torch.__version__}

    def append(line):
        if options.json:
            lines.append(options.json, line | about)

    with pretended() if options.pretended else contextlib.nullcontext():
        for dim in options.head_dims:
            shapes = shapes_of(dim)
            if options.pretended:
                shapes = [one(64, 2, 16, head_dim=dim, heads=2, kv_heads=1)]
            known = tiles.read(options.json) if options.json else ()
            try:
                tune(shapes, options.kernels, getattr(torch, options.dtype), device, CANDIDATES, known, append, options.most, not options.pretended)  # fmt: skip
            except Unusable:
                print("an error left the GPU unusable: run again to go on behind it", file=sys.stderr)
                return UNUSABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
