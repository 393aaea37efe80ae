"""Heat maps: layer by step, and norm of samples by step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from .columns import Columns
from .drawn import Drawn
from .run import Run
from .traces import layout, numbers

__all__ = ["layer_maps", "layers_of", "norm_map"]

_PREFIX = "layers/"
_COLUMNS = 400  # of a map; more are not seen
_MAPS = (
    (
        "share",
        "Share of tr Σ, by layer",
        "share",
        "The part of the whole gradient's variance that a layer's parameters have.",
    ),
    (
        "noise_scale",
        "Noise scale, by layer",
        "samples",
        "tr Σ / |E g|² of the layer's own parameters, of single steps. Blank where the "
        "signal was too small to be seen. Where a column stands for several steps it "
        "is the median of those that had one.",
    ),
    (
        "sq_norm",
        "Gradient norm, by layer",
        "norm",
        "Root of the mean over samples of |g_n|², the part of it in this layer.",
    ),
)


def layers_of(run: Run) -> list[str]:
    """Names of the layers, in the order of the model."""
    found: dict[str, None] = {}
    for name in run.columns.names:
        if name.startswith(_PREFIX):
            found[name.removeprefix(_PREFIX).rpartition("/")[0]] = None
    listed = [str(layer.get("name")) for layer in run.about.get("layers", [])]
    known = [name or "(own)" for name in listed]
    return sorted(found, key=lambda n: known.index(n) if n in known else len(known))


def layer_maps(run: Run) -> list[Drawn]:
    """Layer by step: share of the variance, noise scale, norm."""
    layers = layers_of(run)
    found = []
    for key, title, unit, glossary in _MAPS:
        names = [f"{_PREFIX}{layer}/{key}" for layer in layers]
        grid = _grid(run.columns, names)
        if grid is None:
            continue
        steps, values = grid
        if key == "sq_norm":
            values = np.sqrt(values)
        figure = _heat_map(title, steps, values, unit)
        axis = figure["layout"]["yaxis"]
        axis |= {
            "tickvals": list(range(len(layers))),
            "ticktext": [_short(layer) for layer in layers],
            "range": [len(layers) - 0.5, -0.5],
        }
        figure["data"][0] |= {
            "customdata": [[layer] * len(steps) for layer in layers],
            "hovertemplate": "%{customdata}<br>step %{x}: %{text}<extra></extra>",
        }
        figure["layout"]["height"] = min(140 + 22 * max(len(layers), 4), 900)
        found.append(Drawn(f"layers-{key}", "Layers", title, glossary, figure))
    return found


def _grid(
    columns: Columns, names: list[str]
) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, "layers steps"]] | None:
    """Positive values of several columns over the rows that stand; None without any."""
    stands = columns.current
    values = np.full((len(names), len(columns)), np.nan)
    for number, name in enumerate(names):
        column = columns[name]
        values[number, column.at] = column.values
    values = np.where(values > 0, values, np.nan)
    kept = stands & np.isfinite(values).any(axis=0)
    if not kept.any():
        return None
    return _pooled(columns.steps[kept], values[:, kept], np.nanmedian)


def _pooled(
    steps: Float[np.ndarray, " steps"],
    values: Float[np.ndarray, "rows steps"],
    how: Callable[..., np.ndarray],
) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, "rows steps"]]:
    """At most some hundreds of columns, each what `how` makes of its stretch."""
    if len(steps) <= _COLUMNS:
        return steps, values
    edges = np.linspace(0, len(steps), _COLUMNS + 1).astype(int)
    with warnings.catch_warnings():
        # A stretch without a number is NaN, which is what it should be.
        warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
        pooled = [how(values[:, start:stop], axis=1) for start, stop in pairwise(edges)]
    return steps[edges[:-1]], np.stack(pooled, axis=1)


def _heat_map(
    title: str, steps: Float[np.ndarray, " steps"], values: np.ndarray, unit: str
) -> dict[str, Any]:
    """Logarithms as colours, with the numbers themselves at the colour bar."""
    logs = np.log10(values)
    low, high = np.nanmin(logs), np.nanmax(logs)
    trace = {
        "type": "heatmap",
        "x": numbers(steps),
        "z": [numbers(row) for row in logs],
        "text": [[_text(v) for v in row] for row in values],
        "colorscale": "Cividis",
        "colorbar": _bar(float(low), float(high), unit),
        "hoverongaps": False,
    }
    figure = {"data": [trace], "layout": layout(title, yaxis={})}
    figure["layout"]["hovermode"] = "closest"
    figure["layout"]["margin"]["t"] = 36  # the buttons stand above the colour bar
    figure["layout"]["yaxis"]["showgrid"] = False
    figure["layout"]["xaxis"]["showgrid"] = False
    return figure


def _bar(low: float, high: float, unit: str) -> dict[str, Any]:
    """A colour bar that says the numbers whose logarithms are the colours."""
    places = np.linspace(low, high, 5) if high > low else np.array([low])
    return {
        "title": {"text": unit, "side": "right"},
        "tickvals": numbers(places),
        "ticktext": [_text(10**place) for place in places],
        "thickness": 12,
        "outlinewidth": 0,
    }


def _text(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:.3g}"


def _short(name: str, most: int = 22) -> str:
    """A long name with its first modules by their initials.

    Numbers of modules stay, and the end, which is what tells layers apart.
    """
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= most:
            break
        parts[place] = part if part.isdigit() else part[:1]
    short = ".".join(parts)
    return short if len(short) <= most else "…" + short[1 - most :]


def norm_map(run: Run) -> Drawn | None:
    """How many samples had which norm, step by step."""
    if run.edges is None or not run.histograms:
        return None
    low, high, bins = run.edges
    lines = [(s, list(c)) for s, c in run.histograms if len(c) == bins]
    if not lines or not any(any(counts) for _, counts in lines):
        return None
    steps = np.array([step for step, _ in lines])
    counts = np.array([row for _, row in lines], dtype=float).T
    later = np.minimum.accumulate(steps[::-1])[::-1]
    steps, counts = _pooled(steps[steps <= later], counts[:, steps <= later], np.sum)
    filled = np.flatnonzero(counts.any(axis=1))
    first, last = max(filled[0] - 1, 0), min(filled[-1] + 2, bins)
    edges = 2 ** np.linspace(low, high, bins + 1)
    middles = np.sqrt(edges[:-1] * edges[1:])[first:last]
    shown = np.where(counts > 0, counts, np.nan)[first:last]
    title = "Norms of samples"
    figure = _heat_map(title, steps, shown, "samples")
    figure["data"][0] |= {
        "y": numbers(middles),
        "hovertemplate": "step %{x}, norm near %{y:.3g}: %{text} samples"
        "<extra></extra>",
    }
    figure["layout"]["yaxis"] |= {"type": "log", "title": {"text": "norm"}}
    glossary = (
        "Each column is a histogram of |g_n| over the samples of a logged step; the "
        "brighter, the more. What lies outside the bins is in the first or the last."
    )
    return Drawn("sample-norms", "Norms of samples", title, glossary, figure)


def share_of_parameters(about: Mapping[str, Any]) -> dict[str, float]:
    """By layer, the part of all parameters that it has."""
    layers = [x for x in about.get("layers", []) if isinstance(x, dict)]
    total = about.get("parameters") or sum(x.get("parameters", 0) for x in layers)
    return {
        str(x.get("name")) or "(own)": x.get("parameters", 0) / total
        for x in layers
        if total
    }
