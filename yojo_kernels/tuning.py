"""Tile shapes, warps and pipeline stages of the kernels, per head dim, dtype and chip, each with where it comes from."""

import functools
import typing

import torch


class Tile(typing.NamedTuple):
    """How one kernel is launched: rows of queries, rows of keys, warps of a program, stages of its pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    source: str


PIECES_PER_PROCESSOR = 4
INTERPRETED = Tile(16, 16, 1, 1, "the smallest tiles, for the interpreter: many of them even in a short row")


def attention(kernel, head_dim, dtype, device):
    return INTERPRETED


def processors(device):
    """Multiprocessors of a device; 4 for one that has none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
