"""What a noise scale says of the size of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from .factors import as_index

__all__ = ["BatchSizeAdvice", "advise_batch_size"]

# Of x = S / B, where erf(sqrt(x / 2))^2 = 1/2.
_HALF_OF_SIGNS = NormalDist().inv_cdf((1 + math.sqrt(0.5)) / 2) ** 2


@dataclass(frozen=True)
class BatchSizeAdvice:
    """What a noise scale says of a batch size; prints as a sentence or two.

    Pairs are (low, high), from the interval that the noise scale came with: an end that
    is not known is 0 or infinity there.

    Attributes:
        batch_size: S, samples in one step of the optimizer.
        noise_scale: B, as it was given.
        half_efficient: the interval of the batch size at which a step makes half the
            progress of one without noise.
        step_progress: of a step at S, as a part of that of one without noise.
        sample_worth: of a sample at S, as a part of what it is in small batches.
        averaged: batches that the sign is taken of the average of; None where steps are
            linear in the gradient.
    """

    batch_size: int
    noise_scale: float
    half_efficient: tuple[float, float]
    step_progress: tuple[float, float]
    sample_worth: tuple[float, float]
    averaged: float | None = None

    def __str__(self) -> str:
        low, high = self.half_efficient
        if low == 0 and math.isinf(high):
            return (
                "The noise scale is not known: its interval has no end. Average over "
                "more steps, or measure larger batches."
            )
        return (
            f"A step is half as efficient at a batch of {self._size()} samples: it "
            "makes half the progress of one without noise, and a sample is worth "
            f"{self._half_worth()} of what it is in small batches. "
            f"At {self.batch_size} samples a step makes "
            f"{_percent(self.step_progress)} of that progress, and a sample is worth "
            f"{_percent(self.sample_worth)}. {self._advice()}"
        )

    def to_dict(self) -> dict[str, float]:
        """Numbers for a log line, or a row of a table; pairs by `_low` and `_high`."""
        found: dict[str, float] = {}
        for name, value in vars(self).items():
            if isinstance(value, tuple):
                found |= {f"{name}_low": value[0], f"{name}_high": value[1]}
            elif value is not None:
                found[name] = value
        return found

    def _size(self) -> str:
        low, high = self.half_efficient
        if math.isinf(high):
            return f"at least {_rounded(low)}"
        if not low:
            return f"at most {_rounded(high)}"
        centre = _half_size(self.noise_scale, self.averaged)
        about, *ends = map(_rounded, (centre, low, high))
        return f"about {about} ({' to '.join(ends)})"

    def _half_worth(self) -> str:
        if self.averaged is None:
            return "half"
        return f"{_rounded(100 * _worth(_HALF_OF_SIGNS, self.averaged))} %"

    def _advice(self) -> str:
        low, high = self.half_efficient
        if self.batch_size < low:
            return "A larger batch saves steps and wastes few samples."
        if self.batch_size > high:
            return "A smaller batch saves samples and takes few more steps."
        return "This batch size is inside the interval: neither is sure to pay."


def advise_batch_size(
    noise_scale: float,
    low: float | None,
    high: float | None,
    batch_size: int,
    *,
    averaged: float | None = None,
) -> BatchSizeAdvice:
    """The batch size at which a step is half as efficient, with its interval, in words.

    With the noise scale B a step at batch size S makes S / (S + B) of the progress of
    a step without noise, at the best learning rate of each: half of it at S = B. The
    progress a sample is B / (S + B) of what it is in small batches. That holds for
    plain SGD where the curvature is the same in all directions, at the parameters
    where B was measured; B grows as training goes on.

    Steps by signs (`averaged`), with B from "gradient/sign_noise_scale_smoothed", make
    erf(sqrt(x / 2))^2 of that progress, x = averaged S / B: half of it at x = 1.11,
    where a sample is worth 71 % of what it is in small batches. That holds where the
    noise is Gaussian, its ratio to the signal the same in all parameters, and the
    Hessian diagonal; and where the signs of the momentum, which B is measured with, are
    mostly right. Else less would do: where the ratios spread log-normally by a factor
    of e, half of the progress is made at x = 0.57, and wrong signs make B too large.

    Args:
        noise_scale: an average over steps, as "gradient/noise_scale_smoothed".
        low: of its interval ("gradient/noise_scale_low"); None or NaN has no end.
        high: the other end.
        batch_size: S, samples in one step of the optimizer.
        averaged: for Lion and signSGD, the number of batches that the sign is taken of
            the average of: 1 without momentum, (1 + m) / (1 - m) with momentum m, of
            Lion 1 / ((1 - b1)^2 + b1^2 (1 - b2) / (1 + b2)), 71 by default.

    Raises:
        ValueError: for a batch size or `averaged` below one, or an interval without the
            noise scale in it.

    Example:
        >>> import fastminima as fm
        >>> advice = fm.advise_batch_size(120.0, 80.0, 190.0, batch_size=32)
        >>> advice.half_efficient
        (80.0, 190.0)
        >>> [round(part, 2) for part in advice.step_progress]
        [0.14, 0.29]
        >>> print(str(advice).split(":")[0])
        A step is half as efficient at a batch of about 120 (80 to 190) samples
        >>> advice = fm.advise_batch_size(9e3, 8e3, 1e4, batch_size=32, averaged=71)
        >>> print(str(advice).split(":")[0])
        A step is half as efficient at a batch of about 140 (125 to 156) samples

    Source: McCandlish et al. (2018), arXiv:1812.06162, equation 2.7, with the simple
    noise scale for that of 2.8; for signs the same of the decrease
    eta <g, s> - eta^2 s'Hs / 2, with E s_i = erf(g_i sqrt(S / 2) / sigma_i) as in
    Bernstein et al. (2018), arXiv:1802.04434.
    """
    size = as_index(batch_size, "batch_size")
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if averaged is not None and not 1 <= averaged < math.inf:
        raise ValueError(f"averaged must be at least 1 batch, got {averaged}.")
    # The trace in it is not negative; an end below zero is that of the estimate.
    bottom = max(0.0, low) if low is not None and math.isfinite(low) else 0.0
    top = math.inf if high is None or math.isnan(high) else float(high)
    centre = float(noise_scale)
    if centre < 0 or (math.isnan(centre) and math.isinf(top)):
        # The signal is lost in the noise, or there is none: the interval says which.
        centre = math.inf if math.isinf(top) else bottom
    if not bottom <= centre <= top:
        raise ValueError(
            f"The noise scale {noise_scale} is not in its interval [{low}, {high}]. "
            "Give the three numbers of one row."
        )
    ends = (bottom, top)
    times = [(averaged or 1) * size / end if end else math.inf for end in ends]
    return BatchSizeAdvice(
        size,
        centre,
        (_half_size(bottom, averaged), _half_size(top, averaged)),
        step_progress=(_progress(times[1], averaged), _progress(times[0], averaged)),
        sample_worth=(_worth(times[0], averaged), _worth(times[1], averaged)),
        averaged=averaged,
    )


def _half_size(noise_scale: float, averaged: float | None) -> float:
    """The batch size of half the progress."""
    if averaged is None:
        return noise_scale
    return _HALF_OF_SIGNS * noise_scale / averaged


def _progress(times: float, averaged: float | None) -> float:
    """Of a step with so many times the noise scale, as a part of one without noise."""
    if averaged is not None:
        return math.erf(math.sqrt(times / 2)) ** 2
    return 1.0 if math.isinf(times) else times / (1 + times)


def _worth(times: float, averaged: float | None) -> float:
    """Of a sample there: progress over that of small batches, which is linear."""
    if averaged is None:
        return 1 / (1 + times)
    small = 2 * times / math.pi
    return _progress(times, averaged) / small if small else 1.0


def _percent(ends: tuple[float, float]) -> str:
    low, high = (_rounded(100 * end) for end in ends)
    return f"{low} to {high} %"


def _rounded(value: float) -> str:
    """About three digits, as people write them."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 10 else f"{value:.2g}"
