"""The figures of a run that have the step as their x axis and numbers as y."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from .columns import Column, Columns
from .traces import (
    Figure,
    Trace,
    bold,
    dashed,
    dots,
    error_bars,
    interval,
    layout,
    log_axis,
    smooth,
    steps,
)

__all__ = ["Drawn", "curves", "own_columns"]

_HOW = (
    "Thin: as logged. Bold: the median over windows of rows that are centred, so that "
    "it does not lag. Shaded: their 10th to 90th percentile."
)
COLOURS = ("blue", "orange", "green", "purple")
_GROUPS = ("gradient/", "factors/", "sharpness/", "layers/")
_SYMBOLS = ("circle", "square", "diamond", "cross")


@dataclass(frozen=True)
class Drawn:
    """A figure on the page.

    Attributes:
        id: of its element.
        section: heading under which it stands.
        title: what it shows, in a few words.
        glossary: what its words mean, in a sentence or two.
        figure: in plotly's JSON.
    """

    id: str
    section: str
    title: str
    glossary: str
    figure: Figure


def curves(columns: Columns) -> list[Drawn]:
    """Every figure for which the rows have the numbers, in the order of the page."""
    makers: tuple[Callable[[Columns], Drawn | None], ...] = (
        _loss,
        _norms,
        _trace_of_covariance,
        _noise_scale,
        _preconditioned,
        _temperature,
        _factors,
        _sharpness,
        _eigenvalues,
    )
    return [drawn for drawn in (make(columns) for make in makers) if drawn is not None]


def own_columns(columns: Columns) -> list[Drawn]:
    """A figure for each column that the user added."""
    known = ("loss", "is_finite")
    names = [n for n in columns.names if n not in known and not n.startswith(_GROUPS)]
    return [
        _drawn(
            f"own-{number}",
            "Your own columns",
            name,
            f"The column {name!r} that was given as extra=. {_HOW}",
            smooth(columns[name], name, "blue"),
            name,
        )
        for number, name in enumerate(names)
        if np.isfinite(columns[name].values).any()
    ]


def _drawn(
    id: str, section: str, title: str, glossary: str, traces: list[Trace], unit: str
) -> Drawn:
    figure = {
        "data": traces,
        "layout": layout(title, yaxis=log_axis(traces, unit)),
    }
    return Drawn(id, section, title, glossary, figure)


def _has(columns: Columns, name: str) -> bool:
    return bool(np.isfinite(columns[name].values).any())


def _positive(column: Column) -> Column:
    """Without what a logarithmic axis cannot show."""
    return Column(
        column.at, column.steps, np.where(column.values > 0, column.values, np.nan)
    )


def _root(column: Column) -> Column:
    return Column(column.at, column.steps, np.sqrt(np.maximum(column.values, 0)))


def _loss(columns: Columns) -> Drawn | None:
    if not _has(columns, "loss"):
        return None
    return _drawn(
        "loss",
        "Loss",
        "Loss of each batch",
        f"The mean over the batch. {_HOW}",
        smooth(columns["loss"], "loss", "blue"),
        "loss",
    )


def _norms(columns: Columns) -> Drawn | None:
    if not _has(columns, "gradient/mean_grad_sq_norm"):
        return None
    traces = smooth(
        _root(columns["gradient/mean_grad_sq_norm"]), "of the mean gradient", "blue"
    )
    if _has(columns, "gradient/norm_median"):
        median = columns["gradient/norm_median"]
        traces += smooth(median, "of samples, the median", "orange")
    if _has(columns, "gradient/norm_max"):
        largest = columns["gradient/norm_max"]
        traces.append(dots(largest, "of samples, the largest", "purple"))
    return _drawn(
        "gradient-norms",
        "Gradient norms",
        "Norms of the gradient",
        "A sample's norm is |g_n|, g_n the gradient of its own loss; the mean gradient "
        "is what the optimizer is given. Samples that disagree make the mean smaller "
        f"than they are. {_HOW}",
        traces,
        "norm",
    )


def _trace_of_covariance(columns: Columns) -> Drawn | None:
    if not _has(columns, "gradient/covariance_trace"):
        return None
    traces = smooth(_positive(columns["gradient/covariance_trace"]), "tr Σ", "blue")
    if _has(columns, "gradient/signal"):
        signal = _positive(columns["gradient/signal"])
        traces.append(dots(signal, "signal |E g|²", "orange"))
    return _drawn(
        "covariance-trace",
        "Gradient variance",
        "Variance of the gradient, tr Σ, and its signal",
        "tr Σ is the variance of one sample's gradient, summed over parameters; the "
        "signal is the squared norm of the expected gradient. Both are unbiased, so "
        "that the signal of a single batch can be negative, and is then not drawn. "
        f"{_HOW}",
        traces,
        "squared gradient",
    )


def _noise_scale(columns: Columns) -> Drawn | None:
    return _noise_scale_in(
        columns,
        "gradient/noise_scale",
        "noise-scale",
        "Noise scale beside the batch size",
        "tr Σ / |E g|², in samples: the batch size at which noise and signal of the "
        "gradient have equal power. Bold: the ratio of smoothed averages; shaded: its "
        "95 % interval, open at the top where it has no upper end. Far below it a "
        "larger batch saves steps, far above it one wastes samples.",
    )


def _preconditioned(columns: Columns) -> Drawn | None:
    for kind in ("preconditioned", "sign"):
        drawn = _noise_scale_in(
            columns,
            f"gradient/{kind}_noise_scale",
            f"{kind}-noise-scale",
            "Noise scale in the optimizer's norm",
            "tr(P Σ) / gᵀP g, P what the optimizer multiplies the gradient with: the "
            "noise scale of the steps that it really takes.",
        )
        if drawn is not None:
            return drawn
    return None


def _noise_scale_in(
    columns: Columns, name: str, id: str, title: str, glossary: str
) -> Drawn | None:
    smoothed = columns[f"{name}_smoothed"]
    single = columns[name]
    if not (np.isfinite(smoothed.values).any() or np.isfinite(single.values).any()):
        return None
    low, high = columns[f"{name}_low"], columns[f"{name}_high"]
    batch = columns["factors/batch_size"]
    steady = [c for c in (smoothed, low, high, batch) if len(c)] or [single]
    shown = np.concatenate([c.values for c in steady])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    # A signal near zero makes a ratio as large as one likes; it need not be seen whole.
    top = min(shown.max(), 10 * np.quantile(shown, 0.95)) if len(shown) else 1.0
    traces = [dots(_positive(single), "single steps", "blue")] if len(single) else []
    if len(low):
        traces.append(
            interval(_positive(low), high, "orange", "95 % interval", 100 * top)
        )
    if len(smoothed):
        traces.append(bold(_positive(smoothed), "smoothed", "orange"))
    if len(batch):
        traces.append(dashed(batch, "batch size"))
    drawn = _drawn(id, "Noise scale", title, glossary, traces, "samples")
    axis = drawn.figure["layout"]["yaxis"]
    if axis["type"] == "log" and len(shown):
        axis["range"] = [math.log10(shown.min()) - 0.15, math.log10(top) + 0.15]
    return drawn


def _temperature(columns: Columns) -> Drawn | None:
    if not _has(columns, "factors/temperature"):
        return None
    return _drawn(
        "temperature",
        "Temperature and the three factors",
        "Temperature",
        "T = η/(1−m) · (1/S − 1/N) · σ²/2, in units of the loss: under isotropic noise "
        "SGD samples exp(−L/T), so that it spreads where the loss is within some T of "
        f"a minimum. {_HOW}",
        smooth(_positive(columns["factors/temperature"]), "temperature", "blue"),
        "loss",
    )


def gradient_variance(columns: Columns) -> Column:
    """sigma^2, the variance per parameter: 2 temperature / ratio."""
    ratio, heat = columns["factors/ratio"], columns["factors/temperature"]
    known = dict(zip(ratio.at.tolist(), ratio.values.tolist(), strict=True))
    ratios = np.array([known.get(at, math.nan) for at in heat.at.tolist()])
    ratios = np.where(ratios > 0, ratios, np.nan)
    return Column(heat.at, heat.steps, 2 * heat.values / ratios)


def _factors(columns: Columns) -> Drawn | None:
    rates = [n for n in columns.names if n.startswith("factors/learning_rate")]
    panels: list[tuple[str, list[Trace]]] = []
    if rates:
        panels.append(("η", [steps(columns[n], _short(n), "blue") for n in rates]))
    if _has(columns, "factors/batch_size"):
        batch = columns["factors/batch_size"]
        panels.append(("S", [steps(batch, "batch size S", "green")]))
    variance = _positive(gradient_variance(columns))
    if np.isfinite(variance.values).any():
        name = "gradient variance σ²"
        panels.append(("σ²", [*smooth(variance, name, "orange")]))
    if _has(columns, "factors/ratio"):
        ratio = columns["factors/ratio"]
        panels.append(("ratio", [steps(ratio, "ratio η/(1−m)·(1/S−1/N)", "purple")]))
    if not panels:
        return None
    return Drawn(
        "factors",
        "Temperature and the three factors",
        "The three factors",
        "Learning rate η, batch size S and the gradient's variance per parameter σ²; "
        "the ratio is what η, momentum m and S (drawn from N samples) make together. "
        "The temperature is ratio · σ²/2.",
        _stacked("The three factors", panels),
    )


def _short(name: str) -> str:
    group = name.removeprefix("factors/learning_rate").removeprefix("_")
    return f"learning rate η, group {group}" if group else "learning rate η"


def _stacked(title: str, panels: list[tuple[str, list[Trace]]]) -> Figure:
    """Panels above each other, with one x axis."""
    gap, count = 0.07, len(panels)
    height = (1 - gap * (count - 1)) / count
    traces: list[Trace] = []
    axes = {}
    for number, (unit, found) in enumerate(panels):
        suffix = "" if number == 0 else str(number + 1)
        bottom = max(0.0, 1 - (number + 1) * height - number * gap)
        domain = {"domain": [bottom, min(bottom + height, 1.0)]}
        axes[f"yaxis{suffix}"] = log_axis(found, unit) | domain
        traces += [trace | {"yaxis": f"y{suffix}"} for trace in found]
    figure = {"data": traces, "layout": layout(title, 130 * count + 90, **axes)}
    figure["layout"]["xaxis"]["anchor"] = "free"
    figure["layout"]["xaxis"]["position"] = 0
    return figure


def _eigenvalue(columns: Columns, number: int, name: str) -> Trace:
    return error_bars(
        columns[f"sharpness/eigenvalue_{number}"],
        columns[f"sharpness/residual_{number}"],
        name,
        COLOURS[(number - 1) % len(COLOURS)],
        _SYMBOLS[(number - 1) % len(_SYMBOLS)],
    )


def _sharpness(columns: Columns) -> Drawn | None:
    if not _has(columns, "sharpness/eigenvalue_1"):
        return None
    traces = [_eigenvalue(columns, 1, "λ₁ ± residual")]
    if _has(columns, "sharpness/upper"):
        traces.append(dots(columns["sharpness/upper"], "upper bound", "green"))
    limit = two_over_lr(columns)
    if len(limit):
        traces.append(dashed(limit, "2/η"))
    return _drawn(
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


def _eigenvalues(columns: Columns) -> Drawn | None:
    found = list(_eigenvalue_numbers(columns))
    if len(found) < 2:
        return None
    traces = [_eigenvalue(columns, i, f"λ{i}") for i in found]
    return _drawn(
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
    while _has(columns, f"sharpness/eigenvalue_{number}"):
        yield number
        number += 1
