"""Squared norms of convolutions' weight gradients from Gram matrices over positions.

    |dW|^2 = sum_{t, s} (rows_t . rows_s) (patch_t . patch_s)

The Gram matrix of the patches is the sum over the kernel's taps of the Gram matrix of
the image, shifted: its products over channels are made once, not once a tap. With a
stride, only pixels that lie a multiple of the stride apart meet under a tap, so each
residue modulo the stride, a phase, has a Gram matrix of its own.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv_cost import GramTile, samples_at_once
from .conv_sizes import Operands
from .conv_tiles import load_patches, load_rows, split, triangle

__all__ = ["gram_parts"]


@triton.jit
def _image_gram_kernel(
    image_ptr,  # [batch, groups * channels, *space]
    gram_ptr,  # [batch, groups, phases, cells, cells]
    groups, channels, space, cells, image_strides,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, ROWS_BY_POSITION: tl.constexpr,
    IMAGE_BY_POSITION: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gram[u, v] = image[:, u] . image[:, v] of a phase, tiles on and below i = j.

    Cell u of phase p is the pixel u * stride + p. One program a tile of a phase of a
    group of a sample.

    Floor: reads the image once, writes half of the Gram matrices; batch * groups *
    phases * cells^2 * channels operations, a whole tile counting on the diagonal. Each
    element of the image is requested once for each block of cells, and once more.
    """
    count = cells[0] * cells[1] * cells[2]
    blocks = tl.cdiv(count, BLOCK)
    pairs = blocks * (blocks + 1) // 2
    phases: tl.constexpr = STRIDE[0] * STRIDE[1] * STRIDE[2]
    i, j = triangle(tl.program_id(0) % pairs, blocks)
    matrix = (tl.program_id(0) // pairs).to(tl.int64)  # n, group, phase
    pz, py, px = split((matrix % phases).to(tl.int32), STRIDE)
    group = matrix // phases % groups
    image_ptr += matrix // (phases * groups) * image_strides[0]
    image_ptr += group * channels * image_strides[1]
    u = i * BLOCK + tl.arange(0, BLOCK)
    v = j * BLOCK + tl.arange(0, BLOCK)

    gram = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        left = _load_cells(
            *(image_ptr, c, u, pz, py, px, channels, space, cells, image_strides),
            *(STRIDE, AXES, IMAGE_BY_POSITION, WIDE),
        )
        right = _load_cells(
            *(image_ptr, c, v, pz, py, px, channels, space, cells, image_strides),
            *(STRIDE, AXES, IMAGE_BY_POSITION, WIDE),
        )
        gram = tl.dot(tl.trans(left), right, gram, input_precision=PRECISION)
    at = u.to(tl.int64)[:, None] * count + v[None, :]
    mask = (u < count)[:, None] & (v < count)[None, :]
    tl.store(gram_ptr + matrix * count * count + at, gram, mask=mask)


@triton.jit
def _load_cells(
    ptr, c, u, pz, py, px, channels, space, cells, strides,
    STRIDE: tl.constexpr, AXES: tl.constexpr, BY_POSITION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Channels of the cells of a phase, [BLOCK_C, BLOCK], zero outside the image."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    z, y, x = split(u, cells)
    z, y, x = z * STRIDE[0] + pz, y * STRIDE[1] + py, x * STRIDE[2] + px
    inside = (z < space[0]) & (y < space[1]) & (x < space[2])
    pixel = x.to(index) * strides[4]
    if AXES > 1:
        pixel += y.to(index) * strides[3]
    if AXES > 2:
        pixel += z.to(index) * strides[2]
    channel = c.to(index) * strides[1]
    if BY_POSITION:
        mask = (c < channels)[:, None] & inside[None, :]
        tile = tl.load(ptr + (channel[:, None] + pixel[None, :]), mask=mask, other=0.0)
    else:
        mask = inside[:, None] & (c < channels)[None, :]
        tile = tl.load(ptr + (pixel[:, None] + channel[None, :]), mask=mask, other=0.0)
        tile = tl.trans(tile)
    return tile


@triton.jit
def _pairs_kernel(
    rows_ptr,  # [batch, groups * height, length]
    image_ptr,  # [batch, groups * channels, *space], or unused
    gram_ptr,  # [batch, groups, phases, cells, cells], or unused
    sums_ptr,  # [batch, 2, groups * pairs]
    groups, height, channels, length, space, out, cells, row_strides, image_strides,
    SHIFTS: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, ROWS_BY_POSITION: tl.constexpr,
    IMAGE_BY_POSITION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of (rows_t . rows_s)(patch_t . patch_s) over all t, s and over t = s.

    One program a tile of pairs t >= s of a group of a sample. With SHIFTS the products
    of patches are gathered from Gram matrices of the image, else made here.

    Floor: reads the rows once, and the image or its Gram matrices (half of them) once;
    batch * length^2 * groups * height operations, and without SHIFTS as many with
    channels * taps. Each row is requested once for each block of positions, and once
    more; Gram matrices, on the side t >= s, once a tap.
    """
    taps: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    blocks = tl.cdiv(length, BLOCK)
    pairs = blocks * (blocks + 1) // 2
    pair = tl.program_id(0) % pairs
    i, j = triangle(pair, blocks)
    matrix = (tl.program_id(0) // pairs).to(tl.int64)  # n, group
    n, group = matrix // groups, matrix % groups
    rows_ptr += n * row_strides[0] + group * height * row_strides[1]
    t = i * BLOCK + tl.arange(0, BLOCK)
    s = j * BLOCK + tl.arange(0, BLOCK)
    tz, ty, tx = split(t, out)
    sz, sy, sx = split(s, out)
    below = (t[:, None] >= s[None, :]) & (t < length)[:, None]

    patches = tl.zeros((BLOCK, BLOCK), tl.float32)
    if SHIFTS:
        count = cells[0] * cells[1] * cells[2]
        phases: tl.constexpr = STRIDE[0] * STRIDE[1] * STRIDE[2]
        gram_ptr += matrix * phases * count * count
        for tap in range(taps):
            phase = _phase(tap, KERNEL, STRIDE, PADDING, DILATION)
            u, is_u = _cell(
                *(tap, tz, ty, tx, space, cells),
                *(KERNEL, STRIDE, PADDING, DILATION),
            )
            v, is_v = _cell(
                *(tap, sz, sy, sx, space, cells),
                *(KERNEL, STRIDE, PADDING, DILATION),
            )
            at = (phase * count + u)[:, None] * count + v[None, :]
            mask = below & is_u[:, None] & is_v[None, :]
            patches += tl.load(gram_ptr + at, mask=mask, other=0.0)
    else:
        image_ptr += n * image_strides[0] + group * channels * image_strides[1]
        channel_blocks = tl.cdiv(channels, BLOCK_C)
        for block in range(channel_blocks * taps):
            tap = block // channel_blocks
            c = block % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
            left = _load_taps(
                *(image_ptr, c, tap, tz, ty, tx, t < length, channels, space),
                *(image_strides, KERNEL, STRIDE, PADDING, DILATION, AXES),
                *(IMAGE_BY_POSITION, WIDE),
            )
            right = _load_taps(
                *(image_ptr, c, tap, sz, sy, sx, s < length, channels, space),
                *(image_strides, KERNEL, STRIDE, PADDING, DILATION, AXES),
                *(IMAGE_BY_POSITION, WIDE),
            )
            patches = tl.dot(tl.trans(left), right, patches, input_precision=PRECISION)

    rows = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, height, BLOCK_C):
        r = start + tl.arange(0, BLOCK_C)
        left = load_rows(
            *(rows_ptr, r, t, height, length, row_strides, ROWS_BY_POSITION, WIDE)
        )
        right = load_rows(
            *(rows_ptr, r, s, height, length, row_strides, ROWS_BY_POSITION, WIDE)
        )
        rows = tl.dot(tl.trans(left), right, rows, input_precision=PRECISION)

    products = tl.where(below, rows * patches, 0.0)
    diagonal = tl.sum(tl.where(t[:, None] == s[None, :], products, 0.0))
    total = 2.0 * tl.sum(products) - diagonal
    sums_ptr += n * 2 * groups * pairs + group * pairs + pair
    tl.store(sums_ptr, total)
    tl.store(sums_ptr + groups * pairs, diagonal)


@triton.jit
def _load_taps(
    ptr, c, tap, z, y, x, exists, channels, space, strides,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, BY_POSITION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Channels of the image under one tap at positions, [BLOCK_C, BLOCK]."""
    if BY_POSITION:
        tile = load_patches(
            *(ptr, c[:, None], tap, z[None, :], y[None, :], x[None, :]),
            *((c < channels)[:, None] & exists[None, :], space, strides),
            *(KERNEL, STRIDE, PADDING, DILATION, AXES, WIDE),
        )
    else:
        tile = load_patches(
            *(ptr, c[None, :], tap, z[:, None], y[:, None], x[:, None]),
            *(exists[:, None] & (c < channels)[None, :], space, strides),
            *(KERNEL, STRIDE, PADDING, DILATION, AXES, WIDE),
        )
        tile = tl.trans(tile)
    return tile


@triton.jit
def _cell(
    tap, z, y, x, space, cells,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):  # fmt: skip
    """Cell under a tap at positions, in the tap's phase; and whether it is inside."""
    kz, ky, kx = split(tap, KERNEL)
    z = z * STRIDE[0] + (kz * DILATION[0] - PADDING[0])
    y = y * STRIDE[1] + (ky * DILATION[1] - PADDING[1])
    x = x * STRIDE[2] + (kx * DILATION[2] - PADDING[2])
    inside = (z >= 0) & (z < space[0]) & (y >= 0) & (y < space[1])
    inside = inside & (x >= 0) & (x < space[2])
    cell = (z // STRIDE[0] * cells[1] + y // STRIDE[1]) * cells[2] + x // STRIDE[2]
    return cell, inside


@triton.jit
def _phase(
    tap, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):  # fmt: skip
    """The phase whose pixels a tap meets, k * dilation - padding modulo the stride."""
    kz, ky, kx = split(tap, KERNEL)
    # A multiple of the stride is added, so that nothing is negative.
    z = (kz * DILATION[0] + PADDING[0] * (STRIDE[0] - 1)) % STRIDE[0]
    y = (ky * DILATION[1] + PADDING[1] * (STRIDE[1] - 1)) % STRIDE[1]
    x = (kx * DILATION[2] + PADDING[2] * (STRIDE[2] - 1)) % STRIDE[2]
    return (z * STRIDE[1] + y) * STRIDE[2] + x


def gram_parts(of: Operands, tile: GramTile) -> tuple[Tensor, Tensor]:
    """R = |dW_n|^2, a Gram sum, and Q = sum_t |rows_t|^2 |patch_t|^2 of each sample.

    The smaller R / Q, the less of float32's precision is left in R.
    """
    sizes = of.sizes
    of = of.packed(*tile.requests(sizes))
    pairs = tile.pairs(sizes.length)
    sums = of.rows.new_empty(sizes.batch, 2, sizes.groups * pairs, dtype=torch.float32)
    step = samples_at_once(sizes) if tile.shifts else sizes.batch
    gram = of.rows.new_empty(
        step if tile.shifts else 0, sizes.gram, dtype=torch.float32
    )
    for first in range(0, sizes.batch, step):
        part = of.samples(slice(first, first + step))
        if tile.shifts:
            _image_gram(part, tile, gram)
        _pairs(part, tile, gram, sums[first : first + step])
    total, diagonal = sums.sum(dim=2).unbind(1)
    return total, diagonal


def _image_gram(of: Operands, tile: GramTile, gram: Tensor) -> None:
    sizes = of.sizes
    matrices = sizes.batch * sizes.groups * sizes.phases
    _image_gram_kernel[(matrices * tile.pairs(math.prod(sizes.cells)),)](
        *(of.image, gram, sizes.groups, sizes.channels, sizes.space, sizes.cells),
        of.strides()[1],
        **of.layout(),
        **sizes.constants(),
        **tile.constants(),
    )


def _pairs(of: Operands, tile: GramTile, gram: Tensor, sums: Tensor) -> None:
    sizes = of.sizes
    _pairs_kernel[(sizes.batch * sizes.groups * tile.pairs(sizes.length),)](
        *(of.rows, of.image, gram, sums, sizes.groups, sizes.height, sizes.channels),
        *(sizes.length, sizes.space, sizes.out, sizes.cells),
        *of.strides(),
        SHIFTS=tile.shifts,
        **sizes.constants(),
        **of.layout(),
        **tile.constants(),
    )
