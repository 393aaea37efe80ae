"""Inner products of the samples' dense gradients with directions, in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._arguments import contiguous_rows
from .._pieces import in_pieces, step_of
from ..recording import launch
from ._launch import power_of_two, side
from ._time_tiles import PROGRAMS
from .totals import first_added

__all__ = ["sequence_dots", "sequence_multi_dots"]

DIRECTIONS = 8  # at once
# Outputs and inputs of a tile by directions: 8192 elements of the directions stay in
# registers, 64 a thread with 4 warps, while the samples pass by. Where the gradient's
# tile takes as many, 8 warps hold more on a multiprocessor; but in float32, whose
# products load from shared memory, 4 warps load less.
_SIDES = {1: (64, 128), 2: (64, 64), 4: (32, 64), 8: (32, 32)}


@triton.jit(do_not_specialize=["batch", "chunk"])
def _dots_kernel(
    a_ptr,  # [batch, time, d_in]
    g_ptr,  # [batch, time, d_out]
    v_ptr,  # [directions, d_out, d_in]
    out_ptr,  # [tiles, batch, directions]
    batch, time, d_in, d_out, directions, chunk, a_n, a_t, g_n, g_t, v_k, v_o,
    K: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    """out[i, n, k] = the sum over the tile i of v[k] * sum_t g[n, t] (outer) a[n, t].

    A program takes one tile and `chunk` samples, one after the other. TIME 1 stands for
    one row a sample.

    Floor: v, a and g read once, 4 bytes written a tile, sample and direction; 2 batch
    (time + directions) d_in d_out operations. Each row of tiles reads a again, each
    column g, and each chunk v.
    """
    tiles = tl.cdiv(d_out, OUT) * tl.cdiv(d_in, IN)
    i, first = tl.program_id(0) % tiles, tl.program_id(0) // tiles * chunk
    outs = i // tl.cdiv(d_in, IN) * OUT + tl.arange(0, OUT)
    ins = i % tl.cdiv(d_in, IN) * IN + tl.arange(0, IN)
    is_out, is_in = outs < d_out, ins < d_in
    k = tl.arange(0, K)
    v_ptrs = v_ptr + (k.to(tl.int64) * v_k)[:, None, None]
    v_ptrs += (outs.to(tl.int64) * v_o)[None, :, None] + ins[None, None, :]
    mask = is_out[None, :, None] & is_in[None, None, :]
    mask = mask & (k < directions)[:, None, None]
    v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)
    out_ptr += i.to(tl.int64) * batch * directions + k
    for j in range(tl.minimum(chunk, batch - first)):
        n = (first + j).to(tl.int64)
        gradient = _gradient(
            a_ptr + n * a_n, g_ptr + n * g_n, outs, ins, is_out, is_in,
            time, a_t, g_t, TIME,
        )  # fmt: skip
        dots = tl.sum(tl.sum(v * gradient[None, :, :], axis=2), axis=1)
        tl.store(out_ptr + n * directions, dots, mask=k < directions)


@triton.jit
def _gradient(
    a_ptr,  # [time, d_in]
    g_ptr,  # [time, d_out]
    outs, ins, is_out, is_in, time, a_t, g_t,
    TIME: tl.constexpr,
):  # fmt: skip
    """sum_t g[t, outs] (outer) a[t, ins]."""
    if TIME == 1:
        g = tl.load(g_ptr + outs, mask=is_out, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + ins, mask=is_in, other=0.0).to(tl.float32)
        total = g[:, None] * a[None, :]
    else:
        t = tl.arange(0, TIME)
        g_ptrs = g_ptr + t.to(tl.int64)[None, :] * g_t + outs[:, None]
        a_ptrs = a_ptr + t.to(tl.int64)[:, None] * a_t + ins[None, :]
        step = tl.full((), TIME, tl.int64)
        total = tl.zeros((outs.shape[0], ins.shape[0]), tl.float32)
        for start in range(0, time, TIME):
            here = t < time - start
            g = tl.load(g_ptrs, mask=is_out[:, None] & here[None, :], other=0.0)
            a = tl.load(a_ptrs, mask=here[:, None] & is_in[None, :], other=0.0)
            total = tl.dot(g, a, total, input_precision="ieee")
            g_ptrs += step * g_t
            a_ptrs += step * a_t
    return total


def _dots(a: Tensor, g: Tensor, v: Tensor) -> Tensor:
    """The products with at most DIRECTIONS directions, `[batch, directions]`."""
    (batch, time, d_in), d_out, directions = a.shape, g.shape[2], len(v)
    kinds = power_of_two(directions)
    outs, ins = map(side, (d_out, d_in), _SIDES[kinds])
    tiles = -(-d_out // outs) * -(-d_in // ins)
    if batch > step_of(4 * tiles * directions):
        return in_pieces(
            lambda some: _dots(a[some], g[some], v), batch, 4 * tiles * directions
        )
    chunk = -(-batch * tiles // max(PROGRAMS, tiles))
    is_half = a.dtype != torch.float32
    out = g.new_empty(tiles, batch, directions, dtype=torch.float32)
    launch(
        _dots_kernel,
        (tiles * -(-batch // chunk),),
        *(a, g, v, out, batch, time, d_in, d_out, directions, chunk),
        *(*a.stride()[:2], *g.stride()[:2], *v.stride()[:2]),
        K=kinds,
        OUT=outs,
        IN=ins,
        TIME=1 if time == 1 else 32 if is_half else 16,
        num_warps=8 if is_half and time > 1 and kinds <= 2 else 4,
        num_stages=3,
    )
    return first_added(out)


def sequence_multi_dots(a: Tensor, g: Tensor, v: Sequence[Tensor]) -> Tensor:
    """Launch `_dots_kernel` for each 8 directions; see `dense.sequence_multi_dots`."""
    if a.dtype != g.dtype:
        a, g = a.to(torch.float32), g.to(torch.float32)
    a, g = contiguous_rows(a), contiguous_rows(g)
    if not a.numel() * g.numel() * len(v):
        return g.new_zeros(len(g), len(v), dtype=torch.float32)
    parts = [
        _dots(a, g, _together(v[first : first + DIRECTIONS]))
        for first in range(0, len(v), DIRECTIONS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _together(v: Sequence[Tensor]) -> Tensor:
    """Directions in one tensor; a single one is not copied."""
    return contiguous_rows(v[0]).unsqueeze(0) if len(v) == 1 else torch.stack(tuple(v))


def sequence_dots(a: Tensor, g: Tensor, v: Tensor) -> Tensor:
    """Launch `_dots_kernel` for one direction; see `dense.sequence_dots`."""
    return sequence_multi_dots(a, g, [v]).squeeze(1)
