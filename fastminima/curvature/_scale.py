"""Vectors of any scale: their norms, and a power of two that makes them ordinary."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["exponent", "norm", "ordinary"]

_ORDINARY = 30  # binary orders of magnitude on each side of 1 that squares stand
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
    """x divided by a power of two, if it needs one, and that power."""
    power = exponent(x)
    return (x, 1.0) if power == 0 else (x * 2.0**-power, 2.0**power)


def norm(x: Tensor) -> float:
    """|x|, whose squares may be beyond the dtype."""
    x, scale = ordinary(x)
    return float(torch.linalg.vector_norm(x)) * scale
