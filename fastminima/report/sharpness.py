"""The figures of the largest eigenvalues of the Hessian."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .columns import Column, Columns
from .drawn import Drawn, drawn, has
from .traces import Trace, dashed, dots, error_bars

__all__ = ["eigenvalues", "sharpness", "two_over_lr"]

_COLOURS = ("blue", "orange", "green", "purple")
_SYMBOLS = ("circle", "square", "diamond", "cross")


def _eigenvalue(columns: Columns, number: int, name: str) -> Trace:
    return error_bars(
        columns[f"sharpness/eigenvalue_{number}"],
        columns[f"sharpness/residual_{number}"],
        name,
        _COLOURS[(number - 1) % len(_COLOURS)],
        _SYMBOLS[(number - 1) % len(_SYMBOLS)],
    )


def sharpness(columns: Columns) -> Drawn | None:
    """The largest eigenvalue with its residual, beside 2/eta."""
    if not has(columns, "sharpness/eigenvalue_1"):
        return None
    traces = [_eigenvalue(columns, 1, "λ₁ ± residual")]
    if has(columns, "sharpness/upper"):
        traces.append(dots(columns["sharpness/upper"], "upper bound", "green"))
    limit = two_over_lr(columns)
    if len(limit):
        traces.append(dashed(limit, "2/η"))
    return drawn(
        "sharpness",
        "Sharpness",
        "Sharpness beside 2/η",
        "λ₁ is the largest eigenvalue of the Hessian of the loss; bars are residuals: "
        "an eigenvalue lies within each. Above 2/η (2(1+m)/η with momentum m) gradient "
        "descent grows along its eigenvector, and training hovers at the edge.",
        traces,
        "loss / parameter²",
    )


def two_over_lr(columns: Columns) -> Column:
    """What sharpness is compared with: as logged, else from the learning rate."""
    if len(columns["sharpness/two_over_lr"]):
        return columns["sharpness/two_over_lr"]
    rate = columns["factors/learning_rate"]
    if len(columns["factors/momentum"]) != len(rate):
        return Column(rate.at[:0], rate.steps[:0], rate.values[:0])
    factor = 2 * (1 + columns["factors/momentum"].values)
    rates = np.where(rate.values > 0, rate.values, np.nan)
    return Column(rate.at, rate.steps, factor / rates)


def eigenvalues(columns: Columns) -> Drawn | None:
    """All of them, where there are several."""
    found = list(_eigenvalue_numbers(columns))
    if len(found) < 2:
        return None
    traces = [_eigenvalue(columns, i, f"λ{i}") for i in found]
    return drawn(
        "eigenvalues",
        "Sharpness",
        "Top of the spectrum",
        "The largest eigenvalues of the Hessian, λ1 ≥ λ2 ≥ …, each with its residual "
        "as a bar. How far the first stands out says how few directions are steep.",
        traces,
        "loss / parameter²",
    )


def _eigenvalue_numbers(columns: Columns) -> Iterable[int]:
    number = 1
    while has(columns, f"sharpness/eigenvalue_{number}"):
        yield number
        number += 1
