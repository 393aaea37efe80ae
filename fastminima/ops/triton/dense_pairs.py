"""Inner products between the samples' dense gradients, in Triton.

Two ways, of which the cheaper by sizes is taken. *Rows*: the products of the rows of
`a` times those of the rows of `g`, summed over the two samples' time steps; no gradient
is made, and as in `dense.gram_sq_norms` little precision is left where the steps of a
sample nearly cancel. *Gradients*: some tiles of all samples' gradients at a time, in a
scratch tensor that stays in the GPU's cache, and their inner products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import dense_pairs
from .._pieces import lower_blocks, square_side, step_of
from ..recording import launch
from ._launch import power_of_two, side
from .dense_tiles import lower_triangle

__all__ = ["sequence_gram"]

# Fewer tiles than multiprocessors (108 to 148) would leave some idle.
PROGRAMS = 144
SCRATCH_BYTES = 32 << 20  # of a cache of 40 MB or more
SCRATCH_ROWS = 64


class _Blocks(NamedTuple):
    """Sizes of the tiles of a matrix product: rows, inner dimension, warps."""

    rows: int
    inner: int
    warps: int
    stages: int


# By rows of a tile, the largest first: with 128 a byte of half inputs meets 64
# operations, what it takes to be bound by tensor cores and not by the L2 cache. Without
# tensor cores (float32 in full precision) the sums of a tile of 64 fill the registers,
# and few warps with many sums each load least from shared memory: 1.6 cycles for 1 of
# arithmetic with 4 warps, 2.1 with 8.
_HALF = (_Blocks(128, 64, 8, 3), _Blocks(64, 64, 4, 3), _Blocks(32, 64, 4, 3))
_FLOAT = (_Blocks(64, 16, 4, 3), _Blocks(32, 32, 2, 2), _Blocks(16, 32, 2, 2))


class _Gradients(NamedTuple):
    """Sizes of the tiles of gradients: outputs, inputs, time steps, warps, stages."""

    outs: int
    ins: int
    time: int
    warps: int
    stages: int

    @classmethod
    def of(cls, d_in: int, d_out: int, dtype: torch.dtype) -> _Gradients:
        """Tiles of 128 x 128, or less if there is less."""
        time = 16 if dtype == torch.float32 else 64
        outs, ins = side(d_out, 128), side(d_in, 128)
        return cls(outs, ins, time, 8 if outs * ins > 8192 else 4, 3)


@triton.jit
def _products(
    x_ptr,  # [batch, time, width]
    n, t, m, s, batch, time, width, x_n, x_t,
    INNER: tl.constexpr,
):  # fmt: skip
    """x[n, t] . x[m, s] for vectors of samples and of time steps."""
    k = tl.arange(0, INNER)
    left = x_ptr + (n.to(tl.int64) * x_n + t.to(tl.int64) * x_t)[:, None] + k[None, :]
    right = x_ptr + (m.to(tl.int64) * x_n + s.to(tl.int64) * x_t)[None, :] + k[:, None]
    is_left = ((n < batch) & (t < time))[:, None]
    is_right = ((m < batch) & (s < time))[None, :]
    total = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    for first in range(0, width, INNER):
        here = k < width - first
        x = tl.load(left + first, mask=is_left & here[None, :], other=0.0)
        y = tl.load(right + first, mask=is_right & here[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["batch"])
def _row_pairs_kernel(
    a_ptr,  # [batch, time, d_in]
    g_ptr,  # [batch, time, d_out]
    out_ptr,  # [batch * spans, batch * spans]
    batch, time, d_in, d_out, spans, a_n, a_t, g_n, g_t,
    SAMPLES: tl.constexpr, TIME: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[i, j] = sum_{t, s} (a_t . a_s)(g_t . g_s) over the steps of parts i and j.

    A part is TIME time steps of one sample. A program takes the pairs of two blocks of
    SAMPLES parts, of which more than one only where a part is a whole sample.

    Floor: a and g read once, 4 bytes written a pair of parts; with b blocks of rows,
    (1 + 1 / b) batch^2 time^2 (d_in + d_out) operations. Each tile reads its two blocks
    of rows again.
    """
    row, column = lower_triangle(tl.program_id(0))
    r = tl.arange(0, SAMPLES * TIME)
    n, t = row // spans * SAMPLES + r // TIME, row % spans * TIME + r % TIME
    m, s = column // spans * SAMPLES + r // TIME, column % spans * TIME + r % TIME
    pairs = _products(a_ptr, n, t, m, s, batch, time, d_in, a_n, a_t, INNER)
    pairs *= _products(g_ptr, n, t, m, s, batch, time, d_out, g_n, g_t, INNER)
    pairs = tl.reshape(pairs, (SAMPLES, TIME, SAMPLES, TIME))
    _store_both(
        out_ptr, tl.sum(tl.sum(pairs, axis=3), axis=1),
        row * SAMPLES + tl.arange(0, SAMPLES),
        column * SAMPLES + tl.arange(0, SAMPLES), batch * spans,
    )  # fmt: skip


@triton.jit
def _store_both(out_ptr, tile, i, j, size):
    """Store the part of a tile below and on the diagonal, and its mirror image.

    So the matrix is symmetric to the last bit, also where the tile is not.
    """
    i, j = i[:, None], j[None, :]
    below = out_ptr + i.to(tl.int64) * size + j
    above = out_ptr + j.to(tl.int64) * size + i
    tl.store(below, tile, mask=(i < size) & (j <= i))
    tl.store(above, tile, mask=(i < size) & (j < i))


@triton.jit(do_not_specialize=["first", "tiles"])
def _gradient_tiles_kernel(
    a_ptr,  # [batch, time, d_in]
    g_ptr,  # [batch, time, d_out]
    out_ptr,  # [batch, tiles, OUT * IN]
    first, tiles, time, d_in, d_out, a_n, a_t, g_n, g_t,
    OUT: tl.constexpr, IN: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    """out[n, i] = the tile `first` + i of sum_t g[n, t] (outer) a[n, t].

    Floor: the tiles' columns of a and g read once, 4 bytes written an element of the
    tiles; 2 time operations an element. Each row of tiles reads a again, each column g.
    """
    i, n = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    columns = tl.cdiv(d_in, IN)
    outs = (first + i) // columns * OUT + tl.arange(0, OUT)
    ins = (first + i) % columns * IN + tl.arange(0, IN)
    t = tl.arange(0, TIME)
    g_ptrs = g_ptr + n * g_n + t.to(tl.int64)[None, :] * g_t + outs[:, None]
    a_ptrs = a_ptr + n * a_n + t.to(tl.int64)[:, None] * a_t + ins[None, :]
    step = tl.full((), TIME, tl.int64)
    total = tl.zeros((OUT, IN), tl.float32)
    for start in range(0, time, TIME):
        here = t < time - start
        g = tl.load(g_ptrs, mask=here[None, :] & (outs < d_out)[:, None], other=0.0)
        a = tl.load(a_ptrs, mask=here[:, None] & (ins < d_in)[None, :], other=0.0)
        total = tl.dot(g, a, total, input_precision="ieee")
        g_ptrs += step * g_t
        a_ptrs += step * a_t
    place = tl.arange(0, OUT)[:, None] * IN + tl.arange(0, IN)[None, :]
    out_ptr += (n * tiles + i) * (OUT * IN)
    tl.store(out_ptr + place, total)


@triton.jit(do_not_specialize=["batch", "pairs"])
def _flat_pairs_kernel(
    x_ptr,  # [batch, width]
    out_ptr,  # [splits, batch, batch]
    batch, width, span, pairs,
    ONE_BLOCK: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out[s, n, m] += x[n] . x[m] over the span s of the width, for m <= n.

    The span and the width are multiples of INNER. ONE_BLOCK: the batch fits in ROWS.

    Floor: x read once, 4 bytes read and 4 written a pair m <= n and split; with b
    blocks of ROWS samples, (1 + 1 / b) batch^2 width operations. Each tile of several
    reads its two blocks again.
    """
    row, column = lower_triangle(tl.program_id(0) % pairs)
    split = tl.program_id(0) // pairs
    n = row * ROWS + tl.arange(0, ROWS)
    m = column * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, INNER)
    left = x_ptr + (n.to(tl.int64) * width)[:, None] + k[None, :]
    right = x_ptr + (m.to(tl.int64) * width)[:, None] + k[None, :]
    total = tl.zeros((ROWS, ROWS), tl.float32)
    start = split * span
    for first in range(start, tl.minimum(start + span, width), INNER):
        x = tl.load(left + first, mask=(n < batch)[:, None], other=0.0)
        y = x
        if not ONE_BLOCK:
            y = tl.load(right + first, mask=(m < batch)[:, None], other=0.0)
        total = tl.dot(x, tl.trans(y), total, input_precision="ieee")
    out_ptr += split.to(tl.int64) * batch * batch
    lower = (n < batch)[:, None] & (m[None, :] <= n[:, None])
    below = out_ptr + n.to(tl.int64)[:, None] * batch + m[None, :]
    tl.store(below, tl.load(below, mask=lower, other=0.0) + total, mask=lower)


def _is_by_rows(batch: int, time: int, d_in: int, d_out: int, dtype: Any) -> bool:
    """Whether the products of rows cost less than the gradients, by operations.

    A byte of the scratch tensor, written and read, counts as the operations that a GPU
    does in the time (H100: 5 TB/s of cache; 790 TFLOP/s of halves, 50 of float32).
    """
    products, byte = (16, 150) if dtype != torch.float32 else (1, 10)
    by_rows = batch * time**2 * (d_in + d_out)
    return by_rows <= d_in * d_out * (2 * time + products * batch + 8 * byte)


class _RowCut(NamedTuple):
    """How the products of rows are cut: tiles, and the parts of samples in them."""

    block: _Blocks
    samples: int
    steps: int
    spans: int  # parts of a sample
    programs: int

    @classmethod
    def of(cls, batch: int, time: int, dtype: torch.dtype) -> _RowCut:
        """The largest tiles that keep a GPU busy, or the smallest there are."""
        cuts = []
        for block in _FLOAT if dtype == torch.float32 else _HALF:
            steps = min(block.rows, power_of_two(time))
            samples, spans = block.rows // steps, -(-time // steps)
            blocks = -(-batch // samples) * spans
            programs = blocks * (blocks + 1) // 2
            cuts.append(cls(block, samples, steps, spans, programs))
        return next((cut for cut in cuts if cut.programs >= PROGRAMS), cuts[-1])


def _by_rows(a: Tensor, g: Tensor) -> Tensor:
    (batch, time, d_in), d_out = a.shape, g.shape[2]
    block, samples, steps, spans, programs = _RowCut.of(batch, time, a.dtype)
    out = g.new_empty(batch * spans, batch * spans, dtype=torch.float32)
    launch(
        _row_pairs_kernel,
        (programs,),
        *(a, g, out, batch, time, d_in, d_out, spans),
        *(*a.stride()[:2], *g.stride()[:2]),
        SAMPLES=samples,
        TIME=steps,
        INNER=block.inner,
        num_warps=block.warps,
        num_stages=block.stages,
    )
    if spans > 1:
        out = _mirrored(out.view(batch, spans, batch, spans).sum(dim=(1, 3)))
    out.diagonal().clamp_(min=0)
    return out


def _aligned(x: Tensor) -> Tensor:
    """`x`, copied with zeros beside it unless rows can be read 16 bytes at a time.

    Each row is read many times; and addresses of single elements, in tiles of this
    size, do not fit the registers.
    """
    width = x.shape[2]
    sizes = (*x.stride()[:2], width)
    if x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in sizes):
        return x
    out = x.new_zeros(*x.shape[:2], -(-width // 16) * 16)
    out[:, :, :width] = x
    return out


def _mirrored(gram: Tensor) -> Tensor:
    """The matrix with what is below its diagonal also above, to the last bit."""
    for rows, columns in lower_blocks(len(gram), square_side(3 * gram.itemsize)):
        block = gram[rows, columns]
        if rows == columns:
            block.copy_(block.tril() + block.tril(-1).T)
        else:
            gram[columns, rows] = block.T
    return gram


def _by_gradients(a: Tensor, g: Tensor) -> Tensor:
    (batch, time, d_in), d_out = a.shape, g.shape[2]
    cut = _Gradients.of(d_in, d_out, a.dtype)
    tiles = -(-d_out // cut.outs) * -(-d_in // cut.ins)
    size = cut.outs * cut.ins
    most = max(1, min(tiles, SCRATCH_BYTES // (4 * size * batch)))
    scratch = g.new_empty(batch * most * size, dtype=torch.float32)
    rows = side(batch, SCRATCH_ROWS)
    blocks = -(-batch // rows)
    pairs = blocks * (blocks + 1) // 2
    inner = 32
    splits = max(1, min(2 * PROGRAMS // pairs, most * size // (8 * inner)))
    out = g.new_zeros(splits, batch, batch, dtype=torch.float32)
    for first in range(0, tiles, most):
        count = min(most, tiles - first)
        launch(
            _gradient_tiles_kernel,
            (batch * count,),
            *(a, g, scratch, first, count, time, d_in, d_out),
            *(*a.stride()[:2], *g.stride()[:2]),
            OUT=cut.outs,
            IN=cut.ins,
            TIME=cut.time,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
        width = count * size
        span = -(-width // (splits * inner)) * inner
        launch(
            _flat_pairs_kernel,
            (pairs * splits,),
            *(scratch, out, batch, width, span, pairs),
            ONE_BLOCK=blocks == 1,
            ROWS=rows,
            INNER=inner,
            num_warps=rows // 16,
            num_stages=3,
        )
    return _mirrored(out[0] if splits == 1 else out.sum(dim=0))


def sequence_gram(a: Tensor, g: Tensor) -> Tensor:
    """Launch the kernels of the cheaper way; see `dense.sequence_gram`."""
    if a.dtype != g.dtype:
        a, g = a.to(torch.float32), g.to(torch.float32)
    a, g = _aligned(a), _aligned(g)
    (batch, time, d_in), d_out = a.shape, g.shape[2]
    if not batch * time * d_in * d_out:
        return g.new_zeros(batch, batch, dtype=torch.float32)
    if _is_by_rows(batch, time, d_in, d_out, a.dtype) and _fits(batch, time, a.dtype):
        return _by_rows(a, g)
    cut = _Gradients.of(d_in, d_out, a.dtype)
    if batch > step_of(4 * cut.outs * cut.ins):  # one tile of all samples' gradients
        return dense_pairs.sequence_gram.reference(a, g)
    return _by_gradients(a, g)


def _fits(batch: int, time: int, dtype: torch.dtype) -> bool:
    """Whether products of parts of samples take little, or are those of samples."""
    spans = _RowCut.of(batch, time, dtype).spans
    return spans == 1 or 4 * (batch * spans) ** 2 <= step_of(1)
