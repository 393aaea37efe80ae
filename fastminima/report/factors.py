"""The figures of the temperature and of the three factors behind it."""

from __future__ import annotations

import math

import numpy as np

from .columns import Column, Columns
from .drawn import HOW, Drawn, drawn, has, positive
from .traces import Figure, Trace, layout, log_axis, smooth, steps

__all__ = ["factors", "gradient_variance", "temperature"]

_DECAY = (
    " Weight decay w is a force without noise, so it is in neither. In SGD, where it "
    "is added to the gradient, T is the temperature of L + w|θ|²/2 in place of L; "
    "decoupled, as in AdamW and Lion, it shrinks the parameters by ηw a step."
)


def temperature(columns: Columns) -> Drawn | None:
    """The temperature of each row, and its median."""
    if not has(columns, "factors/temperature"):
        return None
    return drawn(
        "temperature",
        "Temperature and the three factors",
        "Temperature",
        "T = η/(1−m) · (1/S − 1/N) · σ²/2, in units of the loss: under isotropic noise "
        "SGD samples exp(−L/T), so that it spreads where the loss is within some T of "
        f"a minimum. {HOW}",
        smooth(positive(columns["factors/temperature"]), "temperature", "blue"),
        "loss",
    )


def gradient_variance(columns: Columns) -> Column:
    """sigma^2, the variance per parameter: 2 temperature / ratio."""
    ratio, heat = columns["factors/ratio"], columns["factors/temperature"]
    known = dict(zip(ratio.at.tolist(), ratio.values.tolist(), strict=True))
    ratios = np.array([known.get(at, math.nan) for at in heat.at.tolist()])
    ratios = np.where(ratios > 0, ratios, np.nan)
    return Column(heat.at, heat.steps, 2 * heat.values / ratios)


def factors(columns: Columns) -> Drawn | None:
    """Learning rate, batch size, variance and ratio above each other; weight decay."""
    panels: list[tuple[str, list[Trace]]] = []
    if rates := _of_groups(columns, "learning_rate", "learning rate η", "blue"):
        panels.append(("η", rates))
    if has(columns, "factors/batch_size"):
        batch = columns["factors/batch_size"]
        panels.append(("S", [steps(batch, "batch size S", "green")]))
    variance = positive(gradient_variance(columns))
    if np.isfinite(variance.values).any():
        name = "gradient variance σ²"
        panels.append(("σ²", [*smooth(variance, name, "orange")]))
    if has(columns, "factors/ratio"):
        ratio = columns["factors/ratio"]
        panels.append(("ratio", [steps(ratio, "ratio η/(1−m)·(1/S−1/N)", "purple")]))
    decay = _of_groups(columns, "weight_decay", "weight decay w", "ink")
    if decay:
        panels.append(("w", decay))
    if not panels:
        return None
    return Drawn(
        "factors",
        "Temperature and the three factors",
        "The three factors",
        "Learning rate η, batch size S and the gradient's variance per parameter σ²; "
        "the ratio is what η, momentum m and S (drawn from N samples) make together. "
        "The temperature is ratio · σ²/2." + (_DECAY if decay else ""),
        _stacked("The three factors", panels),
    )


def _of_groups(columns: Columns, option: str, label: str, colour: str) -> list[Trace]:
    """An option of the optimizer, a line for each parameter group that differs.

    Those that are zero throughout are left out.
    """
    found = []
    for name in columns.names:
        group = name.removeprefix(f"factors/{option}")
        is_it = group != name and (not group or group[1:].isdigit())
        if is_it and np.nan_to_num(columns[name].values).any():
            of = f", group {group[1:]}" if group else ""
            found.append(steps(columns[name], label + of, colour))
    return found


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
