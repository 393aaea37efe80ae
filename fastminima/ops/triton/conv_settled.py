"""Norms of convolutions from Gram sums, or anew: one kernel decides and acts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..cost.dense import guard_on_gpu
from ..recording import launch
from ._settle import added, sharers
from .conv_cost import DirectTile
from .conv_direct import tile_gradient, tiles_of
from .conv_sizes import Operands
from .conv_tiles import tap_of_column
from .totals import last_added

__all__ = ["settled"]


@triton.jit
def _settle_kernel(
    rows_ptr,  # [batch, groups * height, length]
    image_ptr,  # [batch, groups * channels, *space]
    sums_ptr,  # [batch, 2, pairs]
    parts_ptr,  # [batch, programs]
    programs, pairs, groups, height, channels, length, space, out,
    row_strides, image_strides, least,
    PRECISION: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, ROWS_BY_POSITION: tl.constexpr,
    IMAGE_BY_POSITION: tl.constexpr, WIDE: tl.constexpr, ONE_TAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Parts of the squared norms: the Gram sum and zeros, or shares of the gradient.

    Each program of a sample adds up the sample's Gram sums and their diagonal, all in
    the same order, so that they decide alike. A sum that is not a number passes no
    test: its sample is done again, too.

    Floor: 4 batch (2 pairs + programs) bytes; for a sample that is lost, rows and
    image once, and 2 length weight operations.
    """
    share = tl.program_id(0) % programs
    n = (tl.program_id(0) // programs).to(tl.int64)
    sums_ptr += n * 2 * pairs
    total = added(sums_ptr, pairs, 128)
    holds = total >= least * added(sums_ptr + pairs, pairs, 128)
    row_blocks, column_blocks = tiles_of(
        *(height, channels, KERNEL, ONE_TAP, BLOCK_R, BLOCK_C)
    )
    made = 0.0
    tiles = tl.where(holds, 0, groups * row_blocks * column_blocks)
    for tile in range(share, tiles, programs):
        group = tile // (row_blocks * column_blocks)
        r = tile // column_blocks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
        c, tap = tap_of_column(tile % column_blocks, KERNEL, BLOCK_C, ONE_TAP)
        grad = tile_gradient(
            rows_ptr + n * row_strides[0], image_ptr + n * image_strides[0],
            group, r, c, tap, height, channels, length, space, out,
            row_strides, image_strides, PRECISION, KERNEL, STRIDE, PADDING, DILATION,
            AXES, ROWS_BY_POSITION, IMAGE_BY_POSITION, WIDE, ONE_TAP,
            BLOCK_R, BLOCK_C, BLOCK_T,
        )  # fmt: skip
        made += tl.sum(grad * grad)
    kept = tl.where(share == 0, total, 0.0)
    tl.store(parts_ptr + n * programs + share, tl.where(holds, kept, made))


def settled(of: Operands, sums: Tensor, tile: DirectTile) -> Tensor:
    """Squared norms `[batch]` from parts of Gram sums, right to 1e-4.

    Which samples are made anew is known to the device only.
    """
    sizes, pairs = of.sizes, sums.shape[2]
    programs = sharers(sizes.batch, pairs, tile.count(sizes))
    parts = sums.new_empty(sizes.batch, programs)
    columns = sizes.channels * sizes.taps
    launch(
        _settle_kernel,
        (sizes.batch * programs,),
        *(of.rows, of.image, sums, parts, programs, pairs, sizes.groups),
        *(sizes.height, sizes.channels, sizes.length, sizes.space, sizes.out),
        *(*of.strides(), guard_on_gpu(columns, sizes.height, of.image.dtype)),
        **sizes.constants(),
        **of.layout(),
        **tile.constants(),
    )
    return last_added(parts)
