"""Steps that stand out: a robust z-score of the loss and of the gradient's norm."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

__all__ = ["Spike", "SpikeDetector"]

_NORMAL = 1.4826  # standard deviation over median absolute deviation, of a normal one
_LEAST_SPREAD = 0.01  # one percent, where a window hardly varies


@dataclass(frozen=True)
class Spike:
    """A number that is far above what it was.

    Attributes:
        step: of the training loop.
        what: "loss", or "norm" of the mean gradient.
        value: what it is.
        usual: the median of the window before.
        scale: 1.4826 times the median absolute deviation there, of the logarithms
            (of the values themselves, where some are not positive).
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
    """Compares each step's loss and gradient norm with a window of steps before it.

    The robust z-score of x is (log x - m) / s, m the median of the logarithms in the
    window and s 1.4826 times their median absolute deviation, at least 0.01: a few
    outliers in the window change neither. A spike is a z above the threshold, or the
    first of several values that are not finite. It enters the window like any other
    value, so a new level is a spike until it is half of the window.

    Args:
        threshold: z-score from which on a step is a spike.
        window: logged steps that are compared with.
        least: logged steps before which nothing is said.

    Raises:
        ValueError: for a threshold that is not positive, or a window below `least`.

    Example:
        >>> from fastminima.monitor import SpikeDetector
        >>> detector = SpikeDetector(threshold=6.0)
        >>> for step in range(50):
        ...     spikes = detector.update(step, loss=2.0 + 0.1 * (step % 3), norm=1.0)
        >>> [spike.what for spike in detector.update(50, loss=9.0, norm=1.0)]
        ['loss']

    Source: Iglewicz and Hoaglin (1993), How to Detect and Handle Outliers.
    """

    def __init__(
        self, threshold: float = 6.0, *, window: int = 100, least: int = 20
    ) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold}.")
        if not 2 <= least <= window:
            raise ValueError(
                f"least must be at least 2 and at most the window of {window}, got "
                f"{least}."
            )
        self.threshold, self._least = threshold, least
        self._windows: dict[str, deque[float]] = {
            name: deque(maxlen=window) for name in ("loss", "norm")
        }
        self._was_finite = dict.fromkeys(self._windows, True)

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
        window = self._windows[what]
        is_finite, was_finite = math.isfinite(value), self._was_finite[what]
        self._was_finite[what] = is_finite
        if not is_finite:
            usual, scale, _ = _compared(window, 1.0) if window else (math.nan,) * 3
            z = math.inf
            return Spike(step, what, value, usual, scale, z) if was_finite else None
        spike = None
        if len(window) >= self._least:
            usual, scale, z = _compared(window, value)
            if z > self.threshold:
                spike = Spike(step, what, value, usual, scale, z)
        window.append(value)
        return spike

    def state_dict(self) -> dict[str, Any]:
        """The windows, as plain lists."""
        windows = {name: list(window) for name, window in self._windows.items()}
        return {"windows": windows, "was_finite": dict(self._was_finite)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from windows."""
        for name, values in state["windows"].items():
            self._windows[name].clear()
            self._windows[name].extend(values)
        self._was_finite = dict(state["was_finite"])


def _compared(window: Iterable[float], value: float) -> tuple[float, float, float]:
    """Median and spread of a window, and the z-score of a value."""
    values = list(window)
    usual = median(values)
    if min(*values, value) > 0:
        logs = [math.log(x) for x in values]
        middle, place, least = math.log(usual), math.log(value), _LEAST_SPREAD
    else:
        logs, middle, place = values, usual, value
        least = _LEAST_SPREAD * max(abs(usual), 1e-30)
    scale = max(_NORMAL * median([abs(x - middle) for x in logs]), least)
    return usual, scale, (place - middle) / scale
