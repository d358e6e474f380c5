"""Compiles every attention kernel for every chip without a GPU and reads off what the compiler made of it.

    python -m yojo_kernels.aot [--json FILE] [--chips 90 100] [--head-dims 64 128] [--dtypes bfloat16] [--jobs N]
    python -m yojo_kernels.aot --record     # after a change of kernels or tiles: write spills.json anew

One line per kernel, chip, dtype, head dim and set of features: registers and shared memory of a program, instructions
that spill registers to memory (all, and those inside an inner loop that multiplies matrices, where they cost time at
every step), and tensor-core instructions. The exit status is 1 when a configuration breaks a rule of `problems`.

`spills.json` beside this file holds the spills outside inner loops, which cost little but may not grow.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from yojo_kernels import attention, tuning

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
KERNELS = ("forward", "query_grad", "key_grad", "sum")
FEATURES = {
    "plain": {},
    "all": {"HAS_BLOCKS": True, "HAS_WINDOW": True, "HAS_SOFTCAP": True, "HAS_LSE_GRAD": True},
}
DTYPE_NAMES = ("bfloat16", "float16", "float32")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FLOATS = ("lse", "dlse", "stats", "pieces")
RECORD = pathlib.Path(__file__).with_name("spills.json")
TABLES = ("tiles", "items", "sums", "bounds", "position", "block")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel in one configuration.

    Attributes:
        kernel, chip, dtype, head_dim, features: which one; the chip as its compute capability, 90 for sm_90.
        tile: rows of queries, rows of keys, warps, stages.
        registers: registers of a thread.
        spills: instructions that move a register to or from local memory.
        loop_spills: those among them inside an innermost loop that multiplies matrices.
        shared: bytes of shared memory of a program.
        wgmma: warp-group matrix instructions (Hopper); mma: all other tensor-core instructions.
    """

    kernel: str
    chip: int
    dtype: str
    head_dim: int
    features: str
    tile: tuple[int, int, int, int]
    registers: int
    spills: int
    loop_spills: int
    shared: int
    wgmma: int
    mma: int

    @property
    def name(self):
        """Which configuration this is, as `spills.json` names it."""
        return f"{self.kernel} sm_{self.chip} {self.dtype} {self.head_dim} {self.features}"

    def problems(self, recorded=None):
        """What must not be, as a list of sentences; empty when all is well.

        Args:
            recorded: dict, spills of each configuration (by `name`; none where it is not in there) that must not be
                exceeded; None to allow any.
        """
        found = []
        if recorded is not None and self.spills > recorded.get(self.name, 0):
            found.append(f"{self.spills} spill instructions, {recorded.get(self.name, 0)} are recorded")
        if self.kernel == "forward" and self.spills:
            found.append(f"the forward kernel spills ({self.spills} instructions)")
        if self.loop_spills:
            found.append(f"{self.loop_spills} spill instructions inside an inner loop")
        if self.shared > tuning.SHARED_MEMORY[self.chip]:
            found.append(f"{self.shared} bytes of shared memory; the chip has {tuning.SHARED_MEMORY[self.chip]}")
        if self.kernel != "sum" and self.dtype != "float32":
            if self.chip == 90 and not self.wgmma:
                found.append("no wgmma instruction")
            if not self.wgmma + self.mma:
                found.append("no tensor-core instruction")
        return found

    def __str__(self):
        return (
            f"{self.kernel:<10} sm_{self.chip:<4}{self.dtype:<9} {self.head_dim:>4} {self.features:<6}"
            f"{'x'.join(map(str, self.tile[:2])):>8} {self.tile[2]:>5} {self.tile[3]:>6} {self.registers:>5} "
            f"{self.spills:>6} {self.loop_spills:>7} {self.shared / 1024:>6.0f}K {self.wgmma:>5} {self.mma:>5}"
        )


HEADER = "kernel     chip   dtype     head feat.     tile warps stages  regs spills in loop shared wgmma   mma"


def compile_kernel(kernel, chip, dtype, head_dim, features="plain", tile=None):
    """Compile one kernel as it would be launched.

    Args:
        kernel: "forward", "query_grad", "key_grad" or "sum".
        chip: compute capability, 80, 90, 100 or 120.
        dtype: bfloat16, float16 or float32.
        head_dim: 1 to 256.
        features: "plain", or "all" for blocks, window, soft cap and a gradient of the log-sum-exp.
        tile: `tuning.Tile` to try instead of the one of the tables.

    Returns:
        `Report`.
    """
    if attention.INTERPRETED:
        raise RuntimeError("kernels are interpreted (TRITON_INTERPRET=1) and cannot be compiled: unset it")
    tile = tile or tuning.tile("key_grad" if kernel == "sum" else kernel, head_dim, dtype, chip)
    launch = attention.constants(head_dim, tile)
    num_warps, num_stages = launch.pop("num_warps"), launch.pop("num_stages")
    if kernel == "sum":
        num_warps = attention.SUM_WARPS
    constants = {**launch, "HAS_LSE_GRAD": False, "RELOAD": attention.reloads(dtype, head_dim), **FEATURES[features]}
    function = getattr(attention, f"{kernel}_kernel")
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], constexprs[index,] = "constexpr", constants[name]
            continue
        if name in TABLES:
            signature[name] = "*i32"
        elif name in FLOATS:
            signature[name] = "*fp32"
        elif name in ("scale", "softcap"):
            signature[name] = "fp32"
        elif name.startswith(("stride_", "num_")) or name in ("group", "window", "zero"):
            signature[name] = "i32"
        else:
            signature[name] = POINTERS[dtype]
        # Tensors as models hand them over: aligned to 16 bytes, strides multiples of 16 entries.
        if signature[name].startswith("*") or name.startswith("stride_"):
            attributes[index,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(function, signature, constexprs, attributes),
        target=GPUTarget("cuda", chip, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    usage, code = _disassemble(compiled.asm["cubin"])
    registers = re.search(r"Function [^:]+:\s+REG:(\d+)", usage)
    instructions = _instructions(code)
    loops = [body for body in _inner_loops(instructions) if any(MATRIX.search(line) for line in body)]
    return Report(
        kernel=kernel,
        chip=chip,
        dtype=str(dtype).removeprefix("torch."),
        head_dim=head_dim,
        features=features,
        tile=(tile.block_m, tile.block_n, num_warps, num_stages),
        registers=int(registers.group(1)),
        spills=sum(map(_is_spill, instructions)),
        loop_spills=sum(_is_spill(line) for body in loops for line in body),
        shared=compiled.metadata.shared,
        wgmma=sum(bool(re.search(r"\b[A-Z]*GMMA\b", line)) for line in instructions),
        mma=sum(bool(re.search(r"\b(HMMA|UTC\w*MMA|QMMA)\b", line)) for line in instructions),
    )


def recorded_spills():
    """Spills that `spills.json` records, by configuration; None where it was written with another Triton."""
    record = json.loads(RECORD.read_text())
    return record["spills"] if record["triton"] == triton.__version__ else None


MATRIX = re.compile(r"\b(\w*MMA|FFMA\w*)\b")  # float32 multiplies matrices with plain multiply-adds


def _is_spill(line):
    return bool(re.search(r"\b(STL|LDL)\b", line))


def _disassemble(cubin):
    """(resource usage, SASS) of a cubin, from the tools inside Triton's package."""
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )


def _instructions(code):
    """Lines of SASS that are labels or instructions."""
    return [line.strip() for line in code.splitlines() if re.match(r"\s*(/\*[0-9a-f]{4,}\*/|\.L_\w+:)", line)]


def _inner_loops(instructions):
    """Bodies of the innermost loops: what lies between a label and a branch back to it, holding no such pair."""
    labels = {line[:-1]: i for i, line in enumerate(instructions) if line.startswith(".L_")}
    loops = []
    for end, line in enumerate(instructions):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        if target and labels.get(target.group(1), end) < end:
            loops.append((labels[target.group(1)], end))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [instructions[start : end + 1] for start, end in inner]


def configurations(
    chips=tuning.CHIPS, dtypes=attention.DTYPES, head_dims=HEAD_DIMS, kernels=KERNELS, features=tuple(FEATURES)
):
    """Arguments of `compile_kernel` for all that can be launched, once each."""
    return [
        (kernel, chip, dtype, head_dim, feature)
        for kernel in kernels
        for chip in chips
        for dtype in dtypes
        for head_dim in head_dims
        for feature in (features if kernel != "sum" else ("plain",))
    ]


def _compile(arguments):
    return compile_kernel(*arguments)


def main(argv=None):
    """Print the table of all configurations; with --json also write it, one object per line."""
    parser = argparse.ArgumentParser(prog="python -m yojo_kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="also write the table as JSON lines")
    parser.add_argument("--chips", type=int, nargs="+", default=tuning.CHIPS, choices=tuning.CHIPS)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPE_NAMES, choices=DTYPE_NAMES)
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--features", nargs="+", default=tuple(FEATURES), choices=tuple(FEATURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--record", action="store_true", help="write spills.json anew; needs all configurations")
    options = parser.parse_args(argv)
    chosen = (options.chips, options.head_dims, options.dtypes, options.kernels, options.features)
    everything = (tuning.CHIPS, HEAD_DIMS, tuple(DTYPE_NAMES), KERNELS, tuple(FEATURES))
    if options.record and tuple(map(tuple, chosen)) != everything:
        parser.error("--record needs all configurations: leave out the options that choose some")
    recorded = None if options.record else recorded_spills()
    dtypes = [getattr(torch, name) for name in options.dtypes]
    work = configurations(options.chips, dtypes, options.head_dims, options.kernels, options.features)
    broken, lines, spills = 0, [], {}
    print(HEADER)
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        for report in pool.map(_compile, work):
            problems = report.problems(recorded)
            if report.spills:
                spills[report.name] = report.spills
            broken += bool(problems)
            print(report, *(f"  <- {problem}" for problem in problems), flush=True)
            lines.append(json.dumps({**dataclasses.asdict(report), "triton": triton.__version__}))
    if options.json:
        pathlib.Path(options.json).write_text("".join(line + "\n" for line in lines))
    if options.record:
        RECORD.write_text(json.dumps({"triton": triton.__version__, "spills": spills}, indent=1) + "\n")
    elif recorded is None:
        print(f"{RECORD.name} was written with another Triton: whether spills grew is not checked")
    print(f"{len(work)} configurations with Triton {triton.__version__}, {broken} with problems")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
