"""How sums over the steps of each sample are cut into programs; shapes only.

The tensors are `[batch, time, features]`, summed over time. Nothing here depends on
data or device, so that a launch is the same every time.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._arguments import contiguous_rows
from ._launch import power_of_two

__all__ = ["PROGRAMS", "WARPS", "Tiles", "oriented", "tiles"]

# A program sums tiles of 2048 elements with 4 warps: two loads of 16 bytes a thread for
# half inputs and four for float32 keep 8 to 16 KB a program on their way, and 3 TB/s
# times 700 ns ask for 16 KB on each of 132 multiprocessors.
TILE = 2048
WARPS = 4
# A run of 128 elements fills 2 to 4 cache lines. Along time, 512 leave each warp whole
# lines of one feature and four features a program.
RUN_FEATURES = 128
RUN_TIME = 512
PROGRAMS = 1024  # about 8 for each of 108 to 148 multiprocessors
STEPS = 8  # tiles that a program sums at least before time is split: writing is 1/8


class Tiles(NamedTuple):
    """Sizes of a launch: a program takes `block_features` x `span` time steps."""

    block_time: int
    block_features: int
    span: int
    splits: int
    blocks: int  # of features


def tiles(batch: int, time: int, features: int, *, time_is_contiguous: bool) -> Tiles:
    """Tile sizes for `[batch, time, features]`, with time split where samples are few.

    Args:
        batch: samples, of which each has programs of its own.
        time: steps to sum over.
        features: what is kept.
        time_is_contiguous: whether neighbours in memory are time steps.
    """
    sizes = power_of_two(time), power_of_two(features)
    inner, outer = sizes if time_is_contiguous else sizes[::-1]
    run = RUN_TIME if time_is_contiguous else RUN_FEATURES
    outer = min(outer, TILE // min(inner, run))
    inner = min(inner, TILE // outer)
    block_time, block_features = (
        (inner, outer) if time_is_contiguous else (outer, inner)
    )
    blocks = -(-features // block_features)
    steps = -(-time // block_time)
    splits = max(1, min(PROGRAMS // max(1, batch * blocks), steps // STEPS))
    span = -(-steps // splits) * block_time
    splits = max(1, -(-time // span)) if span else 1
    return Tiles(block_time, block_features, span, splits, blocks)


def oriented(*tensors: Tensor) -> tuple[tuple[Tensor, ...], bool]:
    """The `[batch, time, features]` with one order, and whether time is contiguous.

    They are copied where their neighbours in memory are not along one same dimension.
    """
    if all(x.stride(2) != 1 and x.stride(1) == 1 for x in tensors):
        return tensors, True
    return tuple(map(contiguous_rows, tensors)), False
