"""Long series made short enough to draw, without losing what sticks out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float

__all__ = ["MOST", "Band", "band", "envelope", "segments"]

MOST = 2000  # points a curve
_WINDOWS = 300
_LEAST = 12  # rows that a window should hold before quantiles mean anything


@dataclass(frozen=True)
class Band:
    """Quantiles over windows of rows.

    Attributes:
        x: the middle of each window.
        low: the 10th percentile.
        middle: the median.
        high: the 90th percentile.
    """

    x: Float[np.ndarray, " windows"]
    low: Float[np.ndarray, " windows"]
    middle: Float[np.ndarray, " windows"]
    high: Float[np.ndarray, " windows"]


def segments(steps: Float[np.ndarray, " rows"]) -> Iterator[slice]:
    """Stretches in which the step does not go back."""
    starts = [0, *(np.flatnonzero(np.diff(steps) < 0) + 1).tolist(), len(steps)]
    for start, stop in pairwise(starts):
        if stop > start:
            yield slice(start, stop)


def envelope(
    x: Float[np.ndarray, " rows"], y: Float[np.ndarray, " rows"], most: int = MOST
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """At most so many points: of each stretch its smallest and its largest, in order.

    A stretch with a NaN in it has one point more, the NaN, where a line breaks. Up to
    `most` rows are returned as they are.

    Example:
        >>> x, y = np.arange(9000.0), np.zeros(9000)
        >>> y[4321] = 1.0
        >>> thin, low = envelope(x, y)
        >>> len(thin) <= 2000, thin[low == 1.0]
        (True, array([4321.]))
    """
    if len(x) <= most:
        return x, y
    starts = np.linspace(0, len(x), max(most // 3, 1) + 1).astype(int)[:-1]
    stretch = np.searchsorted(starts, np.arange(len(x)), side="right") - 1
    missing = np.isnan(y)
    smallest = np.lexsort((np.where(missing, np.inf, y), stretch))[starts]
    largest = np.lexsort((np.where(missing, np.inf, -y), stretch))[starts]
    gaps = np.lexsort((~missing, stretch))[starts]
    kept = np.unique(np.concatenate([smallest, largest, gaps[missing[gaps]]]))
    return x[kept], y[kept]


def band(x: Float[np.ndarray, " rows"], y: Float[np.ndarray, " rows"]) -> Band | None:
    """Median and 10th to 90th percentile of centred windows, some 4 % of the rows wide.

    Windows are as long before their middle as after it, also at the ends, where they
    get narrower: the median does not lag. None where there are too few rows.
    """
    count = len(x)
    half = max(count // 50, _LEAST // 2)
    if count < 4 * half:
        return None
    middles = np.unique(np.linspace(0, count - 1, min(_WINDOWS, count)).astype(int))
    rows = []
    for middle in middles:
        reach = min(half, middle, count - 1 - middle)
        part = y[middle - reach : middle + reach + 1]
        known = part[~np.isnan(part)]
        has_any = len(known) > 0
        rows.append(np.quantile(known, (0.1, 0.5, 0.9)) if has_any else [np.nan] * 3)
    low, median, high = np.array(rows).T
    return Band(x[middles], low, median, high)
