"""Which way and which tiles a convolution's statistics take, from sizes alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .conv_sizes import ConvSizes

__all__ = [
    "DirectTile",
    "GramTile",
    "chunks",
    "direct_tile",
    "fastest",
    "gram_tile",
    "samples_at_once",
]

_SMALLEST = 16  # side of the smallest product of tensor cores

# Programs that keep a GPU of today busy: 108 to 148 multiprocessors, one to two blocks
# each. One number for all of them, so that a result does not depend on the GPU.
_PROGRAMS = 256

# Bytes of the Gram matrices of images that are alive at a time: they are to stay in the
# L2 cache, 40 MB on an A100 and 50 on an H100.
_WORKSPACE = 32 << 20

# Multiply-adds that take as long as gathering one element of a Gram matrix. An H100's
# multiprocessor issues 32 loads a cycle, 2048 multiply-adds of halves on tensor cores,
# and 128 of float32.
_GATHER_HALF, _GATHER_SINGLE = 64, 4


def _power(size: int, most: int) -> int:
    """The power of two that holds `size`, between the smallest tile and `most`."""
    return max(_SMALLEST, min(most, 1 << (size - 1).bit_length()))


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


class DirectTile(NamedTuple):
    """A launch configuration of the direct kernel."""

    rows: int
    columns: int
    positions: int
    warps: int
    stages: int
    one_tap: bool  # columns are channels of one tap, else (channel, tap)

    def count(self, sizes: ConvSizes) -> int:
        """Tiles of the weight."""
        if self.one_tap:
            columns = _blocks(sizes.channels, self.columns) * sizes.taps
        else:
            columns = _blocks(sizes.channels * sizes.taps, self.columns)
        return sizes.groups * _blocks(sizes.height, self.rows) * columns

    def cost(self, sizes: ConvSizes) -> int:
        """Multiply-adds a sample, with all padding."""
        positions = _blocks(sizes.length, self.positions) * self.positions
        return self.count(sizes) * self.rows * self.columns * positions

    def constants(self) -> dict[str, object]:
        """As the arguments of a launch."""
        return {
            "ONE_TAP": self.one_tap,
            "PRECISION": "ieee",
            "BLOCK_R": self.rows,
            "BLOCK_C": self.columns,
            "BLOCK_T": self.positions,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class GramTile(NamedTuple):
    """A launch configuration of the Gram kernels."""

    positions: int
    channels: int
    warps: int
    stages: int
    shifts: bool  # gather from the image's Gram matrix, else multiply patches

    def pairs(self, length: int) -> int:
        """Tiles of the lower half of a Gram matrix."""
        blocks = _blocks(length, self.positions)
        return blocks * (blocks + 1) // 2

    def cost(self, sizes: ConvSizes, gather: int) -> int:
        """Multiply-adds a sample, with all padding."""
        height = _blocks(sizes.height, self.channels) * self.channels
        channels = _blocks(sizes.channels, self.channels) * self.channels
        pairs, of_image = self.pairs(sizes.length), 0
        if self.shifts:
            of_image = self.pairs(math.prod(sizes.cells)) * sizes.phases * channels
        of_patches = sizes.taps * (gather if self.shifts else channels)
        products = pairs * (height + of_patches) + of_image
        return sizes.groups * self.positions**2 * products

    def constants(self) -> dict[str, object]:
        """As the arguments of a launch."""
        return {
            "PRECISION": "ieee",
            "BLOCK": self.positions,
            "BLOCK_C": self.channels,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def direct_tile(sizes: ConvSizes, dtype: torch.dtype, outputs: int) -> DirectTile:
    """Tiles for the direct kernel with `outputs` running sums beside a product."""
    one_tap = sizes.channels >= 32
    columns = sizes.channels if one_tap else sizes.channels * sizes.taps
    half = dtype != torch.float32
    return DirectTile(
        rows=_power(sizes.height, 64),
        columns=_power(columns, 64),
        positions=_power(sizes.length, 64 if half else 32),
        warps=4,
        stages=3,
        one_tap=one_tap,
    )


def gram_tile(sizes: ConvSizes, dtype: torch.dtype, shifts: bool) -> GramTile:
    """Tiles for the Gram kernels."""
    half = dtype != torch.float32
    return GramTile(
        positions=_power(sizes.length, 64),
        channels=_power(max(sizes.height, sizes.channels), 64 if half else 32),
        warps=4,
        stages=3,
        shifts=shifts,
    )


def fastest(sizes: ConvSizes, dtype: torch.dtype) -> DirectTile | GramTile:
    """The way to squared norms with the fewest multiply-adds.

    | way | multiply-adds a sample | is right when |
    |---|---|---|
    | direct | length * height * channels * taps | images are large |
    | Gram, shifted | (cells^2 phases channels + length^2 height) / 2 | they are small |
    | Gram | length^2 (height + channels * taps) / 2 | and there is one tap |
    """
    gather = _GATHER_SINGLE if dtype == torch.float32 else _GATHER_HALF
    direct = direct_tile(sizes, dtype, outputs=0)
    ways = [(direct.cost(sizes), direct)]
    for shifts in (False, True):
        if shifts and (sizes.taps == 1 or 4 * sizes.gram > _WORKSPACE):
            continue
        gram = gram_tile(sizes, dtype, shifts)
        ways.append((gram.cost(sizes, gather), gram))
    return min(ways, key=lambda way: way[0])[1]


def samples_at_once(sizes: ConvSizes) -> int:
    """Samples whose images have Gram matrices at a time."""
    return max(1, min(sizes.batch, _WORKSPACE // (4 * sizes.gram)))


def chunks(batch: int, tiles: int) -> int:
    """Parts of a batch whose programs together keep a GPU busy."""
    return max(1, min(batch, _PROGRAMS // tiles))
