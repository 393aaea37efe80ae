"""The noise scale as a ratio of running averages."""

from __future__ import annotations

import math

__all__ = ["SmoothedNoiseScale"]


class SmoothedNoiseScale:
    """Exponential averages of tr Sigma and |E g|^2 over steps, and their ratio.

    Each is unbiased at every step; the ratio of one step is not, and averaging ratios
    keeps their bias. Both averages start from zero, which scales them by the same
    1 - decay^t: it cancels in the ratio.

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

    Source: McCandlish et al. (2018), arXiv:1812.06162, appendix A.1.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, got {decay}.")
        self._decay = decay
        self._noise = self._signal = 0.0

    def update(self, covariance_trace: float, signal: float) -> float:
        """Add a step and return the ratio so far; NaN as long as it is undefined.

        A step that is not finite is left out: it would stay in the average for good.
        """
        if math.isfinite(covariance_trace) and math.isfinite(signal):
            d = self._decay
            self._noise = d * self._noise + (1 - d) * covariance_trace
            self._signal = d * self._signal + (1 - d) * signal
        return self._noise / self._signal if self._signal else math.nan
