"""Squared norms of dense gradients by Gram matrices over time, in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._pieces import pieces
from ..recording import launch
from ._launch import PROGRAMS, has_vectors, side
from .dense_tiles import lower_triangle, row_products

__all__ = ["folded_sums", "gram_sums"]


@triton.jit
def _store_sums(
    sums_ptr,  # [batch, kinds, pairs of tiles]
    a,
    g,
    is_pair,
    n,
    pair,
    pairs,
    i,
    j,
    TIME: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    """The sums of a tile, twice those of pairs t > s, and their parts with t = s."""
    # Without the mask an infinite row times the zeros of a missing one is no number.
    both = tl.where(is_pair, a * g, 0.0)
    lanes = tl.arange(0, TIME)
    is_diagonal = (i == j) & (lanes[:, None] == lanes[None, :])
    times = tl.where(i == j, 1.0, 2.0)
    kinds: tl.constexpr = 4 if WITH_BIAS else 2
    place = sums_ptr + n * kinds * pairs + pair
    tl.store(place, times * tl.sum(both))
    tl.store(place + pairs, tl.sum(tl.where(is_diagonal, both, 0.0)))
    if WITH_BIAS:
        g = tl.where(is_pair, g, 0.0)
        tl.store(place + 2 * pairs, times * tl.sum(g))
        tl.store(place + 3 * pairs, tl.sum(tl.where(is_diagonal, g, 0.0)))


@triton.jit
def _gram_kernel(
    a_ptr,  # [batch, time, d_in]
    g_ptr,  # [batch, time, d_out]
    sums_ptr,  # [batch, kinds, pairs of tiles]
    pairs,
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
    WITH_BIAS: tl.constexpr,
):
    """Sums of (a_t . a_s)(g_t . g_s) over a tile of t >= s, twice off the diagonal.

    One program a tile of the lower triangle and sample. Beside the sum its part of
    sum_t |a_t|^2 |g_t|^2; WITH_BIAS both of g_t . g_s alone, for |sum_t g_t|^2.

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
    is_pair = is_t[:, None] & is_s[None, :]
    _store_sums(sums_ptr, a, g, is_pair, n, pair, pairs, i, j, TIME, WITH_BIAS)


@triton.jit
def _fold_kernel(
    a_ptr,  # [batch, time, time]
    g_ptr,  # [batch, time, time]
    sums_ptr,  # [batch, kinds, pairs of tiles]
    pairs,
    time,
    TIME: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    """As `_gram_kernel`, of products that are there: a_t . a_s and g_t . g_s.

    One program a tile of the lower triangle and sample. Floor: 4 bytes of each tile of
    both, 4 batch time (time + TIME) bytes.
    """
    pair = tl.program_id(0) % pairs
    n = (tl.program_id(0) // pairs).to(tl.int64)
    i, j = lower_triangle(pair)
    t = i * TIME + tl.arange(0, TIME)
    s = j * TIME + tl.arange(0, TIME)
    is_pair = (t < time)[:, None] & (s < time)[None, :]
    places = (n * time + t)[:, None] * time + s[None, :]
    a = tl.load(a_ptr + places, mask=is_pair, other=0.0)
    g = tl.load(g_ptr + places, mask=is_pair, other=0.0)
    _store_sums(sums_ptr, a, g, is_pair, n, pair, pairs, i, j, TIME, WITH_BIAS)


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


def gram_sums(a: Tensor, g: Tensor, with_bias: bool = False) -> Tensor:
    """Parts of the Gram sums of `[batch, time, *]`, over pairs of blocks of time.

    `[batch, kinds, pairs]`: of sum_{t,s} (a_t . a_s)(g_t . g_s) and of its diagonal
    t = s, then with the bias of sum_{t,s} g_t . g_s and of its diagonal.
    """
    batch, time = g.shape[:2]
    blocks = _blocks(a, g, time, batch)
    sums, pairs = _room(g, batch, time, blocks.time, with_bias)
    if batch * time == 0:
        return sums.zero_()
    launch(
        _gram_kernel,
        (pairs * batch,),
        *(a, g, sums, pairs, time, a.shape[2], g.shape[2]),
        *(*a.stride()[:2], *g.stride()[:2]),
        TIME=blocks.time,
        INNER=blocks.inner,
        PRECISION="ieee",
        WITH_BIAS=with_bias,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return sums


def folded_sums(a: Tensor, g: Tensor, with_bias: bool) -> Tensor:
    """As `gram_sums`, in float32, of the products of rows made by PyTorch."""
    batch, time = g.shape[:2]
    block = side(time, 64)
    sums, pairs = _room(g, batch, time, block, with_bias)
    for rows in pieces(batch, 2 * time * time * sums.itemsize):
        inputs, grads = a[rows], g[rows]
        some = sums[rows]
        launch(
            _fold_kernel,
            (pairs * len(some),),
            torch.bmm(inputs, inputs.transpose(1, 2)),
            torch.bmm(grads, grads.transpose(1, 2)),
            *(some, pairs, time),
            TIME=block,
            WITH_BIAS=with_bias,
            num_warps=4,
        )
    return sums


def _room(
    like: Tensor, batch: int, time: int, block: int, with_bias: bool
) -> tuple[Tensor, int]:
    """For the parts of the sums, and how many of each there are."""
    tiles = triton.cdiv(time, block)
    pairs = tiles * (tiles + 1) // 2
    kinds = 4 if with_bias else 2
    return like.new_empty(batch, kinds, pairs, dtype=torch.float32), pairs
