"""How kernels of convolutions find their way through rows, image and kernel.

Positions `t` of the rows and taps `k` of the kernel have three axes z, y, x; `AXES`
says how many of them, from the last, a convolution really has. Row r of a weight
gradient and its column (c, k) have the element

    sum_t rows[r, t] * image[c, t * stride + k * dilation - padding].
"""

import triton
import triton.language as tl

__all__ = ["advance", "load_patches", "load_rows", "split", "tap_of_column", "triangle"]


@triton.jit
def split(index, size):
    """Coordinates (z, y, x) of a flat index into a box of `size`."""
    return index // (size[1] * size[2]), index // size[2] % size[1], index % size[2]


@triton.jit
def advance(z, y, x, step, size, AXES: tl.constexpr):
    """Coordinates in a box of `size`, moved on by `step`, itself a position there.

    Division-free, for it is done at each step of a kernel's innermost loop. Beyond the
    box only the first axis that there is goes wrong.
    """
    x += step[2]
    if AXES > 1:
        over = x >= size[2]
        x = tl.where(over, x - size[2], x)
        y += step[1] + over.to(tl.int32)
    if AXES > 2:
        over = y >= size[1]
        y = tl.where(over, y - size[1], y)
        z += step[0] + over.to(tl.int32)
    return z, y, x


@triton.jit
def tap_of_column(block, KERNEL: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr):
    """Channels and taps of a block of columns.

    With `ONE`, a block is `BLOCK` channels of one tap and the tap a scalar, which makes
    whether it lies inside the image a matter of positions only. Else columns (c, tap)
    go by as they do in the weight: for images of few channels.
    """
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    if ONE:
        c = block // taps * BLOCK + tl.arange(0, BLOCK)
        tap = block % taps
    else:
        column = block * BLOCK + tl.arange(0, BLOCK)
        c = column // taps
        tap = column % taps
    return c, tap


@triton.jit
def load_rows(
    ptr,  # of the first row of a sample's group
    r,  # [BLOCK_R]
    t,  # [BLOCK_T]
    height,
    length,
    strides,  # of sample, row, position
    BY_POSITION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """rows[r, t] as a tile [BLOCK_R, BLOCK_T], zero outside."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    row, position = r.to(index) * strides[1], t.to(index) * strides[2]
    if BY_POSITION:
        mask = (r < height)[:, None] & (t < length)[None, :]
        tile = tl.load(ptr + (row[:, None] + position[None, :]), mask=mask, other=0.0)
    else:
        mask = (t < length)[:, None] & (r < height)[None, :]
        tile = tl.load(ptr + (position[:, None] + row[None, :]), mask=mask, other=0.0)
        tile = tl.trans(tile)
    return tile


@triton.jit
def _axis(
    offset, inside, t, k, size, stride, AXIS: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, DILATION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds one axis of image[t * stride + k * dilation - padding]."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    at = t * STRIDE[AXIS] + (k * DILATION[AXIS] - PADDING[AXIS])
    if PADDING[AXIS] > 0:
        inside = inside & (at >= 0) & (at < size)
    return offset + at.to(index) * stride, inside


@triton.jit
def load_patches(
    ptr,  # of the first channel of a sample's group
    c, tap, z, y, x, inside, space, strides,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """image[c, t * stride + k * dilation - padding] for t = (z, y, x), zero outside.

    Channels and taps broadcast against positions: the tile has the order of its
    arguments, [..., 1] and [1, ...]. `inside` tells which channels and positions exist.
    """
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    kz, ky, kx = split(tap, KERNEL)
    offset, inside = _axis(
        *(c.to(index) * strides[1], inside, x, kx, space[2], strides[4]),
        *(2, STRIDE, PADDING, DILATION, WIDE),
    )
    if AXES > 1:
        offset, inside = _axis(
            *(offset, inside, y, ky, space[1], strides[3]),
            *(1, STRIDE, PADDING, DILATION, WIDE),
        )
    if AXES > 2:
        offset, inside = _axis(
            *(offset, inside, z, kz, space[0], strides[2]),
            *(0, STRIDE, PADDING, DILATION, WIDE),
        )
    return tl.load(ptr + offset, mask=inside, other=0.0)


@triton.jit
def triangle(pair, blocks):
    """Block row and column, i >= j, of the pair-th block of a lower triangle.

    Rows i from the bottom, together with rows from the top, fill lines of one length:
    no square root is needed.
    """
    even = 1 - blocks % 2
    line, place = pair // (blocks + even), pair % (blocks + even)
    of_bottom = blocks - line
    is_bottom = place < of_bottom
    i = tl.where(is_bottom, of_bottom - 1, line - 1 + even)
    return i, tl.where(is_bottom, place, place - of_bottom)
