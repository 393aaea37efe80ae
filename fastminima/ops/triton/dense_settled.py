"""Norms from Gram sums, made anew where those cancel: one kernel decides and acts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..cost.dense import guard_on_gpu
from ..recording import launch
from ._settle import added, sharers
from .dense_blocks import gradient_blocks
from .dense_tiles import gradient_tile, swizzled
from .totals import last_added, last_added_of_two

__all__ = ["settled"]

_FEATURES, _STEPS = (
    64,
    64,
)  # of a bias gradient at a time: a line of 128 bytes in halves


@triton.jit
def _is_lost(total, diagonal, least):
    """Whether too little is left of a sum; what is no number stays as it is."""
    return total < least * diagonal


@triton.jit
def _bias_squares(
    g_ptr,  # [time, d_out]
    first,
    blocks,
    programs,
    time,
    d_out,
    g_time,
    FEATURES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """|sum_t g[t, some]|^2 of every `programs`-th of the blocks of features."""
    steps = tl.arange(0, STEPS)
    step = tl.full((), STEPS, tl.int64)
    squares = 0.0
    for block in range(first, blocks, programs):
        outs = block * FEATURES + tl.arange(0, FEATURES)
        g_at = g_ptr + steps.to(tl.int64)[:, None] * g_time + outs[None, :]
        sums = tl.zeros((STEPS, FEATURES), tl.float32)
        for start in range(0, time, STEPS):
            mask = (steps < time - start)[:, None] & (outs < d_out)[None, :]
            sums += tl.load(g_at, mask=mask, other=0.0).to(tl.float32)
            g_at += step * g_time
        grads = tl.sum(sums, axis=0)
        squares += tl.sum(grads * grads)
    return squares


@triton.jit(do_not_specialize=["batch"])
def _settle_kernel(
    a_ptr,  # [batch, time, d_in]
    g_ptr,  # [batch, time, d_out]
    sums_ptr,  # [batch, kinds, pairs]
    parts_ptr,  # [1 or 2, batch, programs]
    batch,
    programs,
    pairs,
    time,
    d_in,
    d_out,
    a_batch,
    a_time,
    g_batch,
    g_time,
    least,
    least_of_bias,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TIME: tl.constexpr,
    FEATURES: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    WITH_BIAS: tl.constexpr,
):
    """Parts of the squared norms: of weights, then, WITH_BIAS, of biases.

    Each program of a sample adds up the sample's Gram sums, all in the same order.
    Where they hold, the first one writes the norm and the others zero; where less than
    `least` of their diagonal is left, each makes its share of the gradient's tiles
    instead.

    Floor: 4 batch (kinds pairs + kinds programs / 2) bytes; for a sample that is lost,
    a and g once, e time (d_in + d_out) bytes, and time d_in d_out multiply-adds.
    """
    share = tl.program_id(0) % programs
    n = (tl.program_id(0) // programs).to(tl.int64)
    kinds: tl.constexpr = 4 if WITH_BIAS else 2
    sums_ptr += n * kinds * pairs
    a_ptr += n * a_batch
    g_ptr += n * g_batch
    parts_ptr += n * programs + share

    total = added(sums_ptr, pairs, 128)
    lost = _is_lost(total, added(sums_ptr + pairs, pairs, 128), least)
    rows, columns = tl.cdiv(d_out, OUT), tl.cdiv(d_in, IN)
    made = 0.0
    for tile in range(share, tl.where(lost, rows * columns, 0), programs):
        row, column = swizzled(tile, rows, columns, GROUP=8)
        gradient = gradient_tile(
            a_ptr,
            g_ptr,
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
        made += tl.sum(gradient * gradient)
    kept = tl.where(share == 0, total, 0.0)
    tl.store(parts_ptr, tl.where(lost, made, kept))

    if WITH_BIAS:
        sums_ptr += 2 * pairs
        total = added(sums_ptr, pairs, 128)
        diagonal = added(sums_ptr + pairs, pairs, 128)
        lost = _is_lost(total, diagonal, least_of_bias)
        blocks = tl.where(lost, tl.cdiv(d_out, FEATURES), 0)
        made = _bias_squares(
            g_ptr, share, blocks, programs, time, d_out, g_time, FEATURES, STEPS
        )
        kept = tl.where(share == 0, total, 0.0)
        tl.store(parts_ptr + batch.to(tl.int64) * programs, tl.where(lost, made, kept))


def settled(
    a: Tensor, g: Tensor, sums: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Squared norms of weights and, if asked for, of biases, from `gram_sums`.

    Right to 1e-4, as `fastminima.ops.cost.dense.guard_on_gpu` has it; the host does not
    look, and launches are the same for every batch.
    """
    (batch, time, d_in), d_out = a.shape, g.shape[2]
    if a.numel() * g.numel() == 0:
        zeros = sums.new_zeros(1 + with_bias, batch)
        return zeros[0], zeros[1] if with_bias else None
    blocks = gradient_blocks(a, g, time, kept=1)
    tiles = triton.cdiv(d_out, blocks.out) * triton.cdiv(d_in, blocks.inputs)
    programs = sharers(batch, sums.shape[2], tiles)
    parts = sums.new_empty(1 + with_bias, batch, programs)
    launch(
        _settle_kernel,
        (batch * programs,),
        *(a, g, sums, parts, batch, programs, sums.shape[2], time, d_in, d_out),
        *(*a.stride()[:2], *g.stride()[:2]),
        guard_on_gpu(d_in, d_out, a.dtype),
        guard_on_gpu(0, d_out, a.dtype),
        OUT=blocks.out,
        IN=blocks.inputs,
        TIME=blocks.time,
        FEATURES=_FEATURES,
        STEPS=_STEPS,
        PRECISION="ieee",
        WITH_BIAS=with_bias,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if with_bias:
        return last_added_of_two(parts)
    return last_added(parts[0]), None
