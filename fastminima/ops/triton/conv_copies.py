"""Images with their channels last, as kernels load them 16 bytes at a time."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from ._launch import side

__all__ = ["channels_last"]

_SIDE = 64  # of a tile: a line of 128 bytes in halves, on either side


@triton.jit(do_not_specialize=["batch"])
def _turn_kernel(
    x_ptr,  # [batch, channels, positions]
    out_ptr,  # [batch, positions, channels]
    batch,
    channels,
    positions,
    x_batch,
    x_channel,
    x_position,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """out[n, p, c] = x[n, c, p], a tile a program.

    Floor: x read once and written once.
    """
    columns, rows = tl.cdiv(channels, CHANNELS), tl.cdiv(positions, POSITIONS)
    tile = tl.program_id(0) % (columns * rows)
    n = (tl.program_id(0) // (columns * rows)).to(tl.int64)
    c = tile % columns * CHANNELS + tl.arange(0, CHANNELS)
    p = tile // columns * POSITIONS + tl.arange(0, POSITIONS)
    mask = (c < channels)[None, :] & (p < positions)[:, None]
    wide_c, wide_p = c.to(tl.int64)[None, :], p.to(tl.int64)[:, None]
    at = x_ptr + n * x_batch + wide_c * x_channel + wide_p * x_position
    x = tl.load(at, mask=mask, other=0.0)
    to = out_ptr + (n * positions + wide_p) * channels + wide_c
    tl.store(to, x, mask=mask)


def channels_last(x: Tensor) -> Tensor:
    """`[batch, channels, *space]`, copied so that channels lie together."""
    flat = x.flatten(2)
    batch, channels, positions = flat.shape
    out = x.new_empty(batch, positions, channels)
    if out.numel():
        block_c, block_p = side(channels, _SIDE), side(positions, _SIDE)
        tiles = triton.cdiv(channels, block_c) * triton.cdiv(positions, block_p)
        launch(
            _turn_kernel,
            (batch * tiles,),
            *(flat, out, batch, channels, positions, *flat.stride()),
            CHANNELS=block_c,
            POSITIONS=block_p,
            num_warps=4,
        )
    return out.transpose(1, 2).unflatten(2, x.shape[2:])
