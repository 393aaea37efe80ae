"""Parts of kernels of dense gradients, on tiles of matrices."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gradient_tile", "lower_triangle", "row_products", "swizzled"]


@triton.jit
def lower_triangle(number):
    """Row and column of the tile `number` of a lower triangle, row by row."""
    row = ((tl.sqrt(8.0 * number.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root may be rounded across an integer.
    row = tl.where((row + 1) * (row + 2) // 2 <= number, row + 1, row)
    row = tl.where(row * (row + 1) // 2 > number, row - 1, row)
    return row, number - row * (row + 1) // 2


@triton.jit
def swizzled(number, rows, columns, GROUP: tl.constexpr):
    """Row and column of the tile `number` of a matrix of tiles.

    Numbers run down GROUP rows before they go to the next column, so that programs of
    neighbouring numbers read few distinct rows and columns of tiles.
    """
    first = number // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    place = number % (GROUP * columns)
    return first + place % height, place // height


@triton.jit
def row_products(
    x_ptr,
    at_t,
    at_s,
    is_t,
    is_s,
    width,
    TIME: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_t . x_s of the rows of `width` that begin at the offsets at_t and at_s."""
    inner = tl.arange(0, INNER)
    x_t = x_ptr + at_t[:, None] + inner[None, :]
    x_s = x_ptr + at_s[None, :] + inner[:, None]
    products = tl.zeros((TIME, TIME), tl.float32)
    for start in range(0, width, INNER):
        left = inner < width - start
        t = tl.load(x_t + start, mask=is_t[:, None] & left[None, :], other=0.0)
        s = tl.load(x_s + start, mask=is_s[None, :] & left[:, None], other=0.0)
        products = tl.dot(t, s, products, input_precision=PRECISION)
    return products


@triton.jit
def gradient_tile(
    a_ptr,  # [time, d_in]
    g_ptr,  # [time, d_out]
    outs,
    ins,
    time,
    d_in,
    d_out,
    a_time,
    g_time,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TIME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_t g[t, outs] (outer) a[t, ins] of one sample, zero outside of the matrix."""
    steps = tl.arange(0, TIME)
    is_out, is_in = outs < d_out, ins < d_in
    total = tl.zeros((OUT, IN), tl.float32)
    rows = steps.to(tl.int64)
    a_at = a_ptr + rows[:, None] * a_time + ins[None, :]
    g_at = g_ptr + rows[None, :] * g_time + outs[:, None]
    step = tl.full((), TIME, tl.int64)
    for start in range(0, time, TIME):
        is_step = steps < time - start
        a = tl.load(a_at, mask=is_step[:, None] & is_in[None, :], other=0.0)
        g = tl.load(g_at, mask=is_step[None, :] & is_out[:, None], other=0.0)
        total = tl.dot(g, a, total, input_precision=PRECISION)
        a_at += step * a_time
        g_at += step * g_time
    # An infinite input times the zeros beside the matrix is not a number.
    return tl.where(is_out[:, None] & is_in[None, :], total, 0.0)
