"""Weight gradients of convolutions, tile by tile, sample by sample, in registers.

One kernel for all that needs the gradient of each sample as such: its squared norm,
the sum over samples, and the sum of squares over samples, or several of them at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .conv_cost import DirectTile
from .conv_outputs import outputs
from .conv_sizes import Operands
from .conv_tiles import advance, load_patches, load_rows, split, tap_of_column

__all__ = ["products"]


@triton.jit
def _products_kernel(
    rows_ptr,  # [batch, groups * height, length]
    image_ptr,  # [batch, groups * channels, *space]
    wanted_ptr,  # [batch], of samples to look at, or unused
    norms_ptr,  # [batch, tiles]
    grad_ptr,  # [chunks, weight]
    moment_ptr,  # [chunks, weight]
    batch, per_chunk, groups, height, channels, length, space, out,
    row_strides, image_strides,
    NORMS: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
    SELECTS: tl.constexpr, PRECISION: tl.constexpr,
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
    row_blocks = tl.cdiv(height, BLOCK_R)
    if ONE_TAP:
        column_blocks = tl.cdiv(channels, BLOCK_C) * taps
    else:
        column_blocks = tl.cdiv(channels * taps, BLOCK_C)
    tiles = groups * row_blocks * column_blocks
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles
    group = tile // (row_blocks * column_blocks)
    r = tile // column_blocks % row_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    c, tap = tap_of_column(tile % column_blocks, KERNEL, BLOCK_C, ONE_TAP)
    rows_ptr += (group * height).to(tl.int64) * row_strides[1]
    image_ptr += (group * channels).to(tl.int64) * image_strides[1]

    is_element = (r < height)[:, None] & (c < channels)[None, :]

    step = split(BLOCK_T, out)
    t_first = tl.arange(0, BLOCK_T)
    if GRAD:
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    if MOMENT:
        squares = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    first = chunk * per_chunk
    for n in range(first, tl.minimum(first + per_chunk, batch)):
        sample = tl.cast(n, tl.int64)
        end = length
        if SELECTS:
            end = tl.where(tl.load(wanted_ptr + sample) != 0, length, 0)
        z, y, x = split(t_first, out)
        grad = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for start in range(0, end, BLOCK_T):
            t = start + t_first
            left = load_rows(
                *(rows_ptr + sample * row_strides[0], r, t, height, length),
                *(row_strides, ROWS_BY_POSITION, WIDE),
            )
            right = _load_columns(
                *(image_ptr + sample * image_strides[0], c, tap, z, y, x),
                *(t < length, channels, space, image_strides, KERNEL, STRIDE, PADDING),
                *(DILATION, AXES, IMAGE_BY_POSITION, WIDE, ONE_TAP),
            )
            grad = tl.dot(left, right, grad, input_precision=PRECISION)
            z, y, x = advance(z, y, x, step, out, AXES)
        # An infinite pixel times the zeros beside the rows is not a number.
        grad = tl.where(is_element, grad, 0.0)
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
    wanted: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Squared norms [batch], summed gradient [weight], summed squares [weight].

    What is not asked for is None. With `wanted`, a bool for each sample, the norms of
    the others are zero; their programs end at once.
    """
    sizes, tiles = of.sizes, tile.count(of.sizes)
    to = outputs(of, tiles, norms, grad, moment)
    _products_kernel[(to.chunks * tiles,)](
        *(of.rows, of.image, of.image if wanted is None else wanted),
        *to.pointers(of.image),
        *(sizes.batch, to.per_chunk, sizes.groups, sizes.height, sizes.channels),
        *(sizes.length, sizes.space, sizes.out, *of.strides()),
        *(norms, grad, moment, wanted is not None),
        **sizes.constants(),
        **of.layout(),
        **tile.constants(),
    )
    return to.results()
