"""Compiles every kernel for every chip without a GPU and reads off what the compiler made of it.

    python -m yojo_kernels.aot [--json FILE] [--chips 90 100] [--head-dims 64 128] [--dtypes bfloat16] [--jobs N]
    python -m yojo_kernels.aot --kernels head_forward head_backward loss
    python -m yojo_kernels.aot --record     # after a change of kernels or tiles: write this Triton's part of spills.json anew

One line per kernel, chip, dtype, head dim and set of features: registers and shared memory of a program, instructions
that spill registers to memory (all, those inside an inner loop that multiplies matrices, and those among them at every
step of it), and tensor-core instructions. The exit status is 1 when a configuration breaks a rule of `problems`.

No forward kernel spills at all, and no kernel of attention at a full step, the one that all long rows are made of: the
shortest way through the loop's body. What a border step runs besides, its mask, may spill: it is under a condition, and
few steps are at a border. `spills.json` beside this file holds, by version of Triton, all spills, which may not grow; for
a version without a record the other rules hold.
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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from yojo_kernels import attention, gluon_attention, head, launch, loss, tuning

HEAD_DIMS = (16, 32, 64, 72, 80, 96, 128, 192, 256)
HEADS = {"q": 32, "o": 32, "do": 32, "dq": 32, "k": 8, "v": 8, "dk": 8, "dv": 8}  # of each tensor of attention
INPUTS = ("q", "k", "v", "do")  # those that a model makes; all others are made by the launch
ROWS = 4097  # of tensors that strides are taken from; where heads come first, strides over heads depend on it
ATTENTION_KERNELS = ("forward", "query_grad", "key_grad", "value_grad", "sum")  # value_grad: key_grad's other launch
HEAD_KERNELS = ("head_forward", "head_backward", "head_merge", "linear_forward", "linear_backward")
GLUON_KERNELS = ("gluon_forward", "gluon_again")  # for Hopper alone, and few dtypes and head dims
KERNELS = (*ATTENTION_KERNELS, *HEAD_KERNELS, "loss", *GLUON_KERNELS)
MULTIPLYING = ("forward", "query_grad", "key_grad", "value_grad", "head_forward", "head_backward", "gluon_forward")
FEATURES = {
    "plain": {},
    "all": {"HAS_BLOCKS": True, "HAS_WINDOW": True, "HAS_SOFTCAP": True, "HAS_LSE_GRAD": True},
}
FEATURES["uncapped"] = FEATURES["all"] | {"HAS_SOFTCAP": False}  # where a soft cap has a tile of its own
FEATURES["heads_first"] = FEATURES["all"]  # and inputs in heads-first storage, whose strides over heads are arguments
HEADS_FIRST_DIMS = (72, 128, 256)  # that are compiled for heads-first storage: one more prologue, the same loops
ACTIVATIONS = ("silu", "gelu")  # the usual one, and the one with the most instructions
LOSS_KINDS = {"best": False, "soft": False, "plackett_luce": True, "bradley_terry": True}  # whether pairs are compared
DTYPE_NAMES = ("bfloat16", "float16", "float32")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FLOATS = ("lse", "dlse", "stats", "pieces")
HEAD_FLOATS = ("scores", "grad_scores", "pre", "partials", "merged")
WEIGHTS = ("weight1", "bias1", "weight2", "bias2", "grad_weight1", "grad_bias1", "grad_weight2", "grad_bias2")
RECORD = pathlib.Path(__file__).with_name("spills.json")
TABLES = ("tiles", "items", "sums", "bounds", "position", "block")


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one kernel in one configuration.

    Attributes:
        kernel, chip, dtype, head_dim, features: which one; the chip as its compute capability, 90 for sm_90; the head
            dim is 0 for kernels of the value head and the loss.
        tile: sizes of a program's tile (rows of queries and of keys for attention), warps, stages.
        registers: registers of a thread.
        spills: instructions that move a register to or from local memory.
        loop_spills: those among them inside an innermost loop that multiplies matrices.
        step_spills: those among these at every step, the shortest way through the loop's body; a border step of an
            attention kernel runs more than that.
        shared: bytes of shared memory of a program.
        narrow: loads and stores of 8 or 16 bits, where neighbours could be moved at once.
        wgmma: warp-group matrix instructions (Hopper).
        mma: all other tensor-core instructions.
        waits: waits for warp-group matrix instructions.
        waits_wanted: those that the kernel asks for. Where ptxas does not follow which registers are in use, it adds more,
            and the instructions run one at a time.
        late: exponentials in inner loops behind their last wait, which no matrix instruction of the group overlaps; where
            loads have warps of their own.
    """

    kernel: str
    chip: int
    dtype: str
    head_dim: int
    features: str
    tile: tuple[int, ...]
    registers: int
    spills: int
    loop_spills: int
    step_spills: int
    shared: int
    narrow: int
    wgmma: int
    mma: int
    waits: int = 0
    waits_wanted: int = 0
    late: int = 0

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
        if self.kernel.endswith("forward") and self.spills:
            found.append(f"the forward kernel spills ({self.spills} instructions)")
        if self.kernel in ("query_grad", "key_grad", "value_grad"):
            if self.step_spills:
                found.append(f"{self.step_spills} spill instructions at every step of an inner loop")
        elif self.loop_spills:
            found.append(f"{self.loop_spills} spill instructions inside an inner loop")
        if self.shared > tuning.SHARED_MEMORY[self.chip]:
            found.append(f"{self.shared} bytes of shared memory; the chip has {tuning.SHARED_MEMORY[self.chip]}")
        # At a head dim of 16 a step of sums made once more has one entry for each thread.
        if self.narrow and self.kernel in ATTENTION_KERNELS and self.head_dim % 8 == 0 and self.head_dim > 16:
            found.append(f"{self.narrow} loads or stores of single 16-bit values")
        if self.waits != self.waits_wanted:
            found.append(
                f"{self.waits} waits for matrix instructions instead of {self.waits_wanted}: ptxas serialised them"
            )
        if self.late:
            found.append(f"{self.late} exponentials of the inner loops wait for the products they should overlap")
        multiplies = self.kernel in MULTIPLYING
        if multiplies and self.dtype == "float16" and self.kernel in HEAD_KERNELS:
            multiplies = False  # computed in float32
        if multiplies and self.dtype != "float32":
            if self.chip == 90 and not self.wgmma and self.kernel in (*ATTENTION_KERNELS, "gluon_forward"):
                found.append("no wgmma instruction")
            if not self.wgmma + self.mma:
                found.append("no tensor-core instruction")
        return found

    def __str__(self):
        return (
            f"{self.kernel:<15} sm_{self.chip:<4}{self.dtype:<9} {self.head_dim:>4} {self.features:<16}"
            f"{'x'.join(map(str, self.tile[:-2])):>10} {self.tile[-2]:>5} {self.tile[-1]:>6} {self.registers:>5} "
            f"{self.spills:>6} {self.loop_spills:>7} {self.step_spills:>6} {self.shared / 1024:>6.0f}K {self.wgmma:>5} {self.mma:>5}"
        )


HEADER = "kernel          chip   dtype     head features              tile warps stages  regs spills in loop always shared wgmma   mma"


def compile_kernel(kernel, chip, dtype, head_dim=0, features="plain", tile=None):
    """Compile one kernel as it would be launched.

    Args:
        kernel: one of `KERNELS`.
        chip: compute capability, 80, 90, 100 or 120.
        dtype: bfloat16, float16 or float32; of the hidden states for the value head, whose weights are float32.
        head_dim: 1 to 256 for attention; else 0.
        features: for attention "plain", "all" for blocks, window, soft cap and a gradient of the log-sum-exp,
            "uncapped" for these without the soft cap, or "heads_first" for all and inputs in heads-first storage; for
            the value head and the loss one of `features_of(kernel)`.
        tile: `tuning.Tile` or `tuning.HeadTile` to try instead of the one of the tables.

    Returns:
        `Report`.
    """
    compiled, tile = build(kernel, chip, dtype, head_dim, features, tile)
    return _report(compiled, kernel, chip, dtype, head_dim, features, tile)


def build(kernel, chip, dtype, head_dim=0, features="plain", tile=None):
    """What `compile_kernel` reports on: (Triton's compiled kernel, sizes of its tile with warps and stages)."""
    if launch.INTERPRETED:
        raise RuntimeError("kernels are interpreted (TRITON_INTERPRET=1) and cannot be compiled: unset it")
    if kernel in GLUON_KERNELS:
        module, (constants, sizes) = gluon_attention.gluon_forward, _gluon_launch(kernel, chip, dtype, head_dim, features, tile)  # fmt: skip
        pointers = _gluon_pointer(constants)
    elif kernel in HEAD_KERNELS:
        module, (constants, sizes), pointers = head, _head_launch(kernel, dtype, features, tile), _head_pointer
    elif kernel == "loss":
        module, (constants, sizes), pointers = loss, _loss_launch(features), _loss_pointer(features)
    else:
        module, (constants, sizes) = attention, _attention_launch(kernel, chip, dtype, head_dim, features, tile)
        pointers = _attention_pointer
    num_warps, num_stages = constants.pop("num_warps"), constants.pop("num_stages", constants.get("STAGES", 3))
    function = getattr(module, "key_grad_kernel" if kernel == "value_grad" else f"{kernel}_kernel")
    signature, constexprs, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], constexprs[index,] = "constexpr", constants[name]
            continue
        if name in ("scale", "softcap"):
            signature[name] = "fp32"
        elif name.startswith(("stride_", "num_")) or name in ("group", "window", "zero", "H", "K"):
            signature[name] = "i32"
        else:
            signature[name] = pointers(name, dtype)
        # Tensors as models hand them over: aligned to 16 bytes, sizes and strides of the value head multiples of 16.
        aligned = name.startswith(("stride_hidden", "stride_weight", "stride_dlse"))
        if signature[name].startswith("*") or aligned or name in ("H", "K"):
            attributes[index,] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        _source(kernel)(function, signature, constexprs, attributes),
        target=GPUTarget("cuda", chip, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    return compiled, (*sizes, num_warps, num_stages)


def _report(compiled, kernel, chip, dtype, head_dim, features, tile):
    usage, code = disassemble(compiled.asm["cubin"])
    registers = re.search(r"Function [^:]+:\s+REG:(\d+)", usage)
    instructions = instructions_of(code)
    loops = [body for body in _inner_loops(instructions) if any(MATRIX.search(line) for line in body)]
    return Report(
        kernel=kernel,
        chip=chip,
        dtype=str(dtype).removeprefix("torch."),
        head_dim=head_dim,
        features=features,
        tile=tile,
        registers=int(registers.group(1)),
        spills=sum(map(_is_spill, instructions)),
        loop_spills=sum(_is_spill(line) for body in loops for line in body),
        step_spills=sum(_is_spill(line) for body in loops for line in _full_step(body)),
        shared=compiled.metadata.shared,
        narrow=sum(bool(re.search(r"\b(LDG|STG)\S*\.[US](8|16)\b", line)) for line in instructions),
        wgmma=sum(bool(re.search(r"\b[A-Z]*GMMA\b", line)) for line in instructions),
        mma=sum(bool(re.search(r"\b(HMMA|UTC\w*MMA|QMMA)\b", line)) for line in instructions),
        waits=sum("WARPGROUP.DEPBAR" in line for line in instructions),
        waits_wanted=compiled.asm["ptx"].count("wgmma.wait_group"),
        late=sum(map(_late_exponentials, loops)) if kernel == "gluon_forward" else 0,
    )


def _tile(kernel, head_dim, dtype, chip, capped):
    by_keys = kernel in ("key_grad", "value_grad", "sum")
    return tuning.tile("key_grad" if by_keys else kernel, head_dim, dtype, chip, capped)


def _source(kernel):
    if kernel != "gluon_forward":
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource  # not in every Triton

    return GluonASTSource


def _attention_launch(kernel, chip, dtype, head_dim, features, tile):
    """(what a kernel is compiled for, sizes of its tile)."""
    tile = tile or _tile(kernel, head_dim, dtype, chip, FEATURES[features].get("HAS_SOFTCAP", False))
    constants = attention.constants(head_dim, tile)
    if kernel in ("key_grad", "value_grad", "sum"):
        first, *rest = attention.key_passes(dtype, head_dim)
        constants |= first if kernel == "value_grad" or not rest else rest[0]
    if kernel == "sum":
        constants |= attention.sum_constants(head_dim, tile)
    constants["PACK"] = tuning.packed_heads(HEADS["q"] // HEADS["k"], tile.block_m)
    constants |= {"HAS_LSE_GRAD": False, "RELOAD": attention.reloads(dtype, head_dim), **FEATURES[features]}
    return constants | _constant_strides(head_dim, features), (tile.block_m, tile.block_n)


def _constant_strides(head_dim, features):
    """Strides that are constants where 32 query heads share 8 key heads, and the unit of all strides."""
    constants, unit = {}, launch.LARGEST_UNIT
    for name, heads in HEADS.items():
        tensor = torch.empty((ROWS, heads, head_dim), device="meta")
        if features == "heads_first" and name in INPUTS:
            tensor = torch.empty((heads, ROWS, head_dim), device="meta").transpose(0, 1)
        strides, of_tensor = launch.strides(tensor)
        unit = min(unit, of_tensor)
        for stride, axis in zip(strides, "th", strict=True):
            if isinstance(stride, tl.constexpr):
                constants[f"stride_{name}{axis}"] = stride.value
    return constants | {"UNIT": unit}


def _attention_pointer(name, dtype):
    return "*i32" if name in TABLES else "*fp32" if name in FLOATS else POINTERS[dtype]


def _gluon_launch(kernel, chip, dtype, head_dim, features, tile):
    tile = tile or tuning.tile("gluon_forward", head_dim, dtype, chip)
    of_kernel = gluon_attention.constants if kernel == "gluon_forward" else gluon_attention.constants_again
    constants = of_kernel(head_dim, tile)
    constants |= {name: value for name, value in FEATURES[features].items() if name in constants}
    if kernel == "gluon_again":
        constants |= _constant_strides(head_dim, features)
    return constants, tile[:2]


def _gluon_pointer(constants):
    """Descriptors are types of their own: those of queries copy the rows of a warp group, all others those of a step."""

    def pointer(name, dtype):
        if not name.endswith("_desc"):
            return _attention_pointer(name, dtype)
        rows = gluon_attention.gluon_forward.GROUP_M.value if name == "q_desc" else constants["BLOCK_N"]
        layout = gluon_attention.shared_layout(dtype)
        return f"tensordesc<{POINTERS[dtype][1:]}[1, {rows}, {constants['HEAD_DIM']}],{layout!r}>"

    return pointer


def _head_launch(kernel, dtype, features, tile):
    *activation, readings = features.split("-")
    in_weight, in_gradient = head.terms(dtype, torch.float32)
    on_tensor_cores = kernel in ("head_forward", "head_backward") and in_weight > 0
    tile = tile or tuning.bucket(tuning.HEAD_TILES[kernel, on_tensor_cores], int(readings))
    constants = head.constants(tile, activation[0] if activation else None) | {
        "HAS_BIAS1": True,
        "HAS_BIAS2": True,
        "SAVE": True,
        "TERMS": in_weight if kernel == "head_forward" else in_gradient,
        "PRECISION": head.precision(dtype),
        "FILL": head.FILL,
    }
    return constants, tile[:3]


def _head_pointer(name, dtype):
    if name in HEAD_FLOATS or name in WEIGHTS:
        return "*fp32"
    return {"rows": "*i64", "arrived": "*i32"}.get(name, POINTERS[dtype])


def _loss_launch(features):
    kind, size = features.split("-")
    block, num_warps = tuning.LOSS_BLOCKS[LOSS_KINDS[kind]][int(size)]
    constants = {"KIND": kind, "REDUCTION": "mean", "BLOCK": block, "SUM_BLOCK": loss.SUM_BLOCK}
    return constants | {"num_warps": num_warps, "num_stages": 1}, (block, block)


def _loss_pointer(features):
    targets = "*fp32" if features.startswith("soft") else "*i64"
    types = {"rankings": targets, "offsets": "*i32", "arrived": "*i32"}
    return lambda name, dtype: types.get(name, POINTERS[dtype])


def recorded_spills():
    """Spills that `spills.json` records for the installed Triton, by configuration; None where it has no record of it."""
    return json.loads(RECORD.read_text()).get(triton.__version__)


MATRIX = re.compile(r"\b(\w*MMA|FFMA\w*)\b")  # float32 multiplies matrices with plain multiply-adds


def _is_spill(line):
    return bool(re.search(r"\b(STL|LDL)\b", line))


def disassemble(cubin):
    """(resource usage, SASS) of a cubin, from the tools inside Triton's package."""
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )


def instructions_of(code):
    """Lines of SASS that are labels or instructions."""
    return [line.strip() for line in code.splitlines() if re.match(r"\s*(/\*[0-9a-f]{4,}\*/|\.L_\w+:)", line)]


def _inner_loops(instructions):
    """Bodies of the innermost loops: what lies between a label and a branch back to it, holding no such pair."""
    labels = {line[:-1]: i for i, line in enumerate(instructions) if line.startswith(".L_")}
    loops = []
    for end, line in enumerate(instructions):
        target = BRANCH.search(line)
        if target and labels.get(target.group(1), end) < end:
            loops.append((labels[target.group(1)], end))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [instructions[start : end + 1] for start, end in inner]


BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
ALWAYS = re.compile(r"/\*\w+\*/\s+(BRA\s+`|EXIT|RET|NANOSLEEP)")  # without a predicate


def _full_step(body):
    """What a loop's body runs at least: its shortest way from the label to the branch back.

    A border step does all that a full step does, and what the full step branches over: its mask. So the shortest way
    is a full step; where there is none (code that lies elsewhere), all of the body is.
    """
    labels = {line[:-1]: i for i, line in enumerate(body) if line.startswith(".L_")}
    count, before = {0: 0}, {}
    for i, line in enumerate(body[:-1]):
        if i not in count:
            continue
        branch = BRANCH.search(line)
        following = [labels[branch.group(1)]] if branch and labels.get(branch.group(1), 0) > i else []
        if not ALWAYS.match(line):
            following.append(i + 1)
        for j in following:
            if count[i] + 1 < count.get(j, len(body) + 1):
                count[j], before[j] = count[i] + 1, i
    at, way = len(body) - 1, []
    if at not in count:
        return body
    while at:
        way.append(body[at])
        at = before[at]
    return [line for line in way[::-1] if not line.startswith(".L_")]


def _late_exponentials(loop):
    """Exponentials of a loop behind its last wait for matrix instructions."""
    last = max((i for i, line in enumerate(loop) if "WARPGROUP.DEPBAR" in line), default=0)
    return sum("MUFU.EX2" in line for line in loop[last:])


def features_of(kernel):
    """The sets of features that a kernel is compiled for: names."""
    if kernel == "sum":
        return ("plain",)
    if kernel in GLUON_KERNELS:
        return ("plain", "all")
    if kernel in ATTENTION_KERNELS:
        return tuple(FEATURES)
    if kernel == "loss":
        return tuple(f"{kind}-{size}" for kind, pairs in LOSS_KINDS.items() for size in tuning.LOSS_BLOCKS[pairs])
    sizes = dict.fromkeys(size for (name, _), tiles in tuning.HEAD_TILES.items() if name == kernel for size in tiles)
    if kernel in ("head_forward", "head_backward"):
        return tuple(f"{activation}-{size}" for activation in ACTIVATIONS for size in sizes)
    return tuple(map(str, sizes))


def configurations(chips=tuning.CHIPS, dtypes=launch.DTYPES, head_dims=HEAD_DIMS, kernels=KERNELS, features=None):
    """Arguments of `compile_kernel` for all that can be launched, once each; features chooses some by their names."""
    return [
        (kernel, chip, dtype, head_dim, feature)
        for kernel in kernels
        for chip in chips
        for dtype in dtypes
        if kernel != "loss" or dtype == torch.float32  # scores are float32
        for head_dim in (head_dims if kernel in (*ATTENTION_KERNELS, *GLUON_KERNELS) else (0,))
        if kernel not in GLUON_KERNELS or (chip == 90 and gluon_attention.obstacle_in(dtype, head_dim) is None)
        for feature in features_of(kernel)
        if feature != "heads_first" or head_dim in HEADS_FIRST_DIMS
        if kernel != "value_grad" or len(attention.key_passes(dtype, head_dim)) > 1
        if feature != "uncapped" or len({_tile(kernel, head_dim, dtype, chip, capped) for capped in (False, True)}) > 1
        if features is None or feature in features or feature == "plain" == features_of(kernel)[0]
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
    parser.add_argument("--features", nargs="+", help="only these sets of features, such as plain or silu-16")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--record", action="store_true", help="write this Triton's record; needs all configurations")
    options = parser.parse_args(argv)
    chosen = (options.chips, options.head_dims, options.dtypes, options.kernels, options.features)
    everything = (tuning.CHIPS, HEAD_DIMS, tuple(DTYPE_NAMES), KERNELS, None)
    if options.record and tuple(map(tuple, chosen[:-1])) + chosen[-1:] != everything:
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
        records = json.loads(RECORD.read_text()) | {triton.__version__: spills}
        RECORD.write_text(json.dumps(records, indent=1) + "\n")
        for version in records.keys() - {triton.__version__}:
            print(f"the record of Triton {version} is left as it was: run this with that version, too")
    elif recorded is None:
        print(f"{RECORD.name} has no record of Triton {triton.__version__}: whether spills grew is not checked")
    print(f"{len(work)} configurations with Triton {triton.__version__}, {broken} with problems")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
