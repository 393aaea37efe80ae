"""Quantiles of Student's t distribution."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["student_quantile"]


def student_quantile(degrees: float, confidence: float) -> float:
    """The t within which a standardised mean lies with this probability.

    `degrees` of freedom: whole, or infinite for the normal distribution.
    """
    if math.isinf(degrees):
        return NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, 1.0
    while _inside(int(degrees), high) < confidence:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if _inside(int(degrees), middle) < confidence
            else (low, middle)
        )
    return (low + high) / 2


def _inside(degrees: int, t: float) -> float:
    """P(|T| < t), for whole degrees of freedom.

    Source: Abramowitz and Stegun (1972), 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    is_odd = degrees % 2
    term = total = cosine if is_odd else 1.0
    for j in range(3 if is_odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (j - 1) / j
        total += term
    if not is_odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))
