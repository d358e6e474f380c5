"""Tile shapes, warps and pipeline stages of the kernels, per head dim, dtype and chip, each with where it comes from."""

import contextlib
import functools
import typing

import torch


class Tile(typing.NamedTuple):
    """How one kernel is launched: rows of queries, rows of keys, warps of a program, stages of its pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


CHIPS = (80, 90, 100, 120)  # compute capabilities that have tables
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a program may have
PIECES_PER_PROCESSOR = 4  # the queries of the prompt's keys are split until a piece is a quarter of a processor's share
MOST_PACKED = 8  # heads of a group in one tile of the forward
INTERPRETER = Tile(16, 16, 1, 1)  # the smallest tiles: many of them even in the short rows an interpreter can take

# (kernel, bits of the dtype, chip) -> {largest padded head dim: tile}. None of these has been timed yet. They are the
# largest tiles, starting from those FlexAttention uses on Hopper (forward 128x64, backward 64x128), that the compiler
# fits into registers without spilling in a loop; `python -m yojo_kernels.aot` shows it for each. To head dim 64 on sm_90
# all have small ones, several programs to a processor: products of one run beside the exponentials of another.
TILES = {
    ("forward", 16, 80): {64: Tile(128, 32, 4, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 64, 8, 2)},
    ("forward", 16, 90): {64: Tile(64, 64, 4, 3), 128: Tile(128, 128, 8, 3), 256: Tile(128, 64, 8, 2)},
    ("forward", 16, 100): {64: Tile(128, 128, 8, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 64, 8, 2)},
    ("forward", 16, 120): {64: Tile(128, 64, 4, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("query_grad", 16, 80): {64: Tile(128, 64, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    ("query_grad", 16, 90): {64: Tile(128, 64, 4, 2), 128: Tile(128, 128, 8, 2), 256: Tile(128, 32, 8, 2)},
    ("query_grad", 16, 100): {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 32, 8, 2)},
    ("query_grad", 16, 120): {64: Tile(128, 32, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 4, 1)},
    ("key_grad", 16, 80): {256: Tile(32, 64, 8, 2)},
    ("key_grad", 16, 90): {64: Tile(64, 64, 4, 2), 128: Tile(64, 128, 8, 2), 256: Tile(32, 128, 8, 2)},
    ("key_grad", 16, 100): {128: Tile(64, 128, 8, 2), 256: Tile(32, 128, 8, 2)},
    ("key_grad", 16, 120): {128: Tile(32, 64, 8, 2), 256: Tile(16, 64, 8, 2)},
    # Gluon's, for Hopper alone: two warp groups of 64 queries, and a warp that loads `num_stages` steps ahead. The warps
    # are those of one group.
    ("gluon_forward", 16, 90): {64: Tile(128, 128, 4, 3), 128: Tile(128, 128, 4, 2)},
    # float32 multiplies without tensor cores, exactly: small tiles, or the products alone would fill the registers.
    **{("forward", 32, chip): {32: Tile(32, 16, 8, 1), 64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)} for chip in CHIPS},
    **{("query_grad", 32, chip): {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)} for chip in CHIPS},
    **{("key_grad", 32, chip): {64: Tile(16, 32, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)} for chip in CHIPS},
    ("query_grad", 32, 90): {16: Tile(32, 16, 8, 1), 64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 8, 1), 256: Tile(16, 16, 8, 1)},
    ("key_grad", 32, 90): {64: Tile(16, 16, 8, 1), 128: Tile(16, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}  # fmt: skip

# The same where scores are capped, whose derivative takes registers of its own; all others as above.
CAPPED = {
    ("query_grad", 16, 80): {64: Tile(128, 32, 8, 2)},
    ("query_grad", 16, 90): {64: Tile(64, 64, 4, 3), 128: Tile(128, 64, 8, 2)},
    ("key_grad", 16, 90): {128: Tile(32, 128, 8, 2)},
}


class HeadTile(typing.NamedTuple):
    """How a kernel of the value head is launched: readings, hidden units, entries of hidden states; warps, stages."""

    block_m: int
    block_k: int
    block_h: int
    num_warps: int
    num_stages: int


# (kernel, whether products run on tensor cores) -> {most readings: tile}; the last one takes all that are more. None of
# these has been timed yet. Few readings are bound by reading weight1 once, so its units are spread over many programs.
HEAD_TILES = {
    ("head_forward", True): {16: HeadTile(16, 16, 128, 4, 3), 64: HeadTile(64, 16, 64, 8, 2), 512: HeadTile(64, 64, 64, 4, 3)},
    ("head_forward", False): {16: HeadTile(16, 16, 64, 4, 2), 64: HeadTile(32, 32, 32, 4, 2)},
    ("head_backward", True): {16: HeadTile(16, 64, 64, 4, 2), 512: HeadTile(64, 64, 32, 8, 2)},
    ("head_backward", False): {16: HeadTile(16, 32, 32, 4, 1), 64: HeadTile(32, 32, 32, 4, 1)},
    ("linear_forward", False): {16: HeadTile(1, 0, 1024, 4, 2), 512: HeadTile(4, 0, 512, 4, 2)},
    ("linear_backward", False): {16: HeadTile(4, 0, 128, 4, 2), 512: HeadTile(16, 0, 128, 4, 2)},
    ("head_merge", False): {16: HeadTile(16, 0, 0, 4, 1), 512: HeadTile(64, 0, 0, 4, 1)},
}  # fmt: skip
HEAD_INTERPRETER = HeadTile(16, 16, 16, 1, 1)

# whether the kind of loss compares pairs -> {responses of a sample on average, at most: (responses of a step, warps)};
# not timed yet
LOSS_BLOCKS = {
    False: {16: (16, 1), 64: (64, 1), 512: (512, 4)},
    True: {16: (16, 1), 32: (32, 4), 64: (64, 16)},
}

# (chip, padded head dim) -> "varlen" or "sdpa", where torch's own attention was measured to be faster than the kernel on
# rows that are causal as they stand, forward only. Not measured on any chip yet, so the kernel takes them.
CAUSAL = {}

GPU = "cuda"  # type of the devices that have chips; `bench/pretended_driver.py` takes the CPU for one
_forced = {}


def padded(head_dim):
    """The head dim as the kernels hold it, a power of two of at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def tile(kernel, head_dim, dtype, chip, capped=False):
    """The tile of a kernel ("forward", "query_grad" or "key_grad") for a head dim, a dtype and one of `CHIPS`.

    capped: whether scores have a soft cap.
    """
    key = kernel, dtype.itemsize * 8, chip
    tiles = TILES[key]
    size = min(size for size in tiles if size >= padded(head_dim))
    return CAPPED.get(key, {}).get(size, tiles[size]) if capped else tiles[size]


def packed_heads(group, block_m):
    """How many of the `group` query heads that share a key head lie in one tile of block_m rows of the forward.

    As many as divide the group, up to `MOST_PACKED`, leave a tile 16 tokens and at most one row in 32 without work: a
    tile of fewer tokens computes less that nobody sees, where branches are short most of all. Always the same for the
    same heads, whatever the row holds.
    """
    fitting = [
        heads
        for heads in range(2, MOST_PACKED + 1)
        if group % heads == 0 and block_m // heads >= 16 and 32 * (block_m % heads) <= block_m
    ]
    return max(fitting, default=1)


_known_packed_heads = functools.cache(packed_heads)


def packed_on(group, block_m):
    """How many heads the forward packs, looked up where it was asked for before."""
    if "packed" in _forced:
        return _forced["packed"]
    return (packed_heads if torch.compiler.is_compiling() else _known_packed_heads)(group, block_m)


@torch.compiler.assume_constant_result
def capability(device):
    """Compute capability (major, minor) of a CUDA device."""
    return _capability(device) if device.index is not None else torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def processors(device):
    """Multiprocessors of a device; 4 for one that has none."""
    return _processors(device) if device.type == GPU else 4


# What a device is does not change, and asking torch takes longer than a launch.
_capability = functools.cache(torch.cuda.get_device_capability)
_processors = functools.cache(lambda device: torch.cuda.get_device_properties(device).multi_processor_count)


def chip_of(device):
    """Which of `CHIPS` a CUDA device is launched like."""
    major, minor = capability(device)
    if major == 8 and minor in (6, 9):
        return 120  # as little shared memory, the same matrix instructions
    return {8: 80, 9: 90, 10: 100, 11: 100}.get(major, 120)


class Machine(typing.NamedTuple):
    """What of a device decides how kernels are launched: which of `CHIPS` (None: interpreted), multiprocessors."""

    chip: int | None
    processors: int


def machine_of(device):
    """The `Machine` a device is."""
    return Machine(_chip_or_none(device), processors(device))


def _chip_or_none(device):
    return chip_of(device) if device.type == GPU else None


def tile_on(chip, kernel, head_dim, dtype, capped=False):
    """The tile that a kernel is launched with on one of `CHIPS` (None: interpreted), with a soft cap or without."""
    if kernel in _forced:
        return _forced[kernel]
    if chip is None:
        return INTERPRETER
    find = tile if torch.compiler.is_compiling() else _known_tile  # a compiler looks into no cache
    return find(kernel, head_dim, dtype, chip, capped)


_known_tile = functools.cache(tile)


def attention(kernel, head_dim, dtype, device, capped=False):
    """The tile that a kernel is launched with on a device, with a soft cap or without."""
    return tile_on(_chip_or_none(device), kernel, head_dim, dtype, capped)


def head(kernel, num_readings, device, tensor_cores=False):
    """The tile that a kernel of the value head is launched with."""
    if kernel in _forced:
        return _forced[kernel]
    if device.type != GPU:
        return HEAD_INTERPRETER
    return bucket(HEAD_TILES[kernel, tensor_cores], num_readings)


def loss(kind, num_responses, num_samples, device):
    """(responses of a step, warps) of the loss's kernel, from how many responses a sample has on average."""
    if device.type != GPU:
        return 16, 1
    return bucket(LOSS_BLOCKS[kind in ("plackett_luce", "bradley_terry")], num_responses / num_samples)


def bucket(table, size):
    """The entry of the least bound that is not below size; the last one where none is."""
    return next((entry for most, entry in table.items() if size <= most), table[max(table)])


@contextlib.contextmanager
def forced(**tiles):
    """Within it, kernels run with these tiles (forward=, query_grad=, key_grad=) instead: for tests and for tuning.

    packed= says how many heads the forward takes into a tile, a divisor of those that share a key head. A forward and its
    backward must both lie within it: the tables of the backward are made by the forward.
    """
    before = dict(_forced)
    _forced.update(tiles)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
