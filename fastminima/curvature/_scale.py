"""Vectors of any scale: their norms, and a power of two that makes them ordinary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from ..ops import vector

__all__ = ["dot", "dots", "exponent", "length", "norm", "ordinary"]

_ORDINARY = 30  # binary orders of magnitude on each side of 1 that squares stand
_BLOCK = 1 << 12  # elements of which float32 adds up the squares
_LARGEST = 120  # a power of two that float32 has, with its reciprocal


def exponent(x: Tensor) -> int:
    """The power of two by which x is to be divided; 0 where its squares are harmless.

    Also 0 for zeros, and for what is not finite.
    """
    if x.numel() == 0:
        return 0
    low, high = torch.aminmax(x.detach())
    largest = max(-float(low), float(high))
    if not 0 < largest < float("inf"):
        return 0
    power = math.frexp(largest)[1]
    return 0 if abs(power) <= _ORDINARY else max(-_LARGEST, min(_LARGEST, power))


def ordinary(x: Tensor) -> tuple[Tensor, float]:
    """X divided by a power of two, if it needs one, and that power."""
    power = exponent(x)
    return (x, 1.0) if power == 0 else (x * 2.0**-power, 2.0**power)


def norm(x: Tensor) -> float:
    """|x|, whose squares may be beyond the dtype."""
    x, scale = ordinary(x)
    return float(length(x)) * scale


def length(x: Tensor) -> Tensor:
    """|x| of a flat vector, in double.

    On CPUs PyTorch adds up in the dtype: of 9 million elements the norm is off by 3e-4
    in float32, and so would be all that is made of a vector divided by it.
    """
    if x.device.type != "cpu" or x.dtype == torch.float64 or len(x) <= _BLOCK:
        return torch.linalg.vector_norm(x).double()
    whole = len(x) // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(x[:whole].view(-1, _BLOCK), dim=1).double()
    return torch.hypot(blocks.norm(), torch.linalg.vector_norm(x[whole:]).double())


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> of flat vectors, in double."""
    return dots(x, [y])[0]


def dots(x: Tensor, others: Sequence[Tensor]) -> Tensor:
    """<x, y> of flat vectors [others], in double, whatever their dtypes."""
    dtype = reduce(torch.promote_types, (y.dtype for y in others), x.dtype)
    first, *rest = (one.to(dtype).contiguous() for one in (x, *others))
    return vector.dots(first, rest)
