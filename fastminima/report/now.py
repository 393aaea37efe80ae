"""The paper's quantities as they stand, each with its interval, in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .columns import Column
from .factors import gradient_variance
from .maps import layers_of, share_of_parameters
from .run import Run
from .sharpness import two_over_lr

__all__ = ["Quantity", "quantities"]

_Words = Callable[[float, float, float, float], str]
_RECENT = 50  # rows over which a quantity without an interval of its own is shown


@dataclass(frozen=True)
class Quantity:
    """A number as it stands at the end of a run.

    Attributes:
        name: as the field calls it.
        value: NaN where it is undefined.
        low: lower end of the interval; NaN if it is unbounded.
        high: upper end.
        interval: what the interval is.
        step: of the last row that has it.
        words: what it means, in a sentence.
    """

    name: str
    value: float
    low: float
    high: float
    interval: str
    step: float
    words: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what is not finite is None."""
        return {
            key: None if isinstance(x, float) and not math.isfinite(x) else x
            for key, x in asdict(self).items()
        }


def quantities(run: Run) -> list[Quantity]:
    """What can be said of a run, in the order of the paper."""
    makers: tuple[Callable[[Run], Iterator[Quantity]], ...] = (
        _loss,
        _noise_scale,
        _temperature,
        _variance,
        _sharpness,
        _layer,
    )
    return [found for make in makers for found in make(run)]


def _recent(column: Column, name: str, words: str) -> Iterator[Quantity]:
    """The median of the last rows and what most of them lie between."""
    values = column.values[-_RECENT:]
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, middle, high = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    kind = f"10th to 90th percentile of the last {len(values)} rows"
    yield Quantity(name, middle, low, high, kind, float(column.steps[-1]), words)


def _loss(run: Run) -> Iterator[Quantity]:
    yield from _recent(run.columns["loss"], "loss", "")


def _noise_scale(run: Run) -> Iterator[Quantity]:
    yield from _scale_of(run, "gradient/noise_scale", "noise scale", _worth)
    group = "gradient/preconditioned_noise_scale"
    yield from _scale_of(run, group, "noise scale in the optimizer's norm", _worth)
    group = "gradient/sign_noise_scale"
    yield from _scale_of(run, group, "noise scale of signs", _worth_of_signs)


def _scale_of(run: Run, group: str, name: str, worth: _Words) -> Iterator[Quantity]:
    """A noise scale as it stands, with the interval that was logged."""
    columns = run.columns
    column = columns[f"{group}_smoothed"]
    if not len(column):
        return
    low = _at_end(column, columns[f"{group}_low"])
    high = _at_end(column, columns[f"{group}_high"])
    has_interval = bool(len(columns[f"{group}_low"]))
    kind = "95 % interval" if has_interval else "no interval was logged"
    words = worth(column.last, low, high, columns["factors/batch_size"].usual)
    # A signal that is estimated below zero gives no ratio, but still a lower end.
    value = column.last if column.last > 0 else math.nan
    yield Quantity(name, value, low, high, kind, float(column.steps[-1]), words)


def _at_end(column: Column, other: Column) -> float:
    """The other's value in the last row of a column."""
    is_there = len(other) and other.at[-1] == column.at[-1]
    return other.last if is_there else math.nan


def _worth(scale: float, low: float, high: float, batch: float) -> str:
    """How much a sample of this batch still brings.

    Source: McCandlish et al. (2018), arXiv:1812.06162, equation 2.7.
    """
    half = (
        "A batch of this size makes half the progress a step that the full gradient "
        "would, and a sample in it is worth half of one in a small batch."
    )
    if not scale > 0:
        return (
            "The gradient's signal cannot be told from zero at this smoothing, so "
            "there is no estimate: only what it is at least. " + half
        )
    if not batch > 0:
        return half
    each = [
        f"{scale_at / (scale_at + batch):.0%}" if scale_at > 0 else "0%"
        for scale_at in (low, scale)
    ]
    top = f"{high / (high + batch):.0%}" if math.isfinite(high) else "100%"
    between = f" (95 % interval {each[0]} to {top})" if math.isfinite(low) else ""
    return (
        f"{half} In the batch of {batch:g} that you use, a sample is worth {each[1]}"
        f"{between} of one in a small batch."
    )


def _worth_of_signs(scale: float, low: float, high: float, batch: float) -> str:
    """What the noise scale of signs says; of a Gaussian 84 % lie above -1 sigma.

    Source: Bernstein et al. (2018), arXiv:1802.04434.
    """
    if not scale > 0:
        return (
            "What a step along the signs of the momentum gains cannot be told from "
            "zero at this smoothing, so there is no estimate: only what it is at least."
        )
    return (
        "In the mean of so many samples the deviations of the gradient, summed, are as "
        "large as what a step by signs gains: where all parameters are alike, 84 % of "
        "the signs are right. A momentum that averages k batches needs a k-th of it "
        "in each."
    )


def _temperature(run: Run) -> Iterator[Quantity]:
    columns = run.columns
    parts = [
        (f"learning rate {columns['factors/learning_rate'].last:.4g}"),
        (f"momentum {columns['factors/momentum'].last:.4g}"),
        (f"batch size {columns['factors/batch_size'].usual:.6g}"),
    ]
    known = [part for part in parts if not part.endswith("nan")]
    words = (
        "In units of the loss, from "
        + ", ".join(known)
        + (" and the gradient's variance per parameter.")
    )
    yield from _recent(columns["factors/temperature"], "temperature", words)


def _variance(run: Run) -> Iterator[Quantity]:
    yield from _recent(
        gradient_variance(run.columns),
        "gradient variance σ²",
        "Of one sample's gradient, per parameter.",
    )
    yield from _recent(
        run.columns["gradient/covariance_trace"],
        "tr Σ",
        "The variance of one sample's gradient, summed over all parameters.",
    )


def _sharpness(run: Run) -> Iterator[Quantity]:
    column = run.columns["sharpness/eigenvalue_1"]
    if not len(column):
        return
    residual = _at_end(column, run.columns["sharpness/residual_1"])
    limits = two_over_lr(run.columns)
    before = limits.where(limits.at <= column.at[-1])
    words = "The largest eigenvalue of the Hessian."
    if len(before) and before.last > 0:
        part = column.last / before.last
        side = "above: steps along its eigenvector grow" if part > 1 else "below"
        told = f"{part:.0%}" if part >= 0.01 else "less than 1%"
        words += f" It is {told} of 2/η = {before.last:.4g} ({side})."
    yield Quantity(
        "sharpness λ₁",
        column.last,
        column.last - residual,
        column.last + residual,
        "an eigenvalue lies within the residual",
        float(column.steps[-1]),
        words,
    )


def _layer(run: Run) -> Iterator[Quantity]:
    """The layer that has most of the variance."""
    layers = layers_of(run)
    shares = {layer: run.columns[f"layers/{layer}/share"] for layer in layers}
    medians = {
        layer: float(np.nanmedian(column.values[-_RECENT:]))
        for layer, column in shares.items()
        if np.isfinite(column.values[-_RECENT:]).any()
    }
    if not medians:
        return
    largest = max(medians, key=medians.__getitem__)
    part = share_of_parameters(run.about).get(largest)
    words = f"Layer {largest} has more of tr Σ than any other layer"
    words += f", with {part:.1%} of the parameters." if part is not None else "."
    yield from _recent(shares[largest], "largest share of tr Σ", words)
