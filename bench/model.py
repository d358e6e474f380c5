"""What the attention kernels should take on a GPU that nobody has asked yet: predictions, never measurements.

    python -m bench.model                                          # rows and head dims of bench/test_attention.py
    python -m bench.model --row 2048+4x100 mix(16384) --head-dim 128 --heads 32:8
    python -m bench.model --row 8192+8x256 --tile forward=128x128x8x3     # a tile of one kernel to try
    python -m bench.model --steps                                  # clocks of a step of each kernel, by resource
    python -m bench.model --constants                              # what goes in, and where it comes from
    python -m bench.model --record                                 # after a change of kernels or tiles: cycles.json anew

The tables of tiles say how many full and border steps each program takes, the machine code what a step asks of a
multiprocessor (`bench.sass`). A step takes

    max(tensor, shared) + apart + WAIT * waits

clocks: Triton's loops wait for each product whose result they touch, so that exponentials and instructions between a
product and the next (`apart`) stand beside no product of the same program, and both warp groups do so in step. Programs
are then handed to the multiprocessors in order, each to the one that is free first. Clocks become time by `CLOCK`, and
are divided by `CORRECTION`. `cycles.json` beside this file holds the steps of the tables' tiles, so that nothing need be
compiled; what it was made from is checked.
"""

import argparse
import dataclasses
import functools
import hashlib
import heapq
import json
import pathlib
import re
import sys
from typing import NamedTuple

import torch
import triton

from bench import sass
from bench.attention_peers import SHAPES, Shape, mix, one
from yojo_kernels import Layout, attention, tuning

RECORD = pathlib.Path(__file__).with_name("cycles.json")
SOURCES = ("attention_forward.py", "attention_backward.py", "attention_steps.py")
KERNELS = ("forward", "query_grad", "key_grad")  # that have tiles; the last may be launched twice
HEAD_DIMS = (64, 128, 256)  # in cycles.json
CHIP = 90


class Constant(NamedTuple):
    """A number that goes into a prediction."""

    value: float
    unit: str
    source: str


# Of the device: published. Of the code: from reading it for sm_90, to be replaced by measurements of the first GPU.
READ = "read off the machine code, not measured"
CONSTANTS = {
    "TENSOR": Constant(4096, "FLOP/clk/SM", "H100 whitepaper: 989.4 TFLOP/s dense bfloat16 on 132 SMs at 1.83 GHz; m64nNk16 takes N/2 clk"),
    "SHARED": Constant(sass.SMEM_BYTES, "B/clk/SM", "32 banks of 4 bytes; a product reads B, and A unless it is in registers"),
    "MUFU": Constant(sass.MUFU_LANES, "lanes/clk/SM", "CUDA programming guide, special functions of compute capability 9.0"),
    "ISSUE": Constant(sass.SCHEDULERS, "instructions/clk/SM", "CUDA programming guide, warp schedulers of compute capability 9.0"),
    "PROCESSORS": Constant(132, "SMs", "data sheets of the H100 SXM and the H200"),
    "CLOCK": Constant(1.65, "GHz", "assumed under the load of matrix products; boost is 1.83 to 1.98"),
    "CORRECTION": Constant(0.93, "", "plain Triton attention as published for the H100 (390 to 490 TFLOP/s at head dim 128) over this model"),
    "WAIT": Constant(220, "clk", f"two barriers, a fence, drain and refill of the tensor cores at each wait; {READ}"),
    "START forward": Constant(3000, "clk", f"tables, rows of the program, first copies, and the stores at the end; {READ}"),
    "START query_grad": Constant(4500, "clk", f"the same with three rows, their sums and the statistics; {READ}"),
    "START key_grad": Constant(4000, "clk", f"the same with two rows and two outputs; {READ}"),
    "DRAIN": Constant(1800, "clk", f"from the loop of full steps to that of border steps where there are two; {READ}"),
    "EMPTY": Constant(300, "clk", f"a program without a tile; {READ}"),
    "SUM": Constant(1500, "clk", f"a program of the sum kernel beside its reads; {READ}"),
    "SUM BYTES": Constant(45, "B/clk/SM", "reads one after the other from level-2 cache, assumed"),
    "SUM PROGRAMS": Constant(4, "programs/SM", "8 warps of up to 64 registers each, which share the reads"),
    "LAUNCH": Constant(2, "us", "from the key kernel's end to the sum kernel's start, assumed"),
}  # fmt: skip
DEVICES = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")  # as torch names those that the constants hold for


def constant(name, kernel=None):
    """The value of a constant, of one kernel where it has its own."""
    return CONSTANTS.get(f"{name} {kernel}", CONSTANTS.get(name)).value


def require(device):
    """ValueError for a device without constants."""
    if device not in DEVICES:
        raise ValueError(f"there are no sourced constants for {device}: predictions are for {' and '.join(DEVICES)}")


# ---- steps ----


def sources():
    """Hash of the kernels' code; comments and empty lines do not count."""
    code = ""
    for name in SOURCES:
        for line in pathlib.Path(attention.__file__).with_name(name).read_text().splitlines():
            code += "" if not line.strip() or line.lstrip().startswith("#") else line + "\n"
    return hashlib.sha256(code.encode()).hexdigest()


@functools.cache
def recorded():
    """{configuration: `sass.Step`} of cycles.json.

    Raises:
        ValueError: it was made from other kernels than these.
    """
    record = json.loads(RECORD.read_text())
    if record["sources"] != sources():
        raise ValueError(f"{RECORD.name} was made from other kernels: run python -m bench.model --record")
    return {name: sass.Step(**step) for name, step in record["steps"].items()}


def name_of(kernel, dtype, head_dim, tile):
    """How cycles.json names a configuration."""
    return f"{kernel} {str(dtype).removeprefix('torch.')} {head_dim} {'x'.join(map(str, tile))}"


@functools.cache
def step_of(kernel, dtype, head_dim, tile):
    """`sass.Step` of a configuration: recorded, or compiled now."""
    name = name_of(kernel, dtype, head_dim, tile)
    return recorded()[name] if name in recorded() else sass.compiled(kernel, dtype, head_dim, tile)


def tiles_of(dtype, head_dim):
    """{kernel: tile} of the tables."""
    return {kernel: tuning.tile(kernel, head_dim, dtype, CHIP) for kernel in KERNELS}


def launches(dtype, head_dim, tiles):
    """[(kernel as `aot` names it, tile)] of a forward and a backward pass; "value_grad" is a launch of key_grad's."""
    passes = attention.key_passes(dtype, head_dim)
    names = ("forward", "query_grad", *("value_grad",) * (len(passes) - 1), "key_grad")
    return [(name, tiles["key_grad" if name == "value_grad" else name]) for name in names]


def record():
    """Compile the tables' tiles and write cycles.json; returns its steps."""
    steps = {}
    for head_dim in HEAD_DIMS:
        for kernel, tile in launches(torch.bfloat16, head_dim, tiles_of(torch.bfloat16, head_dim)):
            step = sass.compiled(kernel, torch.bfloat16, head_dim, tile)
            steps[name_of(kernel, torch.bfloat16, head_dim, tile)] = dataclasses.asdict(step)
    text = json.dumps({"triton": triton.__version__, "sources": sources(), "steps": steps}, indent=1)
    RECORD.write_text(text + "\n")
    recorded.cache_clear(), step_of.cache_clear()
    return steps


def clocks(step):
    """(full, border): clocks of a multiprocessor for a step of one program.

    Where several programs share a multiprocessor, one's products fill the gaps of another: what `step.bound` does not
    need is divided among them.
    """
    full = max(step.tensor, step.shared) + step.apart + constant("WAIT") * step.waits
    full = step.bound + (full - step.bound) / step.resident
    return full, full + step.border


# ---- programs ----


class Run(NamedTuple):
    """One kernel on one row.

    Attributes:
        programs: launched.
        microseconds: predicted.
        balance: share of the time that a multiprocessor is busy, on average.
        computed: pairs of rows that its steps go over, times heads; 0 where it multiplies nothing.
    """

    programs: int
    microseconds: float
    balance: float
    computed: int = 0


def schedule(costs, slots):
    """Clocks until the last of some programs ends, each started in order on the slot that is free first."""
    free = [0.0] * slots
    for cost in costs:
        heapq.heappush(free, heapq.heappop(free) + cost)
    return max(free)


def query_steps(table, block_n):
    """(full, border) steps of each tile of `tiles.query_tiles`."""
    lo_a, end_a, from_a, to_a, lo_b, end_b, from_b, to_b = table[:, 2:].long().unbind(1)
    full = (to_a - from_a) + (to_b - from_b)
    return full, (end_a - lo_a + block_n - 1) // block_n + (end_b - lo_b + block_n - 1) // block_n - full


def key_steps(items, block_m):
    """(full, border) steps of each item of `tiles.key_tiles`, which counts those of one query head after the other."""
    lo, end, first, behind, from_step, to_step = items[:, 2:8].long().unbind(1)
    steps = ((end - lo + block_m - 1) // block_m).clamp(min=1)  # of one head
    first, behind = torch.minimum(first, steps), torch.minimum(behind, steps)

    def full_before(step):
        return step // steps * (behind - first) + torch.minimum(torch.maximum(step % steps, first), behind) - first

    full = full_before(to_step) - full_before(from_step)
    return full, to_step - from_step - full


def run(live, full, border, step, heads, start, drain):
    """`Run` of a kernel from its table.

    Args:
        live: [tiles] bool, those that are no empty ones.
        full, border: [tiles], steps.
        step: `sass.Step`.
        heads: programs of each tile.
        start: clocks of a program beside its steps.
        drain: [tiles], clocks for what the loops cost beside their steps.
    """
    of_full, of_border = clocks(step)
    costs = torch.where(live, start + full * of_full + border * of_border + drain, constant("EMPTY")).double()
    return _run(costs, heads, step.resident)


def _run(costs, heads, resident=1):
    slots = resident * int(constant("PROCESSORS"))
    costs = (costs * resident).repeat_interleave(heads).tolist()  # a program has its share of a multiprocessor
    span = schedule(costs, slots)
    microseconds = span / constant("CLOCK") / 1e3 / constant("CORRECTION")
    return Run(len(costs), microseconds, sum(costs) / span / slots)


def query_run(kernel, layout, tile, step, heads, kv_heads):
    """`Run` of the forward kernel, which packs heads of a group into a tile, or that of the queries' gradients."""
    pack = tuning.packed_heads(heads // kv_heads, tile.block_m) if kernel == "forward" else 1
    table = layout.query_tiles(tile.block_m // pack, tile.block_n)
    full, border = query_steps(table, tile.block_n)
    drain = constant("DRAIN", kernel) * ((full > 0) & (border > 0) & (step.loops == 2))
    found = run(table[:, 1] > table[:, 0], full, border, step, heads // pack, constant("START", kernel), drain)
    return found._replace(computed=int((full + border).sum()) * tile.block_m * tile.block_n * (heads // pack))


def key_runs(layout, tile, steps, head_dim, heads, kv_heads):
    """`Run`s of the gradients of keys and values, all launches together, and of adding up their pieces.

    `steps`: `sass.Step` of each launch.
    """
    extra = max(1, tuning.PIECES_PER_PROCESSOR * int(constant("PROCESSORS")) // kv_heads)
    items, sums = layout.key_tiles(tile.block_m, tile.block_n, extra, group=heads // kv_heads)
    full, border = key_steps(items, tile.block_m)
    live, start = items[:, 1] > items[:, 0], constant("START", "key_grad")
    keys = _together([run(live, full, border, step, kv_heads, start, 0) for step in steps])
    computed = int((full + border).sum()) * tile.block_m * tile.block_n * kv_heads
    rows = attention.sum_constants(head_dim, tile)["ROWS"]
    size = rows * tuning.padded(head_dim) * 4 * 2 / len(steps)  # bytes of a program and piece
    count = sums[:, 3].double()
    resident = int(constant("SUM PROGRAMS"))
    costs = count * size / constant("SUM BYTES") + (constant("SUM") * (count > 0) + constant("EMPTY")) / resident
    adding = _run(costs, kv_heads * (tile.block_n // rows), resident)
    adding = adding._replace(microseconds=adding.microseconds + constant("LAUNCH"))
    return keys._replace(computed=computed), _together([adding] * len(steps))


def _together(runs):
    """Launches one after the other as one `Run`."""
    microseconds = sum(run.microseconds for run in runs)
    balance = sum(run.balance * run.microseconds for run in runs) / microseconds
    return Run(sum(run.programs for run in runs), microseconds, balance, sum(run.computed for run in runs))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What one row should take.

    Attributes:
        shape: the row.
        runs: {kernel: `Run`}: forward, query_grad, key_grad, sum.
        pairs: visible pairs of a query and a key.
    """

    shape: Shape
    runs: dict
    pairs: int

    def microseconds(self, direction):
        """Of the forward or backward pass."""
        return sum(run.microseconds for kernel, run in self.runs.items() if (kernel == "forward") == (direction == "forward"))  # fmt: skip

    def tflops(self, direction):
        """TFLOP/s of visible area: two products forward, five backward."""
        flops = {"forward": 4, "backward": 10}[direction] * self.shape.heads * self.shape.head_dim * self.pairs
        return flops / self.microseconds(direction) / 1e6

    @property
    def visible(self):
        """Visible pairs over those that the forward kernel computes."""
        return self.pairs * self.shape.heads / self.runs["forward"].computed


def predict(shape, dtype=torch.bfloat16, device=DEVICES[0], tiles=None):
    """`Prediction` of a row (`attention_peers.Shape`) on a device; tiles: {kernel: tile} instead of the tables'.

    Raises:
        ValueError: a device without constants, float32 (no tensor cores), or kernels that the model does not know.
    """
    require(device)
    if dtype.itemsize != 2:
        raise ValueError(f"kernels of {dtype} do not multiply on tensor cores: predictions are for 16-bit dtypes")
    tiles = tiles_of(dtype, shape.head_dim) | (tiles or {})
    steps = [step_of(name, dtype, shape.head_dim, tile) for name, tile in launches(dtype, shape.head_dim, tiles)]
    layout = Layout.build(shape.prompts, shape.responses)
    runs = {
        kernel: query_run(kernel, layout, tiles[kernel], step, shape.heads, shape.kv_heads)
        for kernel, step in zip(KERNELS[:2], steps[:2], strict=True)
    }
    of_keys = (tiles["key_grad"], steps[2:], shape.head_dim, shape.heads, shape.kv_heads)
    runs["key_grad"], runs["sum"] = key_runs(layout, *of_keys)
    pairs = attention.visible_pairs(layout.sample, layout.branch, layout.position, None, 0)
    return Prediction(shape, runs, pairs)


@functools.cache
def predictions():
    """`Prediction`s of the rows that bench/test_attention.py measures on a GPU, in bfloat16."""
    return [predict(shape) for shape in SHAPES["cuda"]]


# ---- command line ----

ROW = re.compile(r"(?P<mix>mix\((?P<tokens>\d+)\))|(?P<prompt>\d+)(\+(?P<count>\d+)x(?P<each>\d+))?")


def row(text, **options):
    """`Shape` of a row in words: a prompt alone "16384", with responses "2048+4x100", or "mix(16384)"."""
    found = ROW.fullmatch(text)
    if not found:
        raise ValueError(f"a row is like 16384, 2048+4x100 or mix(16384), not {text}")
    if found["mix"]:
        return mix(int(found["tokens"]), **options)
    if found["count"]:
        return one(int(found["prompt"]), int(found["count"]), int(found["each"]), **options)
    return Shape((int(found["prompt"]),), ((),), **options)


def _tile(text):
    kernel, _, sizes = text.partition("=")
    if kernel not in KERNELS or not re.fullmatch(r"\d+x\d+x\d+x\d+", sizes):
        raise ValueError(f"a tile is like forward=128x64x8x3, of {', '.join(KERNELS)}, not {text}")
    return kernel, tuning.Tile(*map(int, sizes.split("x")))


HEADER = (
    f"{'row':<44}{'visible/':>9}{'forward':>18}{'query_grad':>18}{'key_grad':>18}{'sum':>8}{'backward':>18}\n"
    f"{'predicted, not measured':<44}{'computed':>9}" + f"{'us  balance':>18}" * 3 + f"{'us':>8}{'':>18}"
)


def line(found):
    """A `Prediction` as a line of the table."""
    text = f"{found.shape!s:<44}{found.visible:>9.2f}"
    for kernel in KERNELS:
        text += f"{found.runs[kernel].microseconds:>12.1f}{found.runs[kernel].balance:>6.2f}"
    text += f"{found.runs['sum'].microseconds:>8.1f}"
    rates = " / ".join(f"{found.tflops(direction):.0f}" for direction in ("forward", "backward"))
    return text + f"{found.microseconds('backward'):>12.1f} us   {rates} TFLOP/s forward / backward"


def print_steps(dtype, head_dims):
    """Clocks of a step of each kernel, by resource."""
    print("clocks of a multiprocessor for one step of one program, read off the machine code")
    print(f"{'kernel, tile':<44}{'tensor':>8}{'shared':>8}{'MUFU':>8}{'issue':>8}{'apart':>8}{'waits':>7}{'full':>8}{'border':>8}{'loops':>7}{'registers':>11}{'programs/SM':>13}")  # fmt: skip
    for head_dim in head_dims:
        for kernel, tile in launches(dtype, head_dim, tiles_of(dtype, head_dim)):
            step = step_of(kernel, dtype, head_dim, tile)
            parts = "".join(f"{part:>8.0f}" for part in (step.tensor, step.shared, step.mufu, step.issue, step.apart))
            full, border = clocks(step)
            print(f"{name_of(kernel, dtype, head_dim, tile):<44}{parts}{step.waits:>7}{full:>8.0f}{border:>8.0f}{step.loops:>7}{step.registers:>11}{step.resident:>13}")  # fmt: skip


def main(argv=None):
    """Print predictions; 2 where something asked for cannot be predicted."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.partition("\n")[0])
    parser.add_argument("--row", nargs="+", help="16384, 2048+4x100 or mix(16384); those of bench/test_attention.py")
    parser.add_argument("--head-dim", type=int, nargs="+", default=(128,))
    parser.add_argument("--heads", default="32:8", help="query heads : key heads")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--tile", nargs="+", default=(), help="kernel=queries x keys x warps x stages, to try")
    parser.add_argument("--device", default=DEVICES[0])
    parser.add_argument("--steps", action="store_true", help="print the clocks of a step instead")
    parser.add_argument("--constants", action="store_true", help="print what goes in instead")
    parser.add_argument("--record", action="store_true", help="write cycles.json anew")
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    try:
        require(options.device)
        if options.record:
            print(f"{len(record())} steps with Triton {triton.__version__} -> {RECORD.name}")
        elif options.constants:
            for name, (value, unit, source) in CONSTANTS.items():
                print(f"{name:<18}{value:>8g} {unit:<20}{source}")
        elif options.steps:
            print_steps(dtype, options.head_dim)
        else:
            heads, kv_heads = map(int, options.heads.split(":"))
            shapes = SHAPES["cuda"]
            if options.row:
                sizes = [dict(head_dim=dim, heads=heads, kv_heads=kv_heads) for dim in options.head_dim]
                shapes = [row(text, **size) for size in sizes for text in options.row]
            print(HEADER)
            for shape in shapes:
                print(line(predict(shape, dtype, options.device, dict(map(_tile, options.tile)))), flush=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
