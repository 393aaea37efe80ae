"""How often `SpikeDetector` is wrong, and what it finds, on curves as of training.

`python -m tools.spike_rates [--seeds 500]` prints the tables of docs/watching.md.
"""

from __future__ import annotations

import argparse
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from statistics import median

import numpy as np

from fastminima.monitor import SpikeDetector

STEPS = 400
EARLY = 20  # steps, of which it is asked apart
Curve = Callable[[np.random.Generator, np.ndarray], np.ndarray]  # its logarithms
Detector = Callable[[], Callable[[float], bool]]


def _noise(sd: float | np.ndarray, trend: Callable[[np.ndarray], np.ndarray]) -> Curve:
    """Normal noise about a trend of the logarithm."""
    return lambda rng, t: trend(t) + sd * rng.standard_normal(len(t))


def _student(freedom: int) -> Curve:
    return lambda rng, t: 0.05 * rng.standard_t(freedom, len(t)) - t / 500


def _correlated(by: float) -> Curve:
    """Noise whose neighbours correlate, as it is after a long time."""

    def curve(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
        e = 0.05 * rng.standard_normal(len(t))
        e[0] /= math.sqrt(1 - by**2)
        for i in range(1, len(e)):
            e[i] += by * e[i - 1]
        return e

    return curve


def _cliff(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    """A plateau, a fall to a fifth in 1 to 15 steps at a random time, a slow fall."""
    place, width = rng.integers(5, 200), rng.choice([0.2, 1.0, 3.0])
    fall = 1.6 / (1 + np.exp(-np.clip((t - place) / width, -50, 50)))
    return 0.03 * rng.standard_normal(len(t)) - fall - t / 2000


def _kink(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    """A fall by a tenth a step that ends at a random time."""
    fall = 0.1 * np.minimum(t, rng.integers(5, 200))
    return 0.01 * rng.standard_normal(len(t)) - fall


def _mixture(rng: np.random.Generator, t: np.ndarray) -> np.ndarray:
    """One step in five, at random, has twice the loss."""
    twice = math.log(2) * (rng.random(len(t)) < 0.2)
    return twice + 0.05 * rng.standard_normal(len(t)) - t / 500


def _drops(t: np.ndarray) -> np.ndarray:
    return -0.9 * (t >= 150) - 0.7 * (t >= 300) - t / 1000


T = np.arange(STEPS, dtype=float)
CURVES: dict[str, Curve] = {
    "constant, noise of 10 %": _noise(0.1, np.zeros_like),
    "constant, noise of 0.3 %": _noise(0.003, np.zeros_like),
    "constant, noise of 40 % (norms)": _noise(0.4, np.zeros_like),
    "rising twofold in 100 steps, 10 %": _noise(0.1, lambda t: t * math.log(2) / 100),
    "1/t, 5 %": _noise(0.05, lambda t: np.log(1 / (1 + t / 10) + 0.02)),
    "1/t, 0.01 %": _noise(1e-4, lambda t: np.log(1 / (1 + t / 5) + 0.01)),
    "exponential, 5 %": _noise(0.05, lambda t: np.log(np.exp(-t / 10) + 0.01)),
    "exponential, 0.1 %": _noise(0.001, lambda t: np.log(np.exp(-t / 4) + 0.01)),
    "a cliff after warm-up, 3 %": _cliff,
    "a steep fall that ends, 1 %": _kink,
    "drops of the learning rate, 5 to 2 %": _noise(
        np.select([T < 150, T < 300], [0.05, 0.03], 0.02), _drops
    ),
    "a fifth less each epoch, 5 %": _noise(0.05, lambda t: -0.2 * (t // 50)),
    "Student's t of 5, 5 %": _student(5),
    "Student's t of 3, 5 %": _student(3),
    "neighbours correlate by 0.9": _correlated(0.9),
    "neighbours correlate by 0.98": _correlated(0.98),
    "noise from 5 to 15 % at once": _noise(
        np.where(T < 200, 0.05, 0.15), lambda t: -t / 1000
    ),
    "every fifth three times as high": _noise(
        0.05, lambda t: math.log(3) * (t % 5 == 0) - t / 500
    ),
    "one in five twice as high": _mixture,
}
FALLS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "constant": np.zeros_like,
    "1/t": lambda t: -np.log(1 + t / 10),
    "5 % a step": lambda t: -t / 20,
    "10 % a step": lambda t: -t / 10,
}


def window_median(threshold: float = 6.0) -> Callable[[float], bool]:
    """What there was before: median and deviation of a window, without a trend."""
    window: deque[float] = deque(maxlen=100)

    def is_spike(value: float) -> bool:
        found, place = False, math.log(value)
        if len(window) >= 20:
            middle = median(window)
            spread = 1.4826 * median(abs(x - middle) for x in window)
            found = (place - middle) / max(spread, 0.01) > threshold
        window.append(place)
        return found

    return is_spike


def forecasts() -> Callable[[float], bool]:
    """The detector with its defaults."""
    detector = SpikeDetector()
    return lambda value: bool(detector.update(0, loss=value, norm=None))


PLACES = ((3, 12), (3, 30), (3, 300), (10, 8), (10, 30), (10, 300))
DETECTORS: Mapping[str, Detector] = {"before": window_median, "now": forecasts}


def false_alarms(make: Detector, curve: Curve, seeds: Iterable[int]) -> list[float]:
    """In 1000 steps after the first 20; and the part of runs with one among those."""
    late, early, runs = 0, 0, 0
    for seed in seeds:
        logs = curve(np.random.default_rng(seed), T)
        is_spike = make()
        said = [is_spike(value) for value in np.exp(logs).tolist()]
        late, early = late + sum(said[EARLY:]), early + any(said[:EARLY])
        runs += 1
    return [1000 * late / runs / (STEPS - EARLY), early / runs]


def found(
    make: Detector, fall: str, noise: float, at: int, size: float, seeds: Iterable[int]
) -> float:
    """The part of runs in which one value that is `size` times as high is a spike."""
    hits = []
    for seed in seeds:
        t = np.arange(at + 1.0)
        logs = _noise(noise, FALLS[fall])(np.random.default_rng(seed), t)
        logs[at] += math.log(size)
        is_spike = make()
        hits.append([is_spike(value) for value in np.exp(logs).tolist()][-1])
    return sum(hits) / len(hits)


def _tell(cells: Iterable[object]) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def _tell_alarms(seeds: range) -> None:
    names = list(DETECTORS)
    _tell(["curve", *names, *(f"first {EARLY}: {name}" for name in names)])
    _tell(["---"] * (1 + 2 * len(names)))
    for name, curve in CURVES.items():
        rates = [false_alarms(make, curve, seeds) for make in DETECTORS.values()]
        late = [f"{rate[0]:.2f}" for rate in rates]
        _tell([name, *late, *(f"{100 * rate[1]:.0f} %" for rate in rates)])


def _tell_found(seeds: range) -> None:
    _tell(["trend, noise", *(f"{size}-fold at step {at}" for size, at in PLACES)])
    _tell(["---"] * (1 + len(PLACES)))
    for fall in FALLS:
        for noise in (0.02, 0.05, 0.1):
            cells = []
            for size, at in PLACES:
                rates = [
                    found(make, fall, noise, at, size, seeds)
                    for make in DETECTORS.values()
                ]
                cells.append(", ".join(f"{100 * rate:.0f}" for rate in rates))
            _tell([f"{fall}, {100 * noise:.0f} %", *cells])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=500)
    seeds = range(parser.parse_args().seeds)
    _tell_alarms(seeds)
    print()
    _tell_found(seeds)


if __name__ == "__main__":
    main()
