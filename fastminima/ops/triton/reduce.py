"""Squared norm of a tensor, in Triton: partial sums, then their sum in fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..recording import launch
from ._time_tiles import PROGRAMS, WARPS

__all__ = ["sq_norm"]

# 32 bytes a thread in flight for half inputs, 64 for float32, with 4 warps.
BLOCK = 2048


@triton.jit
def _sq_norm_kernel(
    x_ptr,  # [size]
    out_ptr,  # [programs]
    size, span,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[p] = |x[p * span : (p + 1) * span]|^2.

    Floor: x read once, 4 bytes written a program; 2 operations an element.
    """
    start = tl.program_id(0).to(tl.int64) * span
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(start, tl.minimum(start + span, size), BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32)
        total += x * x
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def sq_norm(x: Tensor) -> Tensor:
    """Launch `_sq_norm_kernel`; see `reduce.sq_norm`."""
    x = x.contiguous()
    blocks = -(-x.numel() // BLOCK)
    programs = min(blocks, PROGRAMS)
    span = -(-blocks // max(1, programs)) * BLOCK
    out = x.new_empty(programs, dtype=torch.float32)
    if programs:
        launch(
            _sq_norm_kernel,
            (programs,),
            x,
            out,
            x.numel(),
            span,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out.sum()
