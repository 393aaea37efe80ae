"""Squared norms of dense gradients by making the gradients tile by tile, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from ._launch import one_dtype
from .dense_blocks import gradient_blocks
from .dense_tiles import gradient_tile, swizzled
from .totals import last_added

__all__ = ["direct_sums"]


@triton.jit
def _direct_kernel(
    a_ptr,  # [batch, time, d_in]
    g_ptr,  # [batch, time, d_out]
    sums_ptr,  # [batch, tiles]
    time,
    d_in,
    d_out,
    a_batch,
    a_time,
    g_batch,
    g_time,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TIME: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of squares of sum_t g[n, t] (outer) a[n, t] over each of its tiles.

    Floor, with e bytes an element: a and g once, e batch time (d_in + d_out) bytes;
    batch time d_in d_out multiply-adds.
    """
    rows, columns = tl.cdiv(d_out, OUT), tl.cdiv(d_in, IN)
    tiles = rows * columns
    tile = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles).to(tl.int64)
    row, column = swizzled(tile, rows, columns, GROUP=8)
    gradient = gradient_tile(
        a_ptr + n * a_batch,
        g_ptr + n * g_batch,
        row * OUT + tl.arange(0, OUT),
        column * IN + tl.arange(0, IN),
        time,
        d_in,
        d_out,
        a_time,
        g_time,
        OUT,
        IN,
        TIME,
        PRECISION,
    )
    tl.store(sums_ptr + n * tiles + tile, tl.sum(gradient * gradient))


def direct_sums(a: Tensor, g: Tensor) -> Tensor:
    """Squared norms of gradients, `[batch]`."""
    a, g = one_dtype(a, g)
    if a.numel() * g.numel() == 0:
        return g.new_zeros(len(g), dtype=torch.float32)
    (batch, time, d_in), d_out = a.shape, g.shape[2]
    blocks = gradient_blocks(a, g, time, kept=1)
    tiles = triton.cdiv(d_out, blocks.out) * triton.cdiv(d_in, blocks.inputs)
    sums = g.new_empty(batch, tiles, dtype=torch.float32)
    launch(
        _direct_kernel,
        (tiles * batch,),
        *(a, g, sums, time, d_in, d_out, *a.stride()[:2], *g.stride()[:2]),
        OUT=blocks.out,
        IN=blocks.inputs,
        TIME=blocks.time,
        PRECISION="ieee",
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return last_added(sums)
