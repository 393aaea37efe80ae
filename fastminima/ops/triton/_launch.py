"""What launchers of Triton kernels share: arguments, and when a grid is too small."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DTYPES", "PROGRAMS", "contiguous_rows", "one_dtype", "split"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Programs that keep a GPU of today busy: 108 to 148 multiprocessors, one to two blocks
# each. One number for all of them, so that a result does not depend on the GPU.
PROGRAMS = 256


def contiguous_rows(x: Tensor) -> Tensor:
    """`x`, copied unless its last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def one_dtype(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one dtype with contiguous rows; float32 where they differ.

    Raises:
        TypeError: One is of a dtype that the kernels do not have, such as float64.
    """
    for x in (a, g):
        if x.dtype not in DTYPES:
            raise TypeError(
                f"The Triton kernels take {DTYPES}, got {a.dtype} and {g.dtype}. Use "
                'the op\'s "reference", or convert one.'
            )
    if a.dtype != g.dtype:
        a, g = a.float(), g.float()
    return contiguous_rows(a), contiguous_rows(g)


def split(items: int, programs: int) -> tuple[int, int]:
    """Into how many parts to split a sum over `items`, and the items of a part.

    One, unless the programs of a part are too few to fill a GPU.
    """
    parts = max(1, min(items, PROGRAMS // max(1, programs)))
    each = -(-items // parts)
    return -(-items // max(1, each)), each
