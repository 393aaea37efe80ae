"""Squared norms of dense gradients by making the gradients tile by tile, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import one_dtype
from .dense_blocks import gradient_blocks
from .dense_tiles import gradient_tile, swizzled

__all__ = ["direct_sums", "replace_lost"]

_LOST_PROGRAMS = 32  # a sample: where nothing is lost, all they cost is to be started


@triton.jit
def _direct_kernel(
    a_ptr,  # [batch, time, d_in]
    g_ptr,  # [batch, time, d_out]
    is_wanted_ptr,  # [batch]
    sums_ptr,  # [batch, programs]
    programs,
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
    WHERE_WANTED: tl.constexpr,
):
    """Sums of squares of sum_t g[n, t] (outer) a[n, t], over `programs` shares of it.

    The programs of a sample take its tiles in turn; with WHERE_WANTED only samples
    whose flag is set are read, and get sums.

    Floor, with e bytes an element: a and g once, e batch time (d_in + d_out) bytes;
    batch time d_in d_out multiply-adds.
    """
    share = tl.program_id(0) % programs
    n = (tl.program_id(0) // programs).to(tl.int64)
    rows, columns = tl.cdiv(d_out, OUT), tl.cdiv(d_in, IN)
    tiles = rows * columns
    if WHERE_WANTED:
        tiles = tl.where(tl.load(is_wanted_ptr + n) != 0, tiles, 0)
    total = 0.0
    for tile in range(share, tiles, programs):
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
        total += tl.sum(gradient * gradient)
    if tiles > 0:
        tl.store(sums_ptr + n * programs + share, total)


@triton.jit
def _replace_kernel(
    sums_ptr,  # [batch, parts]
    is_wanted_ptr,  # [batch]
    norms_ptr,  # [batch]
    parts,
    BLOCK: tl.constexpr,
):
    """norms[n] = sum of the parts of n, where its flag is set. One program a sample."""
    n = tl.program_id(0).to(tl.int64)
    if tl.load(is_wanted_ptr + n) != 0:
        lanes = tl.arange(0, BLOCK)
        total = 0.0
        for start in range(0, parts, BLOCK):
            at = start + lanes
            part = tl.load(sums_ptr + n * parts + at, mask=at < parts, other=0.0)
            total += tl.sum(part)
        tl.store(norms_ptr + n, total)


def _launch(a: Tensor, g: Tensor, is_wanted: Tensor | None, most: int) -> Tensor:
    """Partial sums [batch, programs], by at most `most` programs a sample."""
    (batch, time, d_in), d_out = a.shape, g.shape[2]
    blocks = gradient_blocks(a, g, time, kept=1)
    tiles = triton.cdiv(d_out, blocks.out) * triton.cdiv(d_in, blocks.inputs)
    programs = min(tiles, most)
    sums = g.new_empty(batch, programs, dtype=torch.float32)
    _direct_kernel[programs * batch,](
        *(a, g, sums if is_wanted is None else is_wanted, sums, programs),
        *(time, d_in, d_out, *a.stride()[:2], *g.stride()[:2]),
        OUT=blocks.out,
        IN=blocks.inputs,
        TIME=blocks.time,
        PRECISION="ieee",
        WHERE_WANTED=is_wanted is not None,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return sums


def direct_sums(a: Tensor, g: Tensor) -> Tensor:
    """Squared norms of gradients, `[batch]`."""
    a, g = one_dtype(a, g)
    if a.numel() * g.numel() == 0:
        return g.new_zeros(len(g), dtype=torch.float32)
    return _launch(a, g, None, 1 << 30).sum(dim=1)


def replace_lost(a: Tensor, g: Tensor, norms: Tensor, is_lost: Tensor) -> None:
    """Overwrite the norms of the samples whose flag is set, with no look at the flags.

    The kernels read the flags on the device: no synchronization, and the launches are
    the same for every batch.
    """
    a, g = one_dtype(a, g)
    if a.numel() * g.numel() == 0:
        return
    sums = _launch(a, g, is_lost, _LOST_PROGRAMS)
    _replace_kernel[len(g),](sums, is_lost, norms, sums.shape[1], BLOCK=32)
