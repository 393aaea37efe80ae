"""Squared norms of dense gradients by Gram matrices over time, in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import PROGRAMS, has_vectors, one_dtype, side
from .dense_tiles import lower_triangle, row_products

__all__ = ["GramSums", "gram_sums"]


@triton.jit
def _gram_kernel(
    a_ptr,  # [batch, time, d_in]
    g_ptr,  # [batch, time, d_out]
    sums_ptr,  # [batch, pairs of tiles]
    diagonals_ptr,  # [batch, tiles]
    pairs,
    tiles,
    time,
    d_in,
    d_out,
    a_batch,
    a_time,
    g_batch,
    g_time,
    TIME: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of (a_t . a_s)(g_t . g_s) over a tile of t >= s, twice off the diagonal.

    One program a tile of the lower triangle and sample; diagonals[n] are the parts of
    sum_t |a_t|^2 |g_t|^2.

    Floor, with e bytes an element: a and g once, e batch time (d_in + d_out) bytes;
    TIME^2 (d_in + d_out) multiply-adds for each of the tiles (tiles + 1) / 2 pairs of a
    sample, which is half of the square of `time` and half a tile beside.
    """
    pair = tl.program_id(0) % pairs
    n = (tl.program_id(0) // pairs).to(tl.int64)
    i, j = lower_triangle(pair)
    t = i * TIME + tl.arange(0, TIME)
    s = j * TIME + tl.arange(0, TIME)
    is_t, is_s = t < time, s < time
    t_row, s_row = t.to(tl.int64), s.to(tl.int64)
    a = row_products(
        a_ptr + n * a_batch,
        t_row * a_time,
        s_row * a_time,
        is_t,
        is_s,
        d_in,
        TIME,
        INNER,
        PRECISION,
    )
    g = row_products(
        g_ptr + n * g_batch,
        t_row * g_time,
        s_row * g_time,
        is_t,
        is_s,
        d_out,
        TIME,
        INNER,
        PRECISION,
    )
    # Without the mask an infinite row times the zeros of a missing one is no number.
    both = tl.where(is_t[:, None] & is_s[None, :], a * g, 0.0)
    total = tl.sum(both)
    tl.store(sums_ptr + n * pairs + pair, tl.where(i == j, total, 2.0 * total))
    if i == j:
        diagonal = tl.sum(tl.where(t[:, None] == s[None, :], both, 0.0))
        tl.store(diagonals_ptr + n * tiles + i, diagonal)


@triton.jit
def _finish_kernel(
    sums_ptr,  # [batch, pairs]
    diagonals_ptr,  # [batch, tiles]
    norms_ptr,  # [batch]
    is_lost_ptr,  # [batch]
    pairs,
    tiles,
    share,
    BLOCK: tl.constexpr,
):
    """norms[n] = sum of its parts, not below 0; is_lost where < share * diagonal.

    One program a sample. Floor: 4 batch (pairs + tiles) bytes.
    """
    n = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pairs, BLOCK):
        at = start + lanes
        sums += tl.load(sums_ptr + n * pairs + at, mask=at < pairs, other=0.0)
    diagonals = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, tiles, BLOCK):
        at = start + lanes
        diagonals += tl.load(diagonals_ptr + n * tiles + at, mask=at < tiles, other=0.0)
    norm = tl.sum(sums)
    tl.store(is_lost_ptr + n, (norm < share * tl.sum(diagonals)).to(tl.int32))
    tl.store(norms_ptr + n, tl.where(norm < 0.0, 0.0, norm))  # keeps what is no number


class _Blocks(NamedTuple):
    """Launch configuration of `_gram_kernel`."""

    time: int
    inner: int
    warps: int
    stages: int


def _blocks(a: Tensor, g: Tensor, time: int, batch: int) -> _Blocks:
    """Blocks for tensor cores in half precision, for multiply-adds in float32.

    Tiles of 128 halve the reads of tiles of 64, but leave most of the GPU idle where
    there are few. Rows that are read element by element have an address each, which
    takes the registers of twice the threads.
    """
    is_wide = has_vectors(a) and has_vectors(g)
    if g.dtype == torch.float32:
        return _Blocks(side(time, 64), 16, 2 if time <= 32 else 4 if is_wide else 8, 3)
    if time <= 32:
        return _Blocks(side(time, 32), 128 if time <= 16 else 64, 2, 4)
    tiles = triton.cdiv(time, 128)
    is_full = batch * tiles * (tiles + 1) // 2 >= PROGRAMS // 2
    if time > 64 and is_full and is_wide:
        return _Blocks(128, 64, 8, 3)
    return _Blocks(64, 64, 4 if is_wide else 8, 4)


class GramSums(NamedTuple):
    """Squared norms, and 1 where too little of the sum was left by cancellation."""

    norms: Tensor
    is_lost: Tensor


def gram_sums(a: Tensor, g: Tensor, share: float) -> GramSums:
    """Launch the Gram kernels on `[batch, time, *]`.

    `share` as from `fastminima.ops.cost.dense.guard_on_gpu`.
    """
    a, g = one_dtype(a, g)
    batch, time = g.shape[:2]
    norms = g.new_empty(batch, dtype=torch.float32)
    is_lost = g.new_empty(batch, dtype=torch.int32)
    if batch * time == 0:
        return GramSums(norms.zero_(), is_lost.zero_())
    blocks = _blocks(a, g, time, batch)
    tiles = triton.cdiv(time, blocks.time)
    pairs = tiles * (tiles + 1) // 2
    sums = norms.new_empty(batch, pairs)
    diagonals = norms.new_empty(batch, tiles)
    _gram_kernel[pairs * batch,](
        *(a, g, sums, diagonals, pairs, tiles, time, a.shape[2], g.shape[2]),
        *(*a.stride()[:2], *g.stride()[:2]),
        TIME=blocks.time,
        INNER=blocks.inner,
        PRECISION="ieee",
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    _finish_kernel[batch,](
        sums, diagonals, norms, is_lost, pairs, tiles, share, BLOCK=256
    )
    return GramSums(norms, is_lost)
