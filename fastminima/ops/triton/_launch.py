"""What launchers of Triton kernels share: arguments, and when a grid is too small."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import TRITON, contiguous_rows

__all__ = [
    "PROGRAMS",
    "GradientBlocks",
    "gradient_blocks",
    "has_vectors",
    "one_dtype",
    "side",
    "split",
]

# Programs that keep a GPU of today busy: 108 to 148 multiprocessors, one to two blocks
# each. One number for all of them, so that a result does not depend on the GPU.
PROGRAMS = 256


def one_dtype(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype with contiguous rows; float32 where they differ.

    Raises:
        TypeError: One is of a dtype that the kernels do not have, such as float64.
    """
    for x in (a, g):
        if x.dtype not in TRITON:
            raise TypeError(
                f"The Triton kernels take {TRITON}, got {a.dtype} and {g.dtype}. Use "
                'the op\'s "reference", or convert one.'
            )
    if a.dtype != g.dtype:
        a, g = a.float(), g.float()
    return contiguous_rows(a), contiguous_rows(g)


def split(items: int, programs: int) -> tuple[int, int]:
    """Into how many parts to split a sum over `items`, and the items of a part.

    One, unless the programs of a part are too few to fill a GPU.
    """
    parts = max(1, min(items, PROGRAMS // max(1, programs)))
    each = -(-items // parts)
    return -(-items // max(1, each)), each


def side(size: int, largest: int) -> int:
    """Side of a tile: a power of two, 16 at least as in a product of tensor cores."""
    return min(largest, max(16, 1 << max(0, size - 1).bit_length()))


class GradientBlocks(NamedTuple):
    """Tile of a gradient, time steps that are read at once, warps, and buffers."""

    out: int
    inputs: int
    time: int
    warps: int
    stages: int


# By dtype and by how many matrices a program keeps in registers, 65536 of them and at
# most 255 a thread. Chosen from the code made for sm_80, sm_90 and sm_100: the largest
# tiles that spill nothing. float32 multiplies on ordinary cores, which shared memory
# feeds: 16 time steps at once leave room for two blocks on a multiprocessor.
_HALF = {
    1: GradientBlocks(128, 128, 64, 8, 3),
    2: GradientBlocks(128, 128, 32, 8, 4),
    3: GradientBlocks(128, 64, 64, 8, 3),
}
_FLOAT = {
    1: GradientBlocks(128, 128, 16, 8, 3),
    2: GradientBlocks(64, 64, 16, 4, 3),
    3: GradientBlocks(64, 64, 16, 4, 3),
}
# Rows that are read element by element have an address each: more threads to hold them.
_FLOAT_ALONE = GradientBlocks(64, 64, 16, 8, 3)


def gradient_blocks(a: Tensor, g: Tensor, time: int, kept: int) -> GradientBlocks:
    """Blocks for a program that keeps `kept` tiles: the product, and sums of it."""
    if g.dtype != torch.float32:
        most = _HALF[kept]
    elif has_vectors(a) and has_vectors(g):
        most = _FLOAT[kept]
    else:
        most = _FLOAT_ALONE
    out, inputs = side(g.shape[-1], most.out), side(a.shape[-1], most.inputs)
    warps = max(4, most.warps * out * inputs // (most.out * most.inputs))
    return GradientBlocks(out, inputs, side(time, most.time), warps, most.stages)


def has_vectors(x: Tensor) -> bool:
    """Whether the compiler sees that rows can be read 16 bytes at a time."""
    return x.shape[-1] % 16 == 0 and x.stride(-2) % 16 == 0
