"""Statistics of dense gradients with one row a sample, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from ._launch import one_dtype, power_of_two, split
from .dense_tiles import swizzled
from .totals import first_added

__all__ = ["row_sq_norms", "row_sums"]

_LANES = 4096  # elements that a program of `_row_norms_kernel` loads at a time
_SIDE, _SAMPLES = 64, 16  # the tile of a program of `_row_sums_kernel`, rows at a time


@triton.jit
def _load_row(at, is_row, left, lanes):
    """Elements of rows that are there, float32."""
    mask = is_row[:, None] & (lanes < left)[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _row_norms_kernel(
    a_ptr,  # [batch, d_in]
    g_ptr,  # [batch, d_out]
    weight_ptr,  # [batch]
    bias_ptr,  # [batch]
    batch,
    d_in,
    d_out,
    a_batch,
    g_batch,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight[n] = |a_n|^2 |g_n|^2 and bias[n] = |g_n|^2, ROWS samples a program.

    Both rows are asked for before either is waited for.

    Floor, with e bytes an element: a and g once, batch (e (d_in + d_out) + 8) bytes.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = rows < batch
    lanes = tl.arange(0, BLOCK)
    a_at = a_ptr + rows[:, None] * a_batch + lanes[None, :]
    g_at = g_ptr + rows[:, None] * g_batch + lanes[None, :]
    a_squares = tl.zeros((ROWS, BLOCK), tl.float32)
    g_squares = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, tl.maximum(d_in, d_out), BLOCK):
        a = _load_row(a_at + start, is_row, d_in - start, lanes)
        g = _load_row(g_at + start, is_row, d_out - start, lanes)
        a_squares += a * a
        g_squares += g * g
    bias = tl.sum(g_squares, axis=1)
    tl.store(weight_ptr + rows, tl.sum(a_squares, axis=1) * bias, mask=is_row)
    tl.store(bias_ptr + rows, bias, mask=is_row)


def row_sq_norms(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastminima.ops.dense.row_sq_norms`."""
    a, g = one_dtype(a, g)
    # Each in memory of its own: a recording puts them into rows of a table.
    weight, bias = (g.new_empty(len(g), dtype=torch.float32) for _ in range(2))
    if len(g) == 0:
        return weight, bias
    width = max(1, a.shape[1], g.shape[1])
    block = min(_LANES, max(64, power_of_two(width)))
    rows = _LANES // block
    launch(
        _row_norms_kernel,
        (triton.cdiv(len(g), rows),),
        *(a, g, weight, bias, len(g), a.shape[1], g.shape[1]),
        *(a.stride(0), g.stride(0)),
        ROWS=rows,
        BLOCK=block,
        num_warps=8,
    )
    return weight, bias


@triton.jit
def _row_sums_kernel(
    a_ptr,  # [batch, d_in]
    g_ptr,  # [batch, d_out]
    grads_ptr,  # [parts, d_out, d_in]
    squares_ptr,  # [parts, d_out, d_in]
    tiles,
    each,
    batch,
    d_in,
    d_out,
    a_batch,
    g_batch,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    SAMPLES: tl.constexpr,
    SQUARES: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
):
    """sum_n g_n (outer) a_n and the same of the elements' squares, over `each` samples.

    One program a tile and part of the batch. Squares overflow float16, so they are
    multiplied in float32, where those of half precisions have up to 22 bits: exactly
    two TF32 parts, which three products on tensor cores multiply to 2^-22.

    Floor, with e bytes an element: a and g once, e batch (d_in + d_out) bytes, and
    4 parts d_in d_out for each output; batch d_in d_out multiply-adds for each.
    """
    tile = tl.program_id(0) % tiles
    part = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = swizzled(tile, tl.cdiv(d_out, OUT), tl.cdiv(d_in, IN), GROUP=8)
    outs, ins = row * OUT + tl.arange(0, OUT), column * IN + tl.arange(0, IN)
    is_out, is_in = outs < d_out, ins < d_in
    steps = tl.arange(0, SAMPLES)
    first = part * each
    samples = first + steps
    a_at = a_ptr + samples[:, None] * a_batch + ins[None, :]
    g_at = g_ptr + samples[None, :] * g_batch + outs[:, None]
    count = tl.minimum(batch - first, each).to(tl.int32)
    step = tl.full((), SAMPLES, tl.int64)
    grad = tl.zeros((OUT, IN), tl.float32)
    squares = tl.zeros((OUT, IN), tl.float32)
    for start in range(0, count, SAMPLES):
        is_sample = steps < count - start
        a = tl.load(a_at, mask=is_sample[:, None] & is_in[None, :], other=0.0)
        g = tl.load(g_at, mask=is_sample[None, :] & is_out[:, None], other=0.0)
        if WITH_GRAD:
            grad = tl.dot(g, a, grad, input_precision="ieee")
        if WITH_SQUARES:
            a, g = a.to(tl.float32), g.to(tl.float32)
            squares = tl.dot(g * g, a * a, squares, input_precision=SQUARES)
        a_at += step * a_batch
        g_at += step * g_batch
    places = (part * d_out + outs)[:, None] * d_in + ins[None, :]
    is_place = is_out[:, None] & is_in[None, :]
    if WITH_GRAD:
        tl.store(grads_ptr + places, grad, mask=is_place)
    if WITH_SQUARES:
        tl.store(squares_ptr + places, squares, mask=is_place)


def row_sums(
    a: Tensor, g: Tensor, with_grad: bool, with_squares: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Sum over rows of g (outer) a, and of its square, each on request."""
    a, g = one_dtype(a, g)
    d_in, d_out = a.shape[1], g.shape[1]
    tiles = triton.cdiv(d_in, _SIDE) * triton.cdiv(d_out, _SIDE)
    parts, each = split(triton.cdiv(len(g), _SAMPLES), tiles)
    sums = [
        g.new_empty(parts, d_out, d_in, dtype=torch.float32) if wanted else None
        for wanted in (with_grad, with_squares)
    ]
    if a.numel() * g.numel() == 0:
        return tuple(x if x is None else x[0].zero_() for x in sums)
    unused = next(x for x in sums if x is not None)
    launch(
        _row_sums_kernel,
        (tiles * parts,),
        *(a, g, *(unused if x is None else x for x in sums)),
        *(tiles, each * _SAMPLES, len(g), d_in, d_out, a.stride(0), g.stride(0)),
        OUT=_SIDE,
        IN=_SIDE,
        SAMPLES=_SAMPLES,
        SQUARES="ieee" if a.dtype == torch.float32 else "tf32x3",
        WITH_GRAD=with_grad,
        WITH_SQUARES=with_squares,
        num_warps=4,
        num_stages=3,
    )
    return tuple(x if x is None else first_added(x) for x in sums)
