"""What one step of an attention kernel asks of a Hopper multiprocessor, read off its machine code.

A kernel is compiled as it would be launched (`yojo_kernels.aot`), no GPU is needed. The innermost loops with warp-group
matrix instructions (HGMMA) are its steps: a way through the loop without the mask is a full step, the longest way a
border step, whether they share one loop or have one each.
"""

import dataclasses
import re

from yojo_kernels import aot

SMEM_BYTES = 128  # a clock and multiprocessor
MUFU_LANES = 16  # a clock and multiprocessor
SCHEDULERS = 4  # warp instructions a clock and multiprocessor
WARP = 32  # lanes
REGISTERS, SHARED, THREADS = 2**16, 228 * 1024, 2048  # of a multiprocessor
RESERVED = 1024  # bytes of shared memory that the system takes of each program

HGMMA = re.compile(r"\bHGMMA\.64x(\d+)x16\.\S+ R\d+, (gdesc|R\d+)")  # 16-bit operands, A in shared memory or registers
MUFU = re.compile(r"\bMUFU\b")
WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\.LE gsb\d+, 0x0\b")  # until no product is left
COPY = re.compile(r"\bLDGSTS(\.\S+)?")  # asynchronous, from global to shared memory
CONVERT = re.compile(r"\b(STS|STSM|LDSM)(\.\S+)?")
OFF = re.compile(r"/\s+@!U?PT\s")  # an instruction that never does anything


@dataclasses.dataclass(frozen=True)
class Step:
    """Clocks of one multiprocessor that a full step of one program takes, by what they are spent on.

    Attributes:
        tensor: matrix products.
        shared: shared memory: operands of the products, and rows copied for a later step.
        mufu: exponentials.
        issue: instructions.
        apart: what stands between one product and the next that waits for it, exponentials or instructions, whichever
            take longer.
        waits: how often all products are waited for.
        border: instructions that a border step has more.
        loops: 2 where full and border steps have a loop each, 1 where they share one.
        registers: of a thread.
        resident: programs that a multiprocessor has room for.
    """

    tensor: float
    shared: float
    mufu: float
    issue: float
    apart: float
    waits: int
    border: float
    loops: int
    registers: int
    resident: int

    @property
    def bound(self):
        """Clocks that no overlap can save."""
        return max(self.tensor, self.shared, self.mufu, self.issue)


def compiled(kernel, dtype, head_dim, tile=None):
    """`Step` of a kernel in a configuration, compiled for sm_90; arguments as those of `aot.compile_kernel`."""
    built, (*_, num_warps, _) = aot.build(kernel, 90, dtype, head_dim, tile=tile)
    usage, code = aot.disassemble(built.asm["cubin"])
    registers = int(re.search(r"\bREG:(\d+)", usage).group(1))
    return step_of(aot.instructions_of(code), num_warps, registers, built.metadata.shared)


def step_of(instructions, num_warps, registers, shared):
    """`Step` from lines of machine code (`aot.instructions_of`).

    Args:
        instructions: labels and instructions, in order.
        num_warps: of a program.
        registers: of a thread.
        shared: bytes of shared memory of a program.

    Raises:
        ValueError: there is no loop with warp-group matrix instructions, or more than two, or rows come by a way whose
            bytes cannot be seen.
    """
    if any("UTMALDG" in line for line in instructions):
        raise ValueError("rows are copied by the tensor memory accelerator, whose bytes the machine code does not show")
    ways = [way for loop in loops_of(instructions) for way in (shortest(loop), longest(loop))]
    if not 2 <= len(ways) <= 4:
        raise ValueError(f"{len(ways) // 2} innermost loops with HGMMA, 1 or 2 are steps of an attention kernel")
    full, border = min(ways, key=len), max(ways, key=len)
    warps_each = num_warps / SCHEDULERS
    apart, waits = _apart(full, num_warps)
    return Step(
        tensor=sum(int(n) / 2 for n, _ in _products(full)) * num_warps / 4,
        shared=_shared(full, num_warps),
        mufu=_mufu(full, num_warps),
        issue=len(full) * warps_each,
        apart=apart,
        waits=waits,
        border=(len(border) - len(full)) * warps_each,
        loops=len(ways) // 2,
        registers=registers,
        resident=_resident(num_warps, registers, shared),
    )


def _products(instructions):
    return [found.groups() for line in instructions if (found := HGMMA.search(line))]


def _mufu(instructions, num_warps):
    return sum(bool(MUFU.search(line)) for line in instructions) * num_warps * WARP / MUFU_LANES


def _shared(instructions, num_warps):
    """Clocks of shared memory: A (64 x 16) where it lies there, B (N x 16), and what is copied or converted."""
    operands = sum((64 * 16 * 2 * (a == "gdesc") + int(n) * 16 * 2) * num_warps / 4 for n, a in _products(instructions))
    moved = sum(
        _width(found.group()) * WARP * num_warps
        for line in instructions
        if (found := COPY.search(line) or CONVERT.search(line)) and not OFF.search(line)
    )
    return (operands + moved) / SMEM_BYTES


def _width(name):
    """Bytes of a lane; matrices of STSM and LDSM are 8 x 8 of 2 bytes, 4 bytes of each lane."""
    if "SM." in name:
        return 4 * int(name.rpartition(".")[2] if name.rpartition(".")[2] in ("2", "4") else 1)
    found = re.search(r"\.(64|128)\b", name)
    return int(found.group(1)) // 8 if found else 4


def _apart(instructions, num_warps):
    """(clocks in which the tensor cores have nothing to do, waits): what follows a wait, up to the next product.

    Products are issued in order, so exponentials that stand among those of a product count as well.
    """
    first = next(i for i, line in enumerate(instructions) if HGMMA.search(line))
    total, waits, phase = 0.0, 0, None
    for line in (*instructions[first:], *instructions[: first + 1]):
        if WAIT.search(line):
            waits, phase = waits + 1, []
        elif phase is None:
            total += _mufu([line], num_warps)
        elif HGMMA.search(line):
            total += max(_mufu(phase, num_warps), len(phase) * num_warps / SCHEDULERS)
            phase = None
        else:
            phase.append(line)
    return total, waits


def _resident(num_warps, registers, shared):
    """How many programs fit on a multiprocessor; registers are given out to warps in units of 256."""
    of_warp = (registers * WARP + 255) // 256 * 256
    return max(1, min(REGISTERS // (of_warp * num_warps), SHARED // (shared + RESERVED), THREADS // (num_warps * WARP)))


# ---- loops ----


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop.

    Attributes:
        header: the block it is entered by.
        after: {block of the loop: blocks of the loop that may follow; the header is in none of them}.
        ends: blocks that may be followed by the header.
        lines: {block: its instructions}.
    """

    header: int
    after: dict
    ends: set
    lines: dict


def shortest(loop):
    """The instructions of the shortest way through a loop, of those with the most products."""
    return _way(loop, -1)


def longest(loop):
    """The instructions of the longest way through a loop, of those with the most products."""
    return _way(loop, 1)


def _way(loop, sign):
    best = {}  # block -> (products, sign * instructions, way) from it to the end

    def from_(block):
        if block not in best:
            lines = loop.lines[block]
            own = len(_products(lines)), sign * len(lines)
            found = [(0, 0, ())] if block in loop.ends else []
            found += [way for following in loop.after[block] if (way := from_(following)) is not None]
            chosen = max(found, key=lambda way: way[:2], default=None)
            best[block] = chosen and (own[0] + chosen[0], own[1] + chosen[1], (block, *chosen[2]))
        return best[block]

    return [line for block in from_(loop.header)[2] for line in loop.lines[block]]


def loops_of(instructions):
    """The innermost loops that hold HGMMA, in order: `Loop`s."""
    blocks, after = _blocks(instructions)
    dominators = _dominators(after)
    before = {block: [other for other in after if block in after[other]] for block in after}
    bodies = {}
    for end in dominators:
        for header in after[end]:
            if header not in dominators[end]:
                continue
            body, waiting = bodies.setdefault(header, {header}), [end]
            while waiting:
                block = waiting.pop()
                if block not in body:
                    body.add(block)
                    waiting += [other for other in before[block] if other in dominators]
    multiplying = {header: body for header, body in bodies.items() if any(_products(blocks[b]) for b in body)}
    return [
        Loop(
            header,
            {block: [to for to in after[block] if to in body and to != header] for block in body},
            {block for block in body if header in after[block]},
            {block: blocks[block] for block in body},
        )
        for header, body in sorted(multiplying.items())
        if not any(other != header and other in body for other in multiplying)
    ]


def _blocks(instructions):
    """({number: instructions}, {number: numbers of those that may follow}) of the stretches without a branch."""
    starts, labels, index = [0], {}, 0
    lines = []
    for line in instructions:
        if line.startswith(".L_"):
            labels[line.rstrip(":")] = index
            starts.append(index)
            continue
        lines.append(line)
        index += 1
        if re.search(r"\b(BRA|EXIT|RET|BRX)\b", line):
            starts.append(index)
    starts = sorted(start for start in set(starts) if start < len(lines))
    number = {start: i for i, start in enumerate(starts)}
    blocks = {i: lines[a:b] for i, (a, b) in enumerate(zip(starts, [*starts[1:], len(lines)], strict=True))}
    after = {}
    for i, block in blocks.items():
        target = re.search(r"\bBRA\b(.*?)`\((\.L_\w+)\)", block[-1])
        always = not re.search(r"/\s+@", block[-1])
        ends = re.search(r"\b(EXIT|RET|BRX)\b", block[-1]) or (target and not re.search(r"\w", target.group(1)))
        after[i] = {i + 1} if i + 1 in blocks and not (always and ends) else set()
        if target and labels.get(target.group(2), len(lines)) < len(lines):
            after[i].add(number[labels[target.group(2)]])
    return blocks, after


def _dominators(after):
    """{block: blocks that every way from the first to it goes through}, of the blocks that can be reached."""
    reached, waiting = {0}, [0]
    while waiting:
        new = after[waiting.pop()] - reached
        reached |= new
        waiting += new
    before = {block: [other for other in reached if block in after[other]] for block in reached}
    dominators = {block: {0} if block == 0 else set(reached) for block in reached}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = set.intersection(*(dominators[other] for other in before[block])) | {block}
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators
