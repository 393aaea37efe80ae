"""Per-sample gradients of biases and scales in Triton: sums over time or space."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from ._time_tiles import WARPS, oriented, tiles
from .totals import first_added

__all__ = ["product_over_time", "sum_over_space", "sum_over_time"]


@triton.jit(do_not_specialize=["batch"])
def _time_sums_kernel(
    g_ptr,  # [batch, time, features]
    x_ptr,  # [batch, time, features]; or None, for ones
    out_ptr,  # [splits, batch, features]
    batch, time, features, span,
    g_n, g_t, g_f, x_n, x_t, x_f,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[s, n] = sum_t g[n, t] * x[n, t] over the span s of time.

    Floor: g and x read once, 4 bytes written a sample, feature and split; 1 operation
    an element, 2 with x.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(features, BLOCK_F)
    f = pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    n = (pid // blocks % batch).to(tl.int64)
    split = pid // blocks // batch
    start = split * span
    t = tl.arange(0, BLOCK_T)
    rows, columns = (start + t).to(tl.int64)[:, None], f.to(tl.int64)[None, :]
    g_ptrs = g_ptr + n * g_n + rows * g_t + columns * g_f
    if x_ptr is not None:
        x_ptrs = x_ptr + n * x_n + rows * x_t + columns * x_f
    step = tl.full((), BLOCK_T, tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for first in range(start, tl.minimum(start + span, time), BLOCK_T):
        mask = (first + t < time)[:, None] & (f < features)[None, :]
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        g_ptrs += step * g_t
        if x_ptr is not None:
            g *= tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
            x_ptrs += step * x_t
        total += g
    out_ptr += (split.to(tl.int64) * batch + n) * features + f
    tl.store(out_ptr, tl.sum(total, axis=0), mask=f < features)


def _time_sums(g: Tensor, x: Tensor | None) -> Tensor:
    (g, *others), time_is_contiguous = oriented(*(t for t in (g, x) if t is not None))
    x = others[0] if others else None
    batch, time, features = g.shape
    cut = tiles(
        *g.shape,
        time_is_contiguous=time_is_contiguous,
        itemsizes=[g.itemsize, *(other.itemsize for other in others)],
    )
    out = g.new_empty(cut.splits, batch, features, dtype=torch.float32)
    if out.numel():
        launch(
            _time_sums_kernel,
            (cut.splits * batch * cut.blocks,),
            *(g, x, out, batch, time, features, cut.span),
            *(*g.stride(), *(g if x is None else x).stride()),
            BLOCK_T=cut.block_time,
            BLOCK_F=cut.block_features,
            num_warps=WARPS,
        )
    return first_added(out)


def sum_over_time(g: Tensor) -> Tensor:
    """Launch `_time_sums_kernel`; see `broadcast.sum_over_time`."""
    return _time_sums(g, None)


def sum_over_space(g: Tensor) -> Tensor:
    """Launch `_time_sums_kernel`; see `broadcast.sum_over_space`."""
    return _time_sums(g.transpose(1, 2), None)


def product_over_time(g: Tensor, x: Tensor) -> Tensor:
    """Launch `_time_sums_kernel`; see `broadcast.product_over_time`."""
    return _time_sums(g, x)
