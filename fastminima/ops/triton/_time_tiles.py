"""How sums over the steps of each sample are cut into programs; shapes only.

The tensors are `[batch, time, features]`, summed over time. Nothing here depends on
data or device, so that a launch is the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .._arguments import contiguous_rows
from ._launch import power_of_two

__all__ = ["PROGRAMS", "WARPS", "Tiles", "oriented", "tiles"]

# A program sums tiles with 4 warps. 4 loads of 16 bytes a thread keep 8 KB of each
# program on their way, and 3 TB/s times 700 ns ask for 16 KB on each of 132
# multiprocessors. At least 2048 elements; each is a sum in a register meanwhile.
TILE, TILE_BYTES = 2048, 8192
WARPS = 4
# A run of 128 features fills 2 to 4 cache lines; one of 64 bytes is the least that
# memory gives. Along time, 512 leave each warp whole lines of one feature and four
# features a program.
RUN_FEATURES, RUN_BYTES = 128, 64
RUN_TIME = 512
PROGRAMS = 1024  # about 8 for each of 108 to 148 multiprocessors
FEW = 264  # two for each: with fewer, runs are shortened before time is split
# What a program sums at least where time is split: tiles along time, else time steps.
# Writing is 1/8 and less of reading.
STEPS, LEAST_TIME = 8, 128


class Tiles(NamedTuple):
    """Sizes of a launch: a program takes `block_features` x `span` time steps."""

    block_time: int
    block_features: int
    span: int
    splits: int
    blocks: int  # of features


def tiles(
    batch: int,
    time: int,
    features: int,
    *,
    time_is_contiguous: bool,
    itemsizes: Sequence[int],
) -> Tiles:
    """Tile sizes for `[batch, time, features]`, with time split where samples are few.

    A split costs a second kernel that adds up, so blocks of features are made narrow
    first.

    Args:
        batch: samples, of which each has programs of its own.
        time: steps to sum over.
        features: what is kept.
        time_is_contiguous: whether neighbours in memory are time steps.
        itemsizes: bytes of an element in each of the tensors that are read.
    """
    most_time, most_features = power_of_two(time), power_of_two(features)
    if time_is_contiguous:
        block_features = min(most_features, TILE // min(most_time, RUN_TIME))
        block_time = min(most_time, TILE // block_features)
    else:
        block_features = min(most_features, RUN_FEATURES)
        least = RUN_BYTES // min(itemsizes)
        while block_features > least and batch * -(-features // block_features) < FEW:
            block_features //= 2
        tile = max(TILE, TILE_BYTES // sum(itemsizes))
        block_time = min(most_time, tile // block_features)
    blocks = -(-features // block_features)
    steps = -(-time // block_time)
    most, least = PROGRAMS, STEPS * block_time
    if not time_is_contiguous:  # whose tiles keep twice as much on its way
        most, least = PROGRAMS // 2, LEAST_TIME
    splits = max(1, min(most // max(1, batch * blocks), time // least))
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
