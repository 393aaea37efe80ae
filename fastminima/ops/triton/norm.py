"""Per-sample gradients of the scale and shift of normalisation layers, in Triton.

The layers differ in which statistics an element has, and in which dimension is
contiguous. One kernel serves all: the tensors are `[batch, time, features]` with any
strides, and a feature of a channel norm is a channel, its time the space.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from ._time_tiles import WARPS, oriented, tiles
from .totals import first_added

__all__ = ["channel_norm_gradients", "layer_norm_gradients"]


@triton.jit
def _sums(
    g_ptr,  # [time, features], of one sample
    x_ptr,  # [time, features]
    mean_ptr,  # [time] or [groups]; or None
    rstd_ptr,  # [time] or [groups]
    start, stop, time, f, features, group,
    g_t, g_f, x_t, x_f,
    BY_TIME: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Sums over time of g * xhat and of g, for the features `f`; [BLOCK_F] each."""
    few = f < features
    t = tl.arange(0, BLOCK_T)
    rows, columns = (start + t).to(tl.int64)[:, None], f.to(tl.int64)[None, :]
    g_ptrs = g_ptr + rows * g_t + columns * g_f
    x_ptrs = x_ptr + rows * x_t + columns * x_f
    step = tl.full((), BLOCK_T, tl.int64)
    mean = 0.0
    if not BY_TIME:
        mean = tl.load(mean_ptr + f // group, mask=few, other=0.0)
        mean = mean.to(tl.float32)[None, :]
    weight = tl.zeros((BLOCK_T, f.shape[0]), tl.float32)
    bias = tl.zeros((BLOCK_T, f.shape[0]), tl.float32)
    for first in range(start, stop, BLOCK_T):
        there = first + t < time
        mask = there[:, None] & few[None, :]
        g = tl.load(g_ptrs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
        if BY_TIME:
            if mean_ptr is not None:
                center = tl.load(mean_ptr + first + t, mask=there, other=0.0)
                x -= center.to(tl.float32)[:, None]
            rstd = tl.load(rstd_ptr + first + t, mask=there, other=0.0)
            x *= rstd.to(tl.float32)[:, None]
        else:
            x -= mean
        weight += g * x
        bias += g
        g_ptrs += step * g_t
        x_ptrs += step * x_t
    weight = tl.sum(weight, axis=0)
    if not BY_TIME:  # last, so that it takes no registers in the loop
        rstd = tl.load(rstd_ptr + f // group, mask=few, other=0.0)
        weight *= rstd.to(tl.float32)
    return weight, tl.sum(bias, axis=0)


@triton.jit(do_not_specialize=["batch"])
def _gradients_kernel(
    g_ptr,  # [batch, time, features]
    x_ptr,  # [batch, time, features]
    mean_ptr,  # [batch, time], or [batch or 1, groups]; or None
    rstd_ptr,  # as mean
    out_ptr,  # [splits, 2, batch, features]
    batch, time, features, span, group,
    g_n, g_t, g_f, x_n, x_t, x_f, stat_n,
    BY_TIME: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[s, 0, n] = sum_t g * xhat and out[s, 1, n] = sum_t g over the span s of time.

    Floor: g, x and the statistics read once, 8 bytes written a sample, feature and
    split; 5 operations an element.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(features, BLOCK_F)
    f = pid % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    n = (pid // blocks % batch).to(tl.int64)
    split = pid // blocks // batch
    if mean_ptr is not None:
        mean_ptr += n * stat_n
    start = split * span
    weight, bias = _sums(
        g_ptr + n * g_n, x_ptr + n * x_n, mean_ptr, rstd_ptr + n * stat_n,
        start, tl.minimum(start + span, time), time, f, features, group,
        g_t, g_f, x_t, x_f, BY_TIME, BLOCK_T,
    )  # fmt: skip
    out_ptr += (split.to(tl.int64) * 2 * batch + n) * features + f
    tl.store(out_ptr, weight, mask=f < features)
    out_ptr += batch.to(tl.int64) * features
    tl.store(out_ptr, bias, mask=f < features)


def _gradients(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, by_time: bool
) -> tuple[Tensor, Tensor]:
    """Of `[batch, time, features]`: statistics by step, or by group of features."""
    (g, x), time_is_contiguous = oriented(g, x)
    rstd = rstd.contiguous()
    mean = None if mean is None else mean.contiguous()
    stat_n = 0 if len(rstd) == 1 else rstd.shape[1]  # to the next sample's statistics
    group = 1 if by_time else max(1, g.shape[2] // rstd.shape[1])
    cut = tiles(
        *g.shape,
        time_is_contiguous=time_is_contiguous,
        itemsizes=(g.itemsize, x.itemsize),
    )
    out = g.new_empty(cut.splits, 2, g.shape[0], g.shape[2], dtype=torch.float32)
    if out.numel():
        launch(
            _gradients_kernel,
            (cut.splits * g.shape[0] * cut.blocks,),
            *(g, x, mean, rstd, out, *g.shape, cut.span, group),
            *(*g.stride(), *x.stride(), stat_n),
            BY_TIME=by_time,
            BLOCK_T=cut.block_time,
            BLOCK_F=cut.block_features,
            # A feature's mean and its address take registers: more threads share them.
            num_warps=WARPS if by_time else 2 * WARPS,
        )
    weight, bias = first_added(out).unbind()
    return weight, bias


def layer_norm_gradients(
    g: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch `_gradients_kernel`; see `norm.layer_norm_gradients`."""
    return _gradients(g, x, mean, rstd, by_time=True)


def channel_norm_gradients(
    g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch `_gradients_kernel`; see `norm.channel_norm_gradients`."""
    g, x = g.transpose(1, 2), x.transpose(1, 2)
    return _gradients(g, x, mean, rstd, by_time=False)
