"""The trend of a curve: a line fitted around each of its points."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["half_window", "trend"]

_SHARE = 20  # of a curve's points, one in so many lies on each side of a window
_LEAST = 5
# In a longer curve the trend is fitted at so many of its points, and straight between.
_POINTS = 1000
_ELEMENTS = 1 << 20  # of windows at a time


def half_window(count: int) -> int:
    """Points on each side of one that its trend is fitted to, in a curve of `count`."""
    return max(_LEAST, round(count / _SHARE))


def trend(
    steps: Sequence[float],
    values: Sequence[float],
    half: int,
    *,
    logarithmic: bool = False,
) -> list[float]:
    """A straight line through the neighbours of each point, read off at the point.

    The neighbours are `2 * half + 1` points around it, or as many from the end of the
    curve; weights fall to zero at the farthest, (1 - d^3)^3 of the distance d. Unlike
    an average over the past this follows a slope without lag: of a straight line it is
    the line itself, at its ends too.

    A value that is not finite is a gap: nothing is fitted across it. A step of NaN is
    one too.

    Args:
        steps: where the values are; rising between gaps.
        values: of the curve.
        half: points on each side.
        logarithmic: fit the logarithms, as an axis of logarithms shows them: the trend
            is a local geometric mean. What is not positive is left out of the fit.

    Example:
        >>> from fastminima.monitor.trend import trend
        >>> decay = [16.0, 8.0, 4.0, 2.0, 1.0]
        >>> round(trend(range(5), decay, 2, logarithmic=True)[-1], 6)
        1.0

    Source: Cleveland (1979), JASA 74, 829-836, without its robust iterations.
    """
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    found = np.full(len(x), math.nan)
    for part in _between_gaps(x, y):
        found[part] = _fitted(x[part], y[part], half, logarithmic)
    return found.tolist()


def _between_gaps(x: np.ndarray, y: np.ndarray) -> Iterator[slice]:
    is_there = np.isfinite(x) & np.isfinite(y)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_there, [False]])))
    for first, last in edges.reshape(-1, 2).tolist():
        yield slice(first, last)


def _fitted(x: np.ndarray, y: np.ndarray, half: int, logarithmic: bool) -> np.ndarray:
    used = y > 0 if logarithmic else np.ones(len(y), dtype=bool)
    if not used.any():
        return np.full(len(y), math.nan)
    at, over = x[used], np.log(y[used]) if logarithmic else y[used]
    chosen = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).round())
    where = x[chosen.astype(int)]
    width = min(2 * half + 1, len(at))
    some = max(1, _ELEMENTS // width)
    lines = [
        _lines(at, over, where[begin : begin + some], half, width)
        for begin in range(0, len(where), some)
    ]
    line = np.interp(x, where, np.concatenate(lines))
    return np.exp(line) if logarithmic else line


def _lines(
    at: np.ndarray, over: np.ndarray, where: np.ndarray, half: int, width: int
) -> np.ndarray:
    """What lines through the `width` neighbours of some places have there."""
    first = np.searchsorted(at, where) - half
    first = np.clip(first, 0, len(at) - width)  # a window does not pass the ends
    index = first[:, None] + np.arange(width)
    return _intercepts(at[index] - where[:, None], over[index])


def _intercepts(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of lines through the rows of [points, width], at x = 0."""
    distance = np.abs(x)
    # The farthest point keeps a little weight: a window of two has no others.
    reach = 1.001 * distance.max(1, keepdims=True)
    weight = (1 - (distance / np.where(reach > 0, reach, 1)) ** 3) ** 3
    total = weight.sum(1)
    x_mean, y_mean = (weight * x).sum(1) / total, (weight * y).sum(1) / total
    x_off, y_off = x - x_mean[:, None], y - y_mean[:, None]
    spread = (weight * x_off**2).sum(1)
    slope = (weight * x_off * y_off).sum(1) / np.where(spread > 0, spread, 1)
    return y_mean - slope * x_mean
