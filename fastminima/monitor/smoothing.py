"""The noise scale as a ratio of running averages, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["SmoothedNoiseScale"]

_NORMAL = 1.959963984540054  # 97.5 % of a normal distribution lies below
_FEWEST = 4.0  # effective steps, below which nothing is said of the error
_MOST_CORRELATED = 0.95
# Exponential sums over steps: of weights, their squares, tr Sigma and the signal, their
# squares and product, and the same of neighbouring steps.
_SUMS = ("w", "ww", "a", "b", "aa", "ab", "bb", "v", "laa", "lab", "lbb")
Numbers = Any  # a float, or an array of them


class SmoothedNoiseScale:
    """Exponential averages of tr Sigma and |E g|^2 over steps, and their ratio.

    Each is unbiased at every step; the ratio of one step is not, and averaging ratios
    keeps their bias. `interval()` says what ratios the steps do not rule out, by
    Fieller's theorem: those rho for which the average of tr Sigma - rho |E g|^2 is
    within t standard errors of zero. The standard error is that of an exponential
    average of steps as far apart as they were, widened by (1 + d r) / (1 - d r) where
    neighbouring steps correlate by r (d the decay); the degrees of freedom of Student's
    t are the effective number of steps, fewer where they correlate. It speaks of the
    average over the window, not of where it moves.

    Args:
        decay: weight of the past, at least 0 and below 1: 0.95 looks back over some 20
            rows.

    Raises:
        ValueError: for a decay outside its range.

    Example:
        >>> from fastminima.monitor.smoothing import SmoothedNoiseScale
        >>> smoothed = SmoothedNoiseScale(decay=0.5)
        >>> smoothed.update(covariance_trace=8.0, signal=2.0)
        4.0
        >>> smoothed.update(covariance_trace=8.0, signal=-0.5)
        24.0
        >>> smoothed.interval()  # two steps say nothing of how far off that is
        (0.0, inf)

    Source: McCandlish et al. (2018), arXiv:1812.06162, appendix A.1; Fieller (1954),
    "Some problems in interval estimation", J. R. Stat. Soc. B 16.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {decay}.")
        self._decay = decay
        self._sums: dict[str, Numbers] = dict.fromkeys(_SUMS, 0.0)
        self._last: tuple[Numbers, Numbers] | None = None

    def update(self, covariance_trace: Numbers, signal: Numbers) -> Numbers:
        """Add a step and return the ratio so far; NaN as long as it is undefined.

        A step that is not finite is left out: it would stay in the average for good.

        Args:
            covariance_trace: a number, or an array of those of several layers.
            signal: the same.
        """
        a, b = np.asarray(covariance_trace), np.asarray(signal)
        is_there = np.isfinite(a) & np.isfinite(b)
        if is_there.all():
            self._sums, self._last = self._added(a, b)
        elif is_there.any():
            self._add_some(is_there, np.where(is_there, a, 0), np.where(is_there, b, 0))
        with np.errstate(all="ignore"):
            ratio = np.divide(self._sums["a"], self._sums["b"])
        ratio = np.where(np.equal(self._sums["b"], 0), np.nan, ratio)
        return ratio if np.ndim(covariance_trace) else float(ratio)

    def _added(self, a: np.ndarray, b: np.ndarray) -> tuple[dict[str, Numbers], Any]:
        """The sums with another step, and that step."""
        p, q = (a, b) if self._last is None else self._last
        new = 0.0 if self._last is None else 1.0
        step = {
            "w": 1.0,
            "ww": 1.0,
            "a": a,
            "b": b,
            "v": new,
            "aa": a * a,
            "ab": a * b,
            "bb": b * b,
            "laa": new * a * p,
            "lab": new * (a * q + b * p) / 2,
            "lbb": new * b * q,
        }
        d = self._decay
        sums = {name: d * self._sums[name] + x for name, x in step.items()}
        sums["ww"] = d * d * self._sums["ww"] + 1.0
        return sums, (a, b)

    def _add_some(self, where: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        """Add a step in some places, and leave the others as they are."""
        sums, (a, b) = self._added(a, b)
        self._sums = {n: np.where(where, sums[n], self._sums[n]) for n in _SUMS}
        p, q = (0.0, 0.0) if self._last is None else self._last
        self._last = np.where(where, a, p), np.where(where, b, q)

    def interval(self) -> tuple[Numbers, Numbers]:
        """The 95 % interval of the ratio; up to infinity where none is too large."""
        s = {name: np.asarray(x, dtype=np.float64) for name, x in self._sums.items()}
        with np.errstate(all="ignore"):
            low, high = _fieller(s, self._decay)
        if np.ndim(low):
            return low, high
        return float(low), float(high)

    def columns(
        self, group: str, covariance_trace: float, signal: float
    ) -> dict[str, float]:
        """Add a step; the ratio and the ends of its interval, as a row has them."""
        ratio = self.update(covariance_trace, signal)
        low, high = self.interval()
        return {
            f"{group}noise_scale_smoothed": ratio,
            f"{group}noise_scale_low": low,
            f"{group}noise_scale_high": high,
        }

    def state_dict(self) -> dict[str, Any]:
        """The averages, as plain numbers and lists."""
        last = self._last and [np.asarray(x).tolist() for x in self._last]
        sums = {name: np.asarray(x).tolist() for name, x in self._sums.items()}
        return {"sums": sums, "last": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from averages."""
        self._sums = {name: np.asarray(state["sums"][name]) for name in _SUMS}
        last: Sequence[Any] | None = state["last"]
        self._last = None
        if last is not None:
            self._last = np.asarray(last[0]), np.asarray(last[1])


def _fieller(s: Mapping[str, np.ndarray], decay: float) -> tuple[Numbers, Numbers]:
    """Ratios whose difference is within t standard errors of zero."""
    a, b = s["a"] / s["w"], s["b"] / s["w"]
    steps = s["w"] ** 2 / s["ww"]
    unbiased = 1 / (1 - 1 / steps)
    aa, ab, bb = (
        (s[name] / s["w"] - mean) * unbiased
        for name, mean in (("aa", a * a), ("ab", a * b), ("bb", b * b))
    )
    ratio = a / b
    r = _correlation(s, ratio, aa - 2 * ratio * ab + ratio * ratio * bb)
    wider = (1 + decay * r) / (1 - decay * r)
    independent = steps / wider
    q = _student(independent - 1) ** 2 * wider / steps
    # (b^2 - q bb) rho^2 - 2 (a b - q ab) rho + (a^2 - q aa) <= 0
    x, y, z = b * b - q * bb, a * b - q * ab, a * a - q * aa
    root = np.sqrt(np.maximum(y * y - x * z, 0))
    is_bounded, is_half = (x > 0) & (y + root > 0), (x <= 0) & (z > 0)
    low = np.where(is_bounded | is_half, (y - root) / x, 0)
    high = np.where(is_bounded, (y + root) / x, np.inf)
    is_known = independent >= _FEWEST
    low = np.where(is_known, np.maximum(low, 0), 0)
    return low, np.where(is_known, high, np.inf)


def _correlation(
    s: Mapping[str, np.ndarray], ratio: np.ndarray, variance: np.ndarray
) -> np.ndarray:
    """Of tr Sigma - ratio * signal in neighbouring steps; not below zero.

    With what estimating the mean takes off it (Marriott and Pope 1954).
    """
    a, b = s["a"] / s["w"], s["b"] / s["w"]
    aa, ab, bb = (
        s[name] / s["v"] - mean
        for name, mean in (("laa", a * a), ("lab", a * b), ("lbb", b * b))
    )
    r = (aa - 2 * ratio * ab + ratio * ratio * bb) / variance
    r = r + (1 + 3 * np.maximum(r, 0)) * s["ww"] / s["w"] ** 2
    return np.clip(np.nan_to_num(r), 0, _MOST_CORRELATED)


def _student(freedom: np.ndarray) -> np.ndarray:
    """97.5 % quantile of Student's t, to 1 % from three degrees of freedom on.

    Source: Abramowitz and Stegun (1964), 26.7.5.
    """
    x, v = _NORMAL, np.maximum(freedom, 2.0)
    first = (x**3 + x) / 4
    second = (5 * x**5 + 16 * x**3 + 3 * x) / 96
    third = (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384
    return x + first / v + second / v**2 + third / v**3
