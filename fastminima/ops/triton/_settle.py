"""What kernels share that decide whether Gram sums hold, and else make gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import PROGRAMS

__all__ = ["added", "sharers"]

MOST = 32  # programs that share a sample


@triton.jit
def added(parts_ptr, count, BLOCK: tl.constexpr):
    """The sum of `count` numbers, in the same order wherever it is made."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        at = start + lanes
        total += tl.load(parts_ptr + at, mask=at < count, other=0.0)
    return tl.sum(total)


def sharers(batch: int, pairs: int, tiles: int) -> int:
    """How many programs share a sample of so many pairs of blocks of time.

    As many as made its sums, or as keep a GPU busy: where nothing is lost, all that
    they cost is to be started.
    """
    return max(1, min(MOST, tiles, max(pairs, PROGRAMS // max(1, batch))))
