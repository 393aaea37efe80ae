"""Which way and which tiles a convolution's statistics take, from sizes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .conv_sizes import ConvSizes

__all__ = ["DirectTile", "chunks", "direct_tile"]

_SMALLEST = 16  # side of the smallest product of tensor cores
_MULTIPROCESSORS = 132  # where there is no device to ask: those of an H100


def _power(size: int, most: int) -> int:
    """The power of two that holds `size`, between the smallest tile and `most`."""
    return max(_SMALLEST, min(most, 1 << (size - 1).bit_length()))


class DirectTile(NamedTuple):
    """A launch configuration of the direct kernel."""

    rows: int
    columns: int
    positions: int
    warps: int
    stages: int
    one_tap: bool
    precision: str

    def count(self, sizes: ConvSizes) -> int:
        """Tiles of the weight."""
        columns = sizes.channels if self.one_tap else sizes.channels * sizes.taps
        blocks = -(-columns // self.columns) * (sizes.taps if self.one_tap else 1)
        return sizes.groups * -(-sizes.height // self.rows) * blocks

    def constants(self) -> dict[str, object]:
        """As the arguments of a launch."""
        return {
            "ONE_TAP": self.one_tap,
            "PRECISION": self.precision,
            "BLOCK_R": self.rows,
            "BLOCK_C": self.columns,
            "BLOCK_T": self.positions,
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
        precision="ieee",
    )


def chunks(batch: int, tiles: int, device: torch.device) -> int:
    """Parts of a batch whose programs together keep a device busy."""
    count = _MULTIPROCESSORS
    if device.type == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(batch, 2 * count // max(1, tiles)))
