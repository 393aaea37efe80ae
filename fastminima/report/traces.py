"""Traces and layouts in plotly's JSON, which is what the page draws.

Colours are CSS variables: the page replaces them by those of its light or dark look.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from .columns import Column
from .thin import band, envelope, segments

__all__ = [
    "Figure",
    "Trace",
    "bold",
    "dashed",
    "dots",
    "error_bars",
    "interval",
    "layout",
    "log_axis",
    "numbers",
    "raw",
    "smooth",
    "steps",
]

Trace = dict[str, Any]
Figure = dict[str, Any]
_DIGITS = 7


def numbers(values: Iterable[float]) -> list[float | None]:
    """Numbers as JSON has them: seven digits, None for what is not finite."""
    return [
        float(f"{v:.{_DIGITS}g}") if math.isfinite(v) else None
        for v in np.asarray(values, dtype=float).tolist()
    ]


def _with_gaps(column: Column) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values, with a NaN where the step goes back."""
    backs = np.flatnonzero(np.diff(column.steps) < 0) + 1
    steps = np.insert(column.steps, backs, np.nan)
    return steps, np.insert(column.values, backs, np.nan)


def _trace(column: Column, name: str, **rest: Any) -> Trace:
    x, y = envelope(*_with_gaps(column))
    return {
        "type": "scatter",
        "name": name,
        "x": numbers(x),
        "y": numbers(y),
        "mode": "lines",
        "hovertemplate": "%{y:.4g}",
        **rest,
    }


def raw(column: Column, name: str, colour: str) -> Trace:
    """Every row, or the extremes of stretches of them, as a thin line."""
    line = {"color": f"var(--{colour})", "width": 1}
    return _trace(column, name, line=line, opacity=0.45)


def bold(column: Column, name: str, colour: str, **rest: Any) -> Trace:
    """A line that is smooth already; with markers where it has few points."""
    mode = "lines+markers" if len(column) <= 60 else "lines"
    line = {"color": f"var(--{colour})", "width": 2}
    return _trace(column, name, line=line, mode=mode, **rest)


def dashed(column: Column, name: str, colour: str = "ink") -> Trace:
    """What the others are compared with."""
    line = {"color": f"var(--{colour})", "width": 1.5, "dash": "dash", "shape": "hv"}
    return _trace(column, name, line=line)


def steps(column: Column, name: str, colour: str) -> Trace:
    """What stays as it is until it jumps."""
    line = {"color": f"var(--{colour})", "width": 2, "shape": "hv"}
    return _trace(column, name, line=line)


def dots(column: Column, name: str, colour: str) -> Trace:
    """Single rows that make no line."""
    marker = {"color": f"var(--{colour})", "size": 4}
    return _trace(column, name, mode="markers", marker=marker, opacity=0.55)


def error_bars(
    column: Column, errors: Column, name: str, colour: str, symbol: str = "circle"
) -> Trace:
    """A line with markers and, where the rows have them, bars of the given size."""
    found = dict(zip(errors.at.tolist(), errors.values.tolist(), strict=True))
    if len(column) > 400 or not found:  # bars would be a solid block
        return bold(column, name, colour)
    backs = np.flatnonzero(np.diff(column.steps) < 0) + 1
    bars = np.array([found.get(at, math.nan) for at in column.at.tolist()])
    bars = numbers(np.insert(bars, backs, np.nan))
    trace = bold(column, name, colour)
    return trace | {
        "mode": "lines+markers",
        "marker": {"size": 5, "symbol": symbol},
        "error_y": {"type": "data", "array": bars, "width": 2, "thickness": 1},
        "customdata": bars,
        "hovertemplate": "%{y:.4g} ± %{customdata:.2g}",
    }


def smooth(column: Column, name: str, colour: str) -> list[Trace]:
    """Rows as a thin line; their median and 10th to 90th percentile over windows."""
    traces = [raw(column, name, colour)]
    shown: list[tuple[np.ndarray, ...]] = []
    for part in segments(column.steps):
        found = band(column.steps[part], column.values[part])
        if found is not None:
            shown.append((found.x, found.low, found.middle, found.high))
    if not shown:
        return [bold(column, name, colour)]
    outline = [_outline(x, low, high) for x, low, _, high in shown]
    area = _area(outline, colour, f"{name}: 10th to 90th percentile")
    traces.append(area | {"showlegend": False})
    gap = np.array([np.nan])
    x, low, middle, high = (
        np.concatenate([piece for part in shown for piece in (part[i], gap)])[:-1]
        for i in range(4)
    )
    traces.append(
        {
            "type": "scatter",
            "name": name,
            "x": numbers(x),
            "y": numbers(middle),
            "mode": "lines",
            "line": {"color": f"var(--{colour})", "width": 2.2},
            "customdata": list(zip(numbers(low), numbers(high), strict=True)),
            "hovertemplate": "%{y:.4g} (%{customdata[0]:.4g} to %{customdata[1]:.4g})",
        }
    )
    traces[0] |= {"showlegend": False, "hoverinfo": "skip", "name": f"{name}: rows"}
    del traces[0]["hovertemplate"]
    return traces


def interval(low: Column, high: Column, colour: str, name: str, cap: float) -> Trace:
    """The area between two columns; where `high` is unbounded, up to `cap`."""
    highs = dict(zip(high.at.tolist(), high.values.tolist(), strict=True))
    upper = np.array([highs.get(at, math.nan) for at in low.at.tolist()])
    upper = np.where(np.isfinite(upper), upper, cap)
    parts = []
    for part in segments(low.steps):
        known = np.isfinite(low.values[part])
        x, lows, tops = low.steps[part], low.values[part], upper[part]
        for start, stop in _runs(known):
            parts.append(_outline(*_thinned(x, lows, tops, slice(start, stop))))
    return _area(parts, colour, name)


def _thinned(
    x: np.ndarray, low: np.ndarray, high: np.ndarray, part: slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At most 500 points a stretch, each as wide as the widest it stands for."""
    x, low, high = x[part], low[part], high[part]
    if len(x) <= 500:
        return x, low, high
    starts = np.linspace(0, len(x), 501).astype(int)[:-1]
    return (
        x[starts],
        np.minimum.reduceat(low, starts),
        np.maximum.reduceat(high, starts),
    )


def _runs(known: np.ndarray) -> list[tuple[int, int]]:
    """Where a mask is true, stretch by stretch."""
    edges = np.diff(np.concatenate([[0], known.astype(int), [0]]))
    starts, stops = np.flatnonzero(edges > 0), np.flatnonzero(edges < 0)
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _outline(
    x: Float[np.ndarray, " n"],
    low: Float[np.ndarray, " n"],
    high: Float[np.ndarray, " n"],
) -> tuple[np.ndarray, np.ndarray]:
    """Around an area: forth along its upper edge, back along its lower one."""
    known = np.isfinite(low) & np.isfinite(high)
    x, low, high = x[known], low[known], high[known]
    return np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])


def _area(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], colour: str, name: str
) -> Trace:
    x: list[float | None] = []
    y: list[float | None] = []
    for xs, ys in parts:
        x += [*numbers(xs), None]
        y += [*numbers(ys), None]
    return {
        "type": "scatter",
        "name": name,
        "x": x,
        "y": y,
        "mode": "lines",
        "line": {"width": 0},
        "fill": "toself",
        "fillcolor": f"var(--{colour}-area)",
        "hoverinfo": "skip",
    }


def log_axis(traces: Sequence[Trace], title: str) -> dict[str, Any]:
    """A logarithmic axis if anything on it is positive and nothing negative."""
    values = [v for t in traces for v in t["y"] if v is not None]
    axis: dict[str, Any] = {"title": {"text": title}, "type": "linear"}
    if values and min(values) > 0:
        axis["type"] = "log"
        if 0.7 < math.log10(max(values) / min(values)) < 2.5:
            axis["dtick"] = "D2"  # 1, 2 and 5 of each decade; all nine would overlap
    return axis


def layout(title: str, height: int = 340, **axes: Any) -> dict[str, Any]:
    """What all figures have in common; the page fills in colours and fonts."""
    grid = {"gridcolor": "var(--grid)", "zerolinecolor": "var(--grid)"}
    common = grid | {"linecolor": "var(--grid)", "automargin": True}
    exponents = {"exponentformat": "power", "tickfont": {"size": 11}}
    found = {name: common | exponents | axis for name, axis in axes.items()}
    found.setdefault("xaxis", common | {"title": {"text": "step"}})
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "size": 12},
        "modebar": {
            "bgcolor": "rgba(0,0,0,0)",
            "color": "var(--faint)",
            "activecolor": "var(--ink)",
        },
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "var(--panel)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "y": 1.02, "x": 0, "yanchor": "bottom"},
        "meta": {"title": title},
        # The same at each refresh: what the reader zoomed into stays.
        "uirevision": "kept",
        **found,
    }
