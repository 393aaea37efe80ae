"""Sizes of the blocks of programs that make tiles of dense gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import has_vectors, side

__all__ = ["GradientBlocks", "gradient_blocks"]


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
