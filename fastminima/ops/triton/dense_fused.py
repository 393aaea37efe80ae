"""Weight gradient, norms and second moment of dense layers in one pass, in Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._pieces import step_of
from ..recording import launch
from ._launch import balanced, one_dtype
from .dense_blocks import gradient_blocks
from .dense_tiles import gradient_tile, swizzled
from .totals import first_added, last_added

__all__ = ["Sums", "sequence_sums"]


@triton.jit
def _fused_kernel(
    a_ptr,  # [batch, time, d_in]
    g_ptr,  # [batch, time, d_out]
    grads_ptr,  # [parts, d_out, d_in]
    norms_ptr,  # [batch, tiles]
    moments_ptr,  # [parts, d_out, d_in]
    tiles,
    each,
    batch,
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
    WITH_GRAD: tl.constexpr,
    WITH_NORMS: tl.constexpr,
    WITH_MOMENT: tl.constexpr,
):
    """Sums over samples of G_n = sum_t g[n, t] (outer) a[n, t] and of its squares.

    One program a tile of the gradient and part of the batch, `each` samples. A sample's
    tile is squared while it is in registers: summed over the tile for its norm, added
    up over the samples for the second moment.

    Floor, with e bytes an element: a and g once, e batch time (d_in + d_out) bytes,
    4 parts d_in d_out for gradient and moment each, 4 batch tiles for the norms;
    batch time d_in d_out multiply-adds.
    """
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    row, column = swizzled(tile, tl.cdiv(d_out, OUT), tl.cdiv(d_in, IN), GROUP=8)
    outs, ins = row * OUT + tl.arange(0, OUT), column * IN + tl.arange(0, IN)
    grad = tl.zeros((OUT, IN), tl.float32)
    moment = tl.zeros((OUT, IN), tl.float32)
    for sample in range(part * each, tl.minimum(batch, (part + 1) * each)):
        n = tl.full((), 0, tl.int64) + sample
        one = gradient_tile(
            a_ptr + n * a_batch,
            g_ptr + n * g_batch,
            outs,
            ins,
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
        if WITH_GRAD:
            grad += one
        if WITH_MOMENT:
            moment += one * one
        if WITH_NORMS:
            tl.store(norms_ptr + n * tiles + tile, tl.sum(one * one))
    places = (part.to(tl.int64) * d_out + outs)[:, None] * d_in + ins[None, :]
    is_place = (outs < d_out)[:, None] & (ins < d_in)[None, :]
    if WITH_GRAD:
        tl.store(grads_ptr + places, grad, mask=is_place)
    if WITH_MOMENT:
        tl.store(moments_ptr + places, moment, mask=is_place)


# Operations of a product that take as long as writing 4 bytes, on an H100 where tensor
# cores reach 60 % of 790 TFLOP/s and float32 as much of 67, beside 3 TB/s.
_OPERATIONS_HALF, _OPERATIONS_SINGLE = 632, 54
_WAIT = 0.5  # for the first steps of a sample: 1.5 us, of 2.9 to write a tile


def _parts(a: Tensor, g: Tensor, tiles: int, outputs: int) -> tuple[int, int]:
    """Parts of the batch with sums of their own, and the samples of a part.

    Sums of parts are held beside the results: all of them are within the limit.
    """
    (batch, time, d_in), d_out = a.shape, g.shape[2]
    half = a.dtype != torch.float32
    operations = _OPERATIONS_HALF if half else _OPERATIONS_SINGLE
    outputs = max(1, outputs)
    most = step_of(4 * outputs * d_in * d_out, 1)
    work = (2 * time / operations + _WAIT) / outputs
    return balanced(batch, tiles, work, most)


class Sums(NamedTuple):
    """What was asked for: gradient, squared norms, second moment."""

    grad: Tensor | None
    sq_norms: Tensor | None
    second_moment: Tensor | None


def sequence_sums(
    a: Tensor, g: Tensor, *, grad: bool, sq_norms: bool, second_moment: bool
) -> Sums:
    """Launch the fused kernel for those of its outputs that are wanted."""
    a, g = one_dtype(a, g)
    (batch, time, d_in), d_out = a.shape, g.shape[2]
    blocks = gradient_blocks(a, g, time, kept=1 + grad + second_moment)
    tiles = triton.cdiv(d_out, blocks.out) * triton.cdiv(d_in, blocks.inputs)
    parts, each = _parts(a, g, tiles, grad + second_moment)
    grads, moments = (
        g.new_empty(parts, d_out, d_in, dtype=torch.float32) if wanted else None
        for wanted in (grad, second_moment)
    )
    norms = g.new_empty(batch, tiles, dtype=torch.float32) if sq_norms else None
    outputs = [x for x in (grads, norms, moments) if x is not None]
    if batch * time * d_in * d_out == 0:
        for x in outputs:
            x.zero_()
    else:
        launch(
            _fused_kernel,
            (tiles * parts,),
            *(a, g, *(outputs[0] if x is None else x for x in (grads, norms, moments))),
            *(tiles, each, batch, time, d_in, d_out),
            *(a.stride(0), a.stride(1), g.stride(0), g.stride(1)),
            OUT=blocks.out,
            IN=blocks.inputs,
            TIME=blocks.time,
            PRECISION="ieee",
            WITH_GRAD=grad,
            WITH_NORMS=sq_norms,
            WITH_MOMENT=second_moment,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return Sums(
        grads if grads is None else first_added(grads),
        norms if norms is None else last_added(norms),
        moments if moments is None else first_added(moments),
    )
