"""Weight gradients of depth-wise convolutions: no products of matrices in them."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from .conv_cost import depthwise_tile
from .conv_outputs import outputs
from .conv_sizes import Operands
from .conv_tiles import advance, load_patches, split

__all__ = ["depthwise_products"]


@triton.jit
def _depthwise_kernel(
    rows_ptr,  # [batch, height, length], height over all groups
    image_ptr,  # [batch, groups, *space]
    norms_ptr,  # [batch, tiles]
    grad_ptr,  # [chunks, height, taps]
    moment_ptr,  # [chunks, height, taps]
    batch, per_chunk, height, multiplier, length, space, out,
    row_strides, image_strides,
    NORMS: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dW[r, tap] = sum_t rows[r, t] image[r / multiplier, ...], squared, summed.

    One program a tile [BLOCK_R, BLOCK_K] of the weight and a chunk of samples.

    Floor: reads rows and image once and writes tiles * batch norms, chunks * weight
    elements of the sums; 2 * batch * length * weight operations. What it requests of
    the caches: the rows once for each block of taps, the image once a tap.
    """
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tap_blocks: tl.constexpr = (taps + BLOCK_K - 1) // BLOCK_K
    tiles = tl.cdiv(height, BLOCK_R) * tap_blocks
    tile = tl.program_id(0) % tiles
    chunk = tl.program_id(0) // tiles
    r = tile // tap_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    tap = tile % tap_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    is_element = (r < height)[:, None] & (tap < taps)[None, :]
    row, channel = r.to(index) * row_strides[1], r // multiplier

    step = split(BLOCK_T, out)
    t_first = tl.arange(0, BLOCK_T)
    if GRAD:
        total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if MOMENT:
        squares = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    first = chunk * per_chunk
    for n in range(first, tl.minimum(first + per_chunk, batch)):
        sample = tl.cast(n, tl.int64)
        of_rows = rows_ptr + sample * row_strides[0]
        of_image = image_ptr + sample * image_strides[0]
        z, y, x = split(t_first, out)
        products = tl.zeros((BLOCK_R, BLOCK_K, BLOCK_T), tl.float32)
        for start in range(0, length, BLOCK_T):
            t = start + t_first
            exists = (t < length)[None, None, :]
            left = tl.load(
                of_rows + row[:, None] + (t.to(index) * row_strides[2])[None, :],
                mask=(r < height)[:, None] & (t < length)[None, :],
                other=0.0,
            )
            right = load_patches(
                *(of_image, channel[:, None, None], tap[None, :, None]),
                *(z[None, None, :], y[None, None, :], x[None, None, :]),
                *(is_element[:, :, None] & exists, space, image_strides),
                *(KERNEL, STRIDE, PADDING, DILATION, AXES, WIDE),
            )
            products += left.to(tl.float32)[:, None, :] * right.to(tl.float32)
            z, y, x = advance(z, y, x, step, out, AXES)
        grad = tl.where(is_element, tl.sum(products, axis=2), 0.0)
        if NORMS:
            tl.store(norms_ptr + sample * tiles + tile, tl.sum(grad * grad))
        if GRAD:
            total += grad
        if MOMENT:
            squares += grad * grad

    at = r.to(tl.int64)[:, None] * taps + tap[None, :]
    at += tl.cast(chunk, tl.int64) * height * taps
    if GRAD:
        tl.store(grad_ptr + at, total, mask=is_element)
    if MOMENT:
        tl.store(moment_ptr + at, squares, mask=is_element)


def depthwise_products(
    of: Operands, *, norms: bool = False, grad: bool = False, moment: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Squared norms [batch], summed gradient [weight], summed squares [weight].

    What is not asked for is None.
    """
    sizes, tile = of.sizes, depthwise_tile(of)
    tiles = tile.count(sizes)
    to = outputs(of, tiles, norms, grad, moment)
    launch(
        _depthwise_kernel,
        (to.chunks * tiles,),
        *(of.rows, of.image, *to.pointers(of.image)),
        *(sizes.batch, to.per_chunk, sizes.groups * sizes.height, sizes.height),
        *(sizes.length, sizes.space, sizes.out, *of.strides()),
        *(norms, grad, moment),
        WIDE=of.layout()["WIDE"],
        **sizes.constants(),
        **tile.constants(),
    )
    return to.results()
