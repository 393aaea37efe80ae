"""Weight gradients of depth-wise convolutions: no products of matrices in them.

Channels lie together and go along the lanes, so that one mask and one address serve
several of them, loaded at once. A program keeps its channels of a sample in the nearest
cache, and goes over the taps of the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from .conv_copies import channels_last
from .conv_cost import depthwise_tile
from .conv_outputs import outputs
from .conv_sizes import Operands
from .conv_tiles import advance, load_patches, split

__all__ = ["depthwise_products"]


@triton.jit
def _depthwise_kernel(
    rows_ptr,  # [batch, height, length], height over all groups
    image_ptr,  # [batch, groups, *space]
    norms_ptr,  # [batch, tiles, taps]
    grad_ptr,  # [chunks, height, taps]
    moment_ptr,  # [chunks, height, taps]
    batch, per_chunk, parts, taps_each, height, multiplier, length, space, out,
    row_strides, image_strides,
    NORMS: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dW[r, tap] = sum_t rows[r, t] image[r / multiplier, ...], squared, summed.

    One program BLOCK_R rows of the weight, `taps_each` taps and a chunk of samples.

    Floor: reads rows and image once and writes tiles * batch * taps norms, chunks *
    weight elements of the sums; 2 * batch * length * weight operations. What it
    requests of the caches: the rows and the image once a tap.
    """
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    tiles = tl.cdiv(height, BLOCK_R)
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts % tiles
    chunk = tl.program_id(0) // parts // tiles
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    is_row = r < height
    row, channel = r.to(index) * row_strides[1], r // multiplier
    step = split(BLOCK_T, out)
    t_first = tl.arange(0, BLOCK_T)
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, batch)
    for tap in range(part * taps_each, tl.minimum(part * taps_each + taps_each, taps)):
        if GRAD:
            total = tl.zeros((BLOCK_R,), tl.float32)
        if MOMENT:
            squares = tl.zeros((BLOCK_R,), tl.float32)
        for n in range(first, last):
            sample = tl.cast(n, tl.int64)
            of_rows = rows_ptr + sample * row_strides[0]
            of_image = image_ptr + sample * image_strides[0]
            z, y, x = split(t_first, out)
            products = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for start in range(0, length, BLOCK_T):
                t = start + t_first
                mask = (t < length)[:, None] & is_row[None, :]
                place = (t.to(index) * row_strides[2])[:, None] + row[None, :]
                left = tl.load(of_rows + place, mask=mask, other=0.0)
                right = load_patches(
                    *(of_image, channel[None, :], tap),
                    *(z[:, None], y[:, None], x[:, None], mask, space, image_strides),
                    *(KERNEL, STRIDE, PADDING, DILATION, AXES, WIDE),
                )
                products += left.to(tl.float32) * right.to(tl.float32)
                z, y, x = advance(z, y, x, step, out, AXES)
            # An infinite gradient times the zeros beside the image is not a number.
            grad = tl.where(is_row, tl.sum(products, axis=0), 0.0)
            if NORMS:
                place = (sample * tiles + tile) * taps + tap
                tl.store(norms_ptr + place, tl.sum(grad * grad))
            if GRAD:
                total += grad
            if MOMENT:
                squares += grad * grad
        at = (tl.cast(chunk, tl.int64) * height + r) * taps + tap
        if GRAD:
            tl.store(grad_ptr + at, total, mask=is_row)
        if MOMENT:
            tl.store(moment_ptr + at, squares, mask=is_row)


def depthwise_products(
    of: Operands, *, norms: bool = False, grad: bool = False, moment: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Squared norms [batch], summed gradient [weight], summed squares [weight].

    What is not asked for is None.
    """
    of = Operands(_lying(of.rows), _lying(of.image), of.sizes)
    sizes, tile = of.sizes, depthwise_tile(of.sizes)
    tiles = tile.count(sizes)
    to = outputs(of, tiles, norms, grad, moment, norms_a_tile=sizes.taps)
    parts, taps_each = tile.taps(sizes, to.chunks)
    launch(
        _depthwise_kernel,
        (to.chunks * tiles * parts,),
        *(of.rows, of.image, *to.pointers(of.image)),
        *(sizes.batch, to.per_chunk, parts, taps_each),
        *(sizes.groups * sizes.height, sizes.height, sizes.length, sizes.space),
        *(sizes.out, *of.strides(), norms, grad, moment),
        WIDE=of.layout()["WIDE"],
        **sizes.constants(),
        **tile.constants(),
    )
    return to.results()


def _lying(x: Tensor) -> Tensor:
    """With channels that lie together."""
    return x if x.stride(1) == 1 else channels_last(x)
