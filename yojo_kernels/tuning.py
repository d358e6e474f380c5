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
    source: str = ""


CHIPS = (80, 90, 100, 120)  # compute capabilities that have tables
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a program may have
PIECES_PER_PROCESSOR = 4  # the queries of the prompt's keys are split until a piece is a quarter of a processor's share
INTERPRETER = Tile(16, 16, 1, 1, "the smallest tiles: many of them even in the short rows an interpreter can take")
_forced = {}


def padded(head_dim):
    """The head dim as the kernels hold it, a power of two of at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())
TABLE={}
def tile(kernel, head_dim, dtype, chip): return TABLE[kernel,dtype,head_dim,chip]
