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

from ..recording import launch
from .conv_cost import GramTile, samples_at_once
from .conv_sizes import Operands
from .conv_tiles import load_patches, load_rows, split, triangle

__all__ = ["gram_sums"]


@triton.jit
def _image_gram_kernel(
    image_ptr,  # [batch, groups * channels, *space]
    gram_ptr,  # [batch, groups, phases, 1 + cells + 1, 1 + cells + 1]
    groups, channels, space, cells, image_strides,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr, AXES: tl.constexpr, ROWS_BY_POSITION: tl.constexpr,
    IMAGE_BY_POSITION: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gram[u, v] = image[:, u] . image[:, v] of a phase, tiles on and below i = j.

    Cell u of phase p is the pixel u * stride + p. A column of zeros comes before the
    cells and a row of zeros after them: what a tap beyond the image meets. One program
    a tile of a phase of a group of a sample.

    Floor: reads the image once, writes the tiles; 2 * channels operations for each
    element of a tile. Each element of the image is requested once for each block of
    cells, and once more.
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
    width = count + 2
    gram_ptr += matrix * width * width
    at = (u + 1)[:, None] * width + (v + 1)[None, :]
    tl.store(gram_ptr + at, gram, mask=(u < count)[:, None] & (v < count)[None, :])
    if j == 0:
        tl.store(gram_ptr + (u + 1) * width, tl.zeros((BLOCK,), tl.float32), u < count)
    if i == blocks - 1:
        border = gram_ptr + (count + 1) * width
        tl.store(border + v + 1, tl.zeros((BLOCK,), tl.float32), v < count)
        if j == 0:
            tl.store(border, 0.0)


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
    gram_ptr,  # [batch, groups, phases, 1 + cells + 1, 1 + cells + 1], or unused
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

    Floor: reads the rows once, and the image or what was written of its Gram matrices
    once; 2 * height operations for each element of a tile, and without SHIFTS
    2 * channels * taps more. The rows are requested once for each block of positions,
    and once more; with SHIFTS each tile takes one element a tap.
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
        width = cells[0] * cells[1] * cells[2] + 2
        phases: tl.constexpr = STRIDE[0] * STRIDE[1] * STRIDE[2]
        gram_ptr += matrix * phases * width * width
        # The cell under a tap is that of the position, moved by a constant.
        u = (((tz * cells[1] + ty) * cells[2] + tx) + 1) * width
        v = ((sz * cells[1] + sy) * cells[2] + sx) + 1
        for tap in range(taps):
            phase, shift, limit = _shift(
                *(tap, space, KERNEL, STRIDE, PADDING, DILATION)
            )
            moved = (shift[0] * cells[1] + shift[1]) * cells[2] + shift[2]
            is_u = _is_inside(tz, ty, tx, shift, limit, t < length, AXES)
            is_v = _is_inside(sz, sy, sx, shift, limit, s < length, AXES)
            at_u = tl.where(is_u, u + moved * width, (width - 1) * width)
            at_v = tl.where(is_v, v + moved, 0) + phase * width * width
            # Above the diagonal this reads what nobody wrote, and drops it below.
            patches += tl.load(gram_ptr + (at_u[:, None] + at_v[None, :]))
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
def _shift(
    tap, space, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):  # fmt: skip
    """Which phase a tap meets; how far its cells are moved; where each axis ends."""
    kz, ky, kx = split(tap, KERNEL)
    phase_z, z, end_z = _shift_axis(kz, space[0], 0, STRIDE, PADDING, DILATION)
    phase_y, y, end_y = _shift_axis(ky, space[1], 1, STRIDE, PADDING, DILATION)
    phase_x, x, end_x = _shift_axis(kx, space[2], 2, STRIDE, PADDING, DILATION)
    phase = (phase_z * STRIDE[1] + phase_y) * STRIDE[2] + phase_x
    return phase, (z, y, x), (end_z, end_y, end_x)


@triton.jit
def _shift_axis(
    k, size, AXIS: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr,
    DILATION: tl.constexpr,
):  # fmt: skip
    """K * dilation - padding = shift * stride + phase; and the phase's cells."""
    # A multiple of the stride is added, so that nothing is negative.
    above = k * DILATION[AXIS] + PADDING[AXIS] * (STRIDE[AXIS] - 1)
    phase = above % STRIDE[AXIS]
    shift = above // STRIDE[AXIS] - PADDING[AXIS]
    return phase, shift, (size - phase + STRIDE[AXIS] - 1) // STRIDE[AXIS]


@triton.jit
def _is_inside(z, y, x, shift, limit, exists, AXES: tl.constexpr):
    """Whether cells that are moved by `shift` are of the image."""
    inside = exists & (x + shift[2] >= 0) & (x + shift[2] < limit[2])
    if AXES > 1:
        inside = inside & (y + shift[1] >= 0) & (y + shift[1] < limit[1])
    if AXES > 2:
        inside = inside & (z + shift[0] >= 0) & (z + shift[0] < limit[0])
    return inside


def gram_sums(of: Operands, tile: GramTile) -> Tensor:
    """Parts of R = |dW_n|^2 and of Q = sum_t |rows_t|^2 |patch_t|^2 of each sample.

    `[batch, 2, groups * pairs]`; operands as they shall lie. The smaller R / Q, the
    less of float32's precision is left in R.
    """
    sizes = of.sizes
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
    return sums


def _image_gram(of: Operands, tile: GramTile, gram: Tensor) -> None:
    sizes = of.sizes
    matrices = sizes.batch * sizes.groups * sizes.phases
    launch(
        _image_gram_kernel,
        (matrices * tile.pairs(math.prod(sizes.cells)),),
        *(of.image, gram, sizes.groups, sizes.channels, sizes.space, sizes.cells),
        of.strides()[1],
        **of.layout(),
        **sizes.constants(),
        **tile.constants(),
    )


def _pairs(of: Operands, tile: GramTile, gram: Tensor, sums: Tensor) -> None:
    sizes = of.sizes
    launch(
        _pairs_kernel,
        (sizes.batch * sizes.groups * tile.pairs(sizes.length),),
        *(of.rows, of.image, gram, sums, sizes.groups, sizes.height, sizes.channels),
        *(sizes.length, sizes.space, sizes.out, sizes.cells),
        *of.strides(),
        SHIFTS=tile.shifts,
        **sizes.constants(),
        **of.layout(),
        **tile.constants(),
    )
