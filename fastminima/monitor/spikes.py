"""Steps that stand out: how far loss and gradient norm are above a forecast."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from statistics import NormalDist, median
from typing import Any

__all__ = ["Spike", "SpikeDetector"]

_LOOK_BACK = (3, 15)  # logged steps whose median is a forecast
_FEWEST = 2  # errors, without which there is no spread
_FEW, _LEFT_OUT = 8, 2  # one in so many errors, at least two, are not in the spread
_EFFICIENCY = 0.5  # degrees of freedom that the others get out of an error
_PRIOR, _PRIOR_ERRORS = 0.1, 3  # before there are errors: 10 %, as if of three
_TAIL = 3.719  # a normal error is above it once in 10,000 steps


@dataclass(frozen=True)
class Spike:
    """A number that is far above what it was.

    Attributes:
        step: of the training loop.
        what: "loss", or "norm" of the mean gradient.
        value: what it is.
        usual: what was forecast: the median of a few logged steps before.
        scale: spread of the forecasts' errors, of the logarithms (of the values
            themselves, where some are not positive).
        z: by how many of these `value` is above `usual`; infinite where it is not
            finite.
    """

    step: int
    what: str
    value: float
    usual: float
    scale: float
    z: float

    def to_dict(self) -> dict[str, Any]:
        """By name."""
        return asdict(self)


class SpikeDetector:
    """Compares each step's loss and gradient norm with forecasts from steps before it.

    Two forecasts of log x, the medians of the last 3 and of the last 15 logged steps:
    the short one follows a loss that falls steeply, the long one sees a rise that takes
    several steps. Neither is moved by a spike or two, nor falls below what was seen
    after a sudden drop, as a line drawn through the last steps would. How good a
    forecast is, its errors over the window say: with m their median and s the quantile
    of |error - m| that an eighth are above, over that of a normal distribution,

        z = (log x - forecast - max(m, 0)) / s.

    So trends, correlated noise and what happens more than once in eight steps are in
    the scale, and rarer spikes are not. A step is a spike where z passes the threshold
    for one of the two, or where it is the first of several values that are not finite.
    A new level is one until it is most of the last 3 and the last 15 steps.

    Few errors say little: s has half a degree of freedom for each, and is averaged with
    a spread of 10 % worth three; the threshold is multiplied by what Student's t has
    over a normal distribution at 1 in 10,000 (2.4 at 8 logged steps, 1.4 at 20, 1.07 at
    100).

    Args:
        threshold: z-score from which on a step is a spike.
        window: logged steps whose errors are compared with.
        least: logged steps before which nothing is said, at least 5 being needed.

    Raises:
        ValueError: for a threshold that is not positive, or a window below `least`.

    Example:
        >>> from fastminima.monitor import SpikeDetector
        >>> detector = SpikeDetector(threshold=6.0)
        >>> for step in range(50):
        ...     falling = 2.0 * 0.9**step + 0.01 * (step % 3)
        ...     spikes = detector.update(step, loss=falling, norm=1.0)
        >>> [spike.what for spike in detector.update(50, loss=0.1, norm=1.0)]
        ['loss']

    Source: Hyndman and Athanasopoulos (2021), Forecasting: Principles and Practice,
    section 5.5, for the errors of one-step forecasts; Gelman et al. (2013), Bayesian
    Data Analysis, section 2.6, for the spread and its prior.
    """

    def __init__(
        self, threshold: float = 6.0, *, window: int = 100, least: int = 8
    ) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold}.")
        if not 2 <= least <= window:
            raise ValueError(
                f"least must be at least 2 and at most the window of {window}, got "
                f"{least}."
            )
        self.threshold, self._least = threshold, least
        self._series = {name: _Series(window) for name in ("loss", "norm")}
        self._was_finite = dict.fromkeys(self._series, True)

    def update(
        self, step: int, *, loss: float | None, norm: float | None
    ) -> list[Spike]:
        """Add a step, and say what is a spike in it."""
        found = []
        for what, value in (("loss", loss), ("norm", norm)):
            if value is not None:
                spike = self._look(step, what, value)
                found += [] if spike is None else [spike]
        return found

    def _look(self, step: int, what: str, value: float) -> Spike | None:
        series = self._series[what]
        is_finite, was_finite = math.isfinite(value), self._was_finite[what]
        self._was_finite[what] = is_finite
        if not is_finite:
            usual, scale, _ = series.compared(None)
            z = math.inf
            return Spike(step, what, value, usual, scale, z) if was_finite else None
        spike = None
        if len(series.values) >= self._least:
            usual, scale, z = series.compared(value)
            if z > self.threshold * series.widening():
                spike = Spike(step, what, value, usual, scale, z)
        series.add(value)
        return spike

    def state_dict(self) -> dict[str, Any]:
        """The values that were seen last, as plain lists."""
        windows = {name: list(one.values) for name, one in self._series.items()}
        return {"windows": windows, "was_finite": dict(self._was_finite)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        for name, values in state["windows"].items():
            self._series[name].replace(values)
        self._was_finite = dict(state["was_finite"])


class _Series:
    """Values, and the errors of both forecasts of each of them.

    It keeps as many values as the errors in the window are made of, so that the values
    are all of its state.
    """

    def __init__(self, window: int) -> None:
        self.values: deque[float] = deque(maxlen=window + max(_LOOK_BACK))
        self._errors = [deque[float](maxlen=window) for _ in _LOOK_BACK]
        self._recent: deque[float] = deque(maxlen=max(_LOOK_BACK))
        self._is_log = True

    def replace(self, values: Iterable[float]) -> None:
        """Have these values and no others."""
        self.values.clear()
        self.values.extend(values)
        self._replay()

    def add(self, value: float) -> None:
        """The value with its errors."""
        self.values.append(value)
        if self._is_log != (min(self.values) > 0):
            self._replay()
        else:
            self._add(value)

    def _replay(self) -> None:
        """All errors anew: of logarithms or of the values, as they allow."""
        self._is_log = min(self.values, default=1.0) > 0
        for one in (self._recent, *self._errors):
            one.clear()
        for value in self.values:
            self._add(value)

    def _add(self, value: float) -> None:
        place = math.log(value) if self._is_log else value
        if len(self._recent) >= min(_LOOK_BACK):
            for errors, forecast in zip(self._errors, self._forecasts(), strict=True):
                errors.append(place - forecast)
        self._recent.append(place)

    def _forecasts(self) -> list[float]:
        recent = list(self._recent)
        return [median(recent[-back:]) for back in _LOOK_BACK]

    def compared(self, value: float | None) -> tuple[float, float, float]:
        """What was forecast, its spread, and the z-score of a value.

        Of the two forecasts the one whose z is larger; of no value, the long one.
        """
        if value is not None and value <= 0 and self._is_log:
            return math.nan, math.nan, -math.inf  # below all that there was
        if len(self._errors[0]) < _FEWEST:
            usual = median(self.values) if self.values else math.nan
            return usual, math.nan, -math.inf
        found = []
        for errors, forecast in zip(self._errors, self._forecasts(), strict=True):
            middle, spread = _spread(errors)
            forecast += max(middle, 0.0)
            usual = math.exp(forecast) if self._is_log else forecast
            unit = 1.0 if self._is_log else max(abs(usual), 1e-30)
            scale = _with_prior(spread, len(errors), _PRIOR * unit)
            z = -math.inf
            if value is not None:
                place = math.log(value) if self._is_log else value
                z = (place - forecast) / scale
            found.append((usual, scale, z))
        return max(reversed(found), key=lambda one: one[2])

    def widening(self) -> float:
        """By how much few errors raise the threshold: Student's t over the normal.

        Source: Peizer and Pratt (1968), A normal approximation for binomial, F, beta
        and other common, related tail probabilities, J. Am. Stat. Assoc. 63.
        """
        v = _EFFICIENCY * len(self._errors[0]) + _PRIOR_ERRORS
        shrink = (v - 5 / 6) / (v - 2 / 3 + 0.1 / v) ** 2
        return math.sqrt(v * math.expm1(_TAIL**2 * shrink)) / _TAIL


def _spread(errors: Sequence[float]) -> tuple[float, float]:
    """Median of errors, and their robust standard deviation about it."""
    count, middle = len(errors), median(errors)
    away = sorted([abs(error - middle) for error in errors])
    above = max(count // _FEW, min(_LEFT_OUT, (count - 1) // 2))
    return middle, away[-1 - above] / _normal_quantile(count, above)


@cache
def _normal_quantile(count: int, above: int) -> float:
    """Where |x| of a normal distribution has so many of `count` above it."""
    return NormalDist().inv_cdf(1 - (above + 0.5) / count / 2)


def _with_prior(spread: float, errors: int, prior: float) -> float:
    """The spread of so many errors, averaged with what it is before there are any."""
    known = _EFFICIENCY * errors
    square = known * spread**2 + _PRIOR_ERRORS * prior**2
    return math.sqrt(square / (known + _PRIOR_ERRORS))
