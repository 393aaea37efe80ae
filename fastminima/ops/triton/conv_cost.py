"""Which way and which tiles a convolution's statistics take, from sizes alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ._launch import PROGRAMS, power_of_two, side, split
from .conv_sizes import ConvSizes, Operands

__all__ = [
    "DepthwiseTile",
    "DirectTile",
    "GramTile",
    "chunks",
    "depthwise_tile",
    "direct_tile",
    "fastest_gram",
    "gram_tile",
    "is_depthwise",
    "samples_at_once",
    "tile_as_it_lies",
]

# Bytes of the Gram matrices of images that are alive at a time: they are to stay in the
# L2 cache, 40 MB on an A100 and 50 on an H100.
_WORKSPACE = 32 << 20

# Multiply-adds that take as long as gathering one element of a Gram matrix. The loop
# that gathers a tile of 64 x 64 has some 630 instructions for each of 4 warps, that is
# as many cycles; an H100's multiprocessor can do 2048 multiply-adds of halves a cycle
# on tensor cores, or 128 of float32. Counted in machine code, not timed.
_GATHER_HALF, _GATHER_SINGLE = 320, 20


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


class DepthwiseTile(NamedTuple):
    """A launch configuration of the kernel of depth-wise convolutions."""

    rows: int
    positions: int

    def count(self, sizes: ConvSizes) -> int:
        """Tiles of the weight, with all taps."""
        return _blocks(sizes.groups * sizes.height, self.rows)

    def taps(self, sizes: ConvSizes, chunks: int) -> tuple[int, int]:
        """Among how many programs the taps of a tile are shared, and the taps of each.

        One, unless those are too few to fill a GPU: a program that goes over all taps
        finds its channels in the cache. Of its four warps each scheduler has one, which
        waits for its loads, so that twice as many programs are wanted as of others.
        """
        return split(sizes.taps, chunks * self.count(sizes) // 2)

    def constants(self) -> dict[str, object]:
        """As the arguments of a launch."""
        return {
            "BLOCK_R": self.rows,
            "BLOCK_T": self.positions,
            "num_warps": 4,
            "num_stages": 2,
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

    def requests(self, sizes: ConvSizes) -> tuple[int, int]:
        """How often the kernels ask for each element of the rows, and of the image."""
        rows = _blocks(sizes.length, self.positions) + 1
        if self.shifts:
            return rows, _blocks(math.prod(sizes.cells), self.positions) + 1
        return rows, rows * sizes.taps

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


def direct_tile(of: Operands, outputs: int) -> tuple[Operands, DirectTile]:
    """The operands laid out for the direct kernel, and its tiles."""
    sizes = of.sizes
    columns = sizes.channels * (1 if _is_one_tap(sizes) else sizes.taps)
    of = of.packed(
        _blocks(columns, 64) * (sizes.taps if _is_one_tap(sizes) else 1),
        _blocks(sizes.height, 64) * sizes.taps,
    )
    return of, tile_as_it_lies(of, outputs)


def _is_one_tap(sizes: ConvSizes) -> bool:
    """Whether blocks of columns are channels of one tap."""
    return sizes.channels >= 32


def tile_as_it_lies(of: Operands, outputs: int) -> DirectTile:
    """Tiles for the direct kernel of operands as they lie in memory.

    `outputs` running sums lie beside the product of a sample: on sm_80, 90 and 100 no
    tile here runs out of registers, where twice the positions, or half the warps, do.

    | tile | for | because |
    |---|---|---|
    | 128 x 128 x 32 | wide layers, halves | tensor cores bind, not issue slots |
    | 64 x 64 x 64 | halves, norms only | half the loop's overhead of 32 positions |
    | 64 x 64 x 32 | halves, sums beside them | sums take 32 registers each |
    | 64 x 64 x 16 | float32 | no tensor cores: 16 positions occupy them all |
    """
    sizes = of.sizes
    one_tap = _is_one_tap(sizes)
    columns = sizes.channels * (1 if one_tap else sizes.taps)
    half = of.image.dtype != torch.float32
    is_wide = half and one_tap and min(sizes.height, columns) >= 128 and outputs < 2
    largest = 128 if is_wide else 64
    positions = 16 if not half else 64 if not outputs and not is_wide else 32
    by_position = of.layout()["IMAGE_BY_POSITION"]
    return DirectTile(
        rows=side(sizes.height, largest),
        columns=side(columns, largest),
        positions=side(sizes.length, positions),
        # The addresses of pixels one by one take registers that channels do not.
        warps=8 if is_wide or (not half and (by_position or not one_tap)) else 4,
        stages=3,
        one_tap=one_tap,
    )


def is_depthwise(sizes: ConvSizes) -> bool:
    """Whether products of matrices would mostly multiply padding."""
    return sizes.channels == 1 and sizes.height < 8 and sizes.groups > 1


def depthwise_tile(sizes: ConvSizes) -> DepthwiseTile:
    """Tiles for depth-wise convolutions: 4096 products, 32 in a thread's registers.

    32 channels: lines of 64 bytes in halves.
    """
    rows = min(32, power_of_two(sizes.groups * sizes.height))
    return DepthwiseTile(rows, positions=min(128, power_of_two(sizes.length)))


def gram_tile(sizes: ConvSizes, dtype: torch.dtype, shifts: bool) -> GramTile:
    """Tiles for the Gram kernels."""
    half = dtype != torch.float32
    return GramTile(
        positions=side(sizes.length, 64),
        channels=side(max(sizes.height, sizes.channels), 32 if half else 16),
        warps=4,
        stages=3,
        shifts=shifts,
    )


def fastest_gram(of: Operands) -> GramTile | None:
    """The Gram way with the fewest multiply-adds; None if direct has fewer.

    Never for depth-wise convolutions: a Gram matrix would be of single channels.

    | way | multiply-adds a sample | is right when |
    |---|---|---|
    | direct | length * height * channels * taps | images are large |
    | Gram, shifted | (cells^2 phases channels + length^2 height) / 2 | they are small |
    | Gram | length^2 (height + channels * taps) / 2 | and there is one tap |
    """
    sizes, dtype = of.sizes, of.image.dtype
    if is_depthwise(sizes):
        return None
    gather = _GATHER_SINGLE if dtype == torch.float32 else _GATHER_HALF
    best, least = None, tile_as_it_lies(of, 0).cost(sizes)
    for shifts in (False, True):
        if shifts and (sizes.taps == 1 or 4 * sizes.gram > _WORKSPACE):
            continue
        gram = gram_tile(sizes, dtype, shifts)
        if gram.cost(sizes, gather) < least:
            best, least = gram, gram.cost(sizes, gather)
    return best


def samples_at_once(sizes: ConvSizes) -> int:
    """Samples whose images have Gram matrices at a time."""
    return max(1, min(sizes.batch, _WORKSPACE // (4 * sizes.gram)))


def chunks(batch: int, tiles: int) -> int:
    """Parts of a batch whose programs together keep a GPU busy."""
    return max(1, min(batch, PROGRAMS // tiles))
