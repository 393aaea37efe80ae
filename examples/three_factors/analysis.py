"""From records of runs to the numbers that decide the claim."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = [
    "SHARPNESS",
    "Correlation",
    "Row",
    "Spread",
    "at_end",
    "at_loss",
    "common_loss",
    "correlation",
    "spread",
]

# Measures of sharpness; a minimum's width is one over any of them.
SHARPNESS = ("frobenius_norm", "lambda_max", "trace")
_LOGARITHMIC = (*SHARPNESS, "covariance_trace", "temperature")
_LINEAR = ("validation_accuracy", "train_accuracy", "validation_loss")


@dataclass(frozen=True)
class Row:
    """One run at one moment: what was set and what was measured."""

    learning_rate: float
    batch_size: int
    ratio: float
    seed: int
    values: dict[str, float]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of `count` runs.

    `p` is the share of 10 000 random pairings at least as correlated, of either sign
    (the pairing found counted among them); `low` and `high` hold 95 % of bootstrap
    resamples of the runs.
    """

    rho: float
    p: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return (
            f"{self.rho:+.2f} (95 % {self.low:+.2f} … {self.high:+.2f}, "
            f"p {_p(self.p)}, {self.count} runs)"
        )


@dataclass(frozen=True)
class Spread:
    """Largest over smallest value, as a factor, the median over the groups compared.

    Attributes:
        across_beta: between batch sizes, at one ratio (means over seeds).
        across_ratio: between ratios, at one batch size (means over seeds).
        across_seeds: between seeds, at one learning rate and batch size.
        ratio_power, beta_power: a and b of the least-squares fit of all runs, width
            proportional to (eta/S)^a beta^b. If only the ratio matters b is 0; if only
            the learning rate does, b = a.
        by_ratio: `across_beta` of each ratio.
    """

    across_beta: float
    across_ratio: float
    across_seeds: float
    ratio_power: float
    beta_power: float
    by_ratio: dict[float, float]


def at_end(records: Iterable[dict[str, Any]]) -> list[Row]:
    """The finished runs as they were left."""
    return [
        _row(r, r["measurements"][-1]) for r in records if r["status"] == "finished"
    ]


def at_loss(records: Iterable[dict[str, Any]], loss: float) -> list[Row]:
    """The finished runs where their train loss was `loss`; those that never were: out.

    Between the last measurement above and the first one below, curvature and noise are
    interpolated as powers of the loss, accuracies as linear in its logarithm.
    """
    rows = []
    for record in records:
        if record["status"] == "finished":
            values = _interpolate(record["measurements"], loss)
            if values is not None:
                rows.append(_row(record, values))
    return rows


def common_loss(records: Sequence[dict[str, Any]], rungs: Iterable[float]) -> float:
    """The lowest rung that all finished runs were measured on both sides of.

    Where there is none, the lowest that three quarters of them were; NaN failing that.
    """
    finished = sum(r["status"] == "finished" for r in records)
    reached = {rung: len(at_loss(records, rung)) for rung in rungs}
    for needed in (finished, math.ceil(0.75 * finished)):
        enough = [rung for rung, count in reached.items() if count >= max(1, needed)]
        if enough:
            return min(enough)
    return math.nan


def correlation(rows: Sequence[Row], name: str, *, sign: int = 1) -> Correlation:
    """Spearman correlation of `sign` times a measured value with the ratio."""
    pairs = [(r.ratio, sign * r.values[name]) for r in rows]
    x, y = (np.array(v, dtype=float) for v in zip(*pairs, strict=True))
    keep = np.isfinite(y)
    x, y = _ranks(x[keep]), _ranks(y[keep])
    rng = np.random.default_rng(0)
    rho = float(_pearson(x, y)) if len(x) > 1 else math.nan
    if math.isnan(rho):  # nothing varies
        return Correlation(rho, math.nan, math.nan, math.nan, len(x))
    shuffled = _pearson(x, rng.permuted(np.tile(y, (9_999, 1)), axis=1))
    extreme = int((np.abs(shuffled) >= abs(rho) - 1e-12).sum())
    draws = rng.integers(0, len(x), (2_000, len(x)))
    boot = _pearson(_ranks(x[draws]), _ranks(y[draws]))
    low, high = np.nanpercentile(boot, [2.5, 97.5])
    return Correlation(rho, (1 + extreme) / 10_000, low, high, len(x))


def spread(rows: Sequence[Row], name: str) -> Spread:
    """How much a value differs across batch sizes, ratios and seeds, as factors."""
    cells: dict[tuple[float, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.values[name] > 0:
            cells[row.ratio, row.batch_size].append(math.log(row.values[name]))
    powers = _powers(cells)
    means = {key: float(np.mean(v)) for key, v in cells.items()}
    by_ratio = _ranges(means, group=0)
    return Spread(
        across_beta=_median(by_ratio.values()),
        across_ratio=_median(_ranges(means, group=1).values()),
        across_seeds=_median(
            math.exp(max(v) - min(v)) for v in cells.values() if len(v) > 1
        ),
        ratio_power=powers[0],
        beta_power=powers[1],
        by_ratio=by_ratio,
    )


def _row(record: dict[str, Any], values: dict[str, float]) -> Row:
    return Row(
        learning_rate=record["learning_rate"],
        batch_size=record["batch_size"],
        ratio=record["ratio"],
        seed=record["seed"],
        values={k: v for k, v in values.items() if k != "epoch"},
    )


def _interpolate(
    measurements: Sequence[dict[str, float]], loss: float
) -> dict[str, float] | None:
    for before, after in pairwise(measurements):
        high, low = before["train_loss"], after["train_loss"]
        if high > loss >= low:
            share = math.log(high / loss) / math.log(high / low)
            values = {k: (1 - share) * before[k] + share * after[k] for k in _LINEAR}
            for k in _LOGARITHMIC:
                both = _log(before[k]), _log(after[k])
                values[k] = math.exp((1 - share) * both[0] + share * both[1])
            return {**values, "train_loss": loss}
    return None


def _log(value: float) -> float:
    """The logarithm; NaN where an estimate came out negative."""
    return math.log(value) if value > 0 else math.nan


def _powers(cells: dict[tuple[float, int], list[float]]) -> tuple[float, float]:
    """Powers of the ratio and of beta that the width, one over the value, has."""
    design = [
        (1, math.log(ratio), math.log(size))
        for (ratio, size), found in cells.items()
        for _ in found
    ]
    width = [-value for found in cells.values() for value in found]
    _, of_ratio, of_size = np.linalg.lstsq(np.array(design), np.array(width))[0]
    return float(of_ratio), float(of_size)


def _ranges(means: dict[tuple[float, int], float], group: int) -> dict[float, float]:
    """Largest over smallest mean within each group, for groups of two and more."""
    groups: dict[float, list[float]] = defaultdict(list)
    for key, mean in means.items():
        groups[key[group]].append(mean)
    return {
        k: math.exp(max(v) - min(v)) for k, v in sorted(groups.items()) if len(v) > 1
    }


def _median(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.median(listed)) if listed else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 along the last axis, equal values sharing their mean rank."""
    one, other = values[..., :, None], values[..., None, :]
    return (one > other).sum(-1) + ((one == other).sum(-1) - 1) / 2


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation along the last axis; NaN where either does not vary."""
    x, y = x - x.mean(-1, keepdims=True), y - y.mean(-1, keepdims=True)
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return (x * y).sum(-1) / np.where(scale > 0, scale, np.nan)


def _p(value: float) -> str:
    return "≤ 0.0001" if value <= 1e-4 else f"{value:.2g}"
