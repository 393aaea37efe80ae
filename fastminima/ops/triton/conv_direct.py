"""Weight gradients of convolutions, tile by tile, sample by sample, in registers.

One kernel for all that needs the gradient of each sample as such: its squared norm,
the sum over samples, and the sum of squares over samples, or several of them at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from .conv_cost import DirectTile
from .conv_outputs import outputs
from .conv_sizes import Operands
from .conv_tiles import advance, load_patches, load_rows, split, tap_of_column

__all__ = ["products", "tile_gradient", "tiles_of"]


@triton.jit
def tiles_of(
    height, channels, KERNEL: tl.constexpr, ONE_TAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Blocks of rows, and of columns, of the weight of a group."""
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    if ONE_TAP:
        columns = tl.cdiv(channels, BLOCK_C) * taps
    else:
        columns = tl.cdiv(channels * taps, BLOCK_C)
    return tl.cdiv(height, BLOCK_R), columns


@triton.jit
def tile_gradient(
    rows_ptr,  # [groups * height, length], of one sample
    image_ptr,  # [groups * channels, *space], of one sample
    group, r, c, tap, height, channels, length, space, out, row_strides, image_strides,
    PRECISION: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, DILATION: tl.constexpr, AXES: tl.constexpr,
    ROWS_BY_POSITION: tl.constexpr, IMAGE_BY_POSITION: tl.constexpr,
    WIDE: tl.constexpr, ONE_TAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dW[r, (c, k)] = sum_t rows[r, t] image[c, ...] of a group; zero outside of it."""
    rows_ptr += (group * height).to(tl.int64) * row_strides[1]
    image_ptr += (group * channels).to(tl.int64) * image_strides[1]
    t_first = tl.arange(0, BLOCK_T)
    step = split(BLOCK_T, out)
    z, y, x = split(t_first, out)
    grad = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for start in range(0, length, BLOCK_T):
        t = start + t_first
        left = load_rows(
            *(rows_ptr, r, t, height, length, row_strides, ROWS_BY_POSITION, WIDE)
        )
        right = _load_columns(
            *(image_ptr, c, tap, z, y, x),
            *(t < length, channels, space, image_strides, KERNEL, STRIDE, PADDING),
            *(DILATION, AXES, IMAGE_BY_POSITION, WIDE, ONE_TAP),
        )
        grad = tl.dot(left, right, grad, input_precision=PRECISION)
        z, y, x = advance(z, y, x, step, out, AXES)
    # An infinite pixel times the zeros beside the rows is not a number.
    return tl.where((r < height)[:, None] & (c < channels)[None, :], grad, 0.0)


@triton.jit
def _products_kernel(
    rows_ptr,  # [batch, groups * height, length]
    image_ptr,  # [batch, groups * channels, *space]
    norms_ptr,  # [batch, tiles]
    grad_ptr,  # [chunks, weight]
    moment_ptr,  # [chunks, weight]
    batch, per_chunk, groups, height, channels, length, space, out,
    row_strides, image_strides,
    NORMS: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, ROWS_BY_POSITION: tl.constexpr,
    IMAGE_BY_POSITION: tl.constexpr, WIDE: tl.constexpr, ONE_TAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dW[r, (c, k)] = sum_t rows[r, t] image[c, ...] of each sample, squared, summed.

    One program a tile [BLOCK_R, BLOCK_C] of the weight and a chunk of samples.

    Floor: reads rows and image once and writes tiles * batch norms, chunks * weight
    elements of the sums; 2 * batch * length * weight operations. What it requests of
    the caches: the rows once for each block of columns, the image (the part under the
    kernel, that is once a tap) for each block of rows.
    """
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    row_blocks, column_blocks = tiles_of(
        *(height, channels, KERNEL, ONE_TAP, BLOCK_R, BLOCK_C)
    )
    tiles = groups * row_blocks * column_blocks
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles
    group = tile // (row_blocks * column_blocks)
    r = tile // column_blocks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c, tap = tap_of_column(tile % column_blocks, KERNEL, BLOCK_C, ONE_TAP)
    is_element = (r < height)[:, None] & (c < channels)[None, :]

    if GRAD:
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if MOMENT:
        squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = chunk * per_chunk
    for n in range(first, tl.minimum(first + per_chunk, batch)):
        sample = tl.cast(n, tl.int64)
        grad = tile_gradient(
            rows_ptr + sample * row_strides[0], image_ptr + sample * image_strides[0],
            group, r, c, tap, height, channels, length, space, out,
            row_strides, image_strides, PRECISION, KERNEL, STRIDE, PADDING, DILATION,
            AXES, ROWS_BY_POSITION, IMAGE_BY_POSITION, WIDE, ONE_TAP,
            BLOCK_R, BLOCK_C, BLOCK_T,
        )  # fmt: skip
        if NORMS:
            tl.store(norms_ptr + sample * tiles + tile, tl.sum(grad * grad))
        if GRAD:
            total += grad
        if MOMENT:
            squares += grad * grad

    # Row r of a group has the columns (c, tap) of the weight.
    row = (group * height + r).to(tl.int64) * (channels * taps)
    at = row[:, None] + (c * taps + tap)[None, :]
    at += tl.cast(chunk, tl.int64) * groups * height * channels * taps
    if GRAD:
        tl.store(grad_ptr + at, total, mask=is_element)
    if MOMENT:
        tl.store(moment_ptr + at, squares, mask=is_element)


@triton.jit
def _load_columns(
    ptr, c, tap, z, y, x, exists, channels, space, strides,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, BY_POSITION: tl.constexpr,
    WIDE: tl.constexpr, ONE_TAP: tl.constexpr,
):  # fmt: skip
    """The image under taps of channels, [BLOCK_T, BLOCK_C]."""
    if BY_POSITION:
        if not ONE_TAP:
            tap = tap[:, None]
        tile = load_patches(
            *(ptr, c[:, None], tap, z[None, :], y[None, :], x[None, :]),
            *((c < channels)[:, None] & exists[None, :], space, strides),
            *(KERNEL, STRIDE, PADDING, DILATION, AXES, WIDE),
        )
        tile = tl.trans(tile)
    else:
        if not ONE_TAP:
            tap = tap[None, :]
        tile = load_patches(
            *(ptr, c[None, :], tap, z[:, None], y[:, None], x[:, None]),
            *(exists[:, None] & (c < channels)[None, :], space, strides),
            *(KERNEL, STRIDE, PADDING, DILATION, AXES, WIDE),
        )
    return tile


def products(
    of: Operands,
    tile: DirectTile,
    *,
    norms: bool = False,
    grad: bool = False,
    moment: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Squared norms [batch], summed gradient [weight], summed squares [weight].

    What is not asked for is None.
    """
    sizes, tiles = of.sizes, tile.count(of.sizes)
    to = outputs(of, tiles, norms, grad, moment)
    launch(
        _products_kernel,
        (to.chunks * tiles,),
        *(of.rows, of.image, *to.pointers(of.image)),
        *(sizes.batch, to.per_chunk, sizes.groups, sizes.height, sizes.channels),
        *(sizes.length, sizes.space, sizes.out, *of.strides()),
        *(norms, grad, moment),
        **sizes.constants(),
        **of.layout(),
        **tile.constants(),
    )
    return to.results()
