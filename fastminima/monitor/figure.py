"""A figure of the rows that a monitor wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from .._optional import require
from .csv_file import read_csv
from .panels import Line, Panel, panels_of, series, with_limit
from .trend import half_window, trend

__all__ = ["plot", "read"]

_BOLD, _THIN = {"lw": 1.8}, {"lw": 0.8, "alpha": 0.35}
_FEW = 40  # points that get a marker each
_LEGEND = {"fontsize": 8, "edgecolor": "none", "framealpha": 0.8}
_TREND = "trend: a line fitted to 5 % of the rows on each side, at least 5"
_LOG_TREND = ", to their logarithms where the axis is logarithmic"

Rows = Sequence[Mapping[str, float]]


def read(path: str | PathLike[str]) -> list[dict[str, float]]:
    """The rows of a file that `JsonLines` or `CSV` wrote; null comes back as NaN.

    Of a folder, those of the `rows.jsonl` in it. A last line that was cut off while it
    was written is left out.
    """
    if Path(path).is_dir():
        path = Path(path) / "rows.jsonl"
    if str(path).endswith(".csv"):
        return read_csv(path)
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: math.nan if v is None else v for k, v in r.items()} for r in rows]


def plot(
    rows: str | PathLike[str] | Iterable[Mapping[str, float]],
    to: str | PathLike[str] | None = None,
    *,
    columns: Sequence[str] | None = None,
) -> Any:
    """Draw rows against their step, a panel for each group that they have.

    Bold lines are trends of the thin ones: straight lines fitted around each row, which
    do not lag behind. The sharpness stands beside 2/eta, with residuals as its error
    bars, and the noise scale in its interval. On logarithmic axes what is not
    positive is not drawn, such as the noise scale of a batch too small to see the
    signal. A step that goes back (a second run in the file) starts a new line.

    Args:
        rows: what `Monitor.log` returned, or what `read` takes.
        to: a file to save the figure in, by its ending.
        columns: more columns, a panel each; None for all that are your own.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw, or no such column.
    """
    found = with_limit(read(rows) if isinstance(rows, (str, PathLike)) else rows)
    panels = panels_of(found, columns)
    if not panels:
        names = sorted({name for row in found for name in row})
        raise ValueError(f"Nothing to draw in {len(found)} rows; their names: {names}.")
    figure, axes = _axes(len(panels))
    drawn = [_fill(ax, panel, found) for ax, panel in zip(axes, panels, strict=True)]
    if any(drawn):
        _explain(figure)
    if to is not None:
        figure.savefig(Path(to), dpi=120)
    return figure


def _axes(count: int) -> tuple[Any, list[Any]]:
    """A figure with so many panels, two in a row."""
    height, width = (count + 1) // 2, min(count, 2)
    otherwise = "`pip install 'fastminima[examples]'`"
    matplotlib = require("matplotlib.figure", "fm.monitor.plot", otherwise)
    size = (5 * width, 2.5 * height + 0.3)
    figure = matplotlib.Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(height, width, sharex=True, squeeze=False).flat)
    for ax in axes[count:]:
        ax.set_axis_off()
    for ax in axes[max(0, count - 2) : count]:
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.set_xlabel("step")
    return figure, axes[:count]


def _fill(ax: Any, panel: Panel, rows: Rows) -> bool:
    """Draw a panel; says whether there is a trend in it."""
    names = {name for row in rows for name in row}
    lines = [line for line in panel.lines if line.name in names]
    ax.set_yscale(_scale(panel, lines, rows))
    for number, line in enumerate(lines):
        color = {"color": f"C{number}"}
        if line.style is None:
            _thin_and_bold(ax, line, rows, color)
        else:
            _styled(ax, line, rows, color | dict(line.style))
    for number, line in enumerate(lines):
        if line.low in names or line.high in names:
            _band(ax, line, rows, f"C{number}")
    ax.set_title(panel.title, fontsize=10, loc="left")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if any(line.label for line in lines):
        ax.legend(**_LEGEND)
    return any(line.style is None for line in lines)


def _scale(panel: Panel, lines: Sequence[Line], rows: Rows) -> str:
    if panel.scale != "auto":
        return panel.scale
    values = [v for line in lines for v in series(rows, line.name)[1]]
    finite = [value for value in values if math.isfinite(value)]
    is_wide = bool(finite) and 0 < 10 * min(finite) <= max(finite)
    return "log" if is_wide else "linear"


def _thin_and_bold(ax: Any, line: Line, rows: Rows, color: dict[str, str]) -> None:
    steps, values, units = series(rows, line.name, line.per)
    marker = {"marker": ".", "ms": 4} if len(values) <= _FEW else {}
    _curve(ax, steps, values, **_THIN, **marker, **color)
    if line.per is None:
        units = [1.0] * len(values)
    each = [v / u if u else math.nan for v, u in zip(values, units, strict=True)]
    is_log = ax.get_yscale() == "log"
    smooth = trend(steps, each, half_window(len(each)), logarithmic=is_log)
    bold = [v * u for v, u in zip(smooth, units, strict=True)]
    _curve(ax, steps, bold, **_BOLD, **color, label=line.label or None)


def _styled(ax: Any, line: Line, rows: Rows, style: dict[str, Any]) -> None:
    steps, values, errors = series(rows, line.name, line.error)
    if line.error is None:
        _curve(ax, steps, values, **style, label=line.label)
    else:
        ax.errorbar(steps, values, yerr=errors, **style, label=line.label)


def _curve(ax: Any, steps: Any, values: Sequence[float], **style: Any) -> None:
    if ax.get_yscale() == "log":
        values = [v if v > 0 else math.nan for v in values]
    ax.plot(steps, values, **style)


def _band(ax: Any, line: Line, rows: Rows, color: str) -> None:
    """An interval around a line; a side of it that has no end reaches the edge."""
    steps, _, low, high = series(rows, line.name, line.low, line.high)
    bottom, top = ax.get_ylim()
    ends = zip(low, high, strict=True)
    known = [math.isfinite(a) or math.isfinite(b) for a, b in ends]
    low = [max(a, bottom) if math.isfinite(a) else bottom for a in low]
    high = [min(b, top) if math.isfinite(b) else top for b in high]
    look = {"color": color, "alpha": 0.2, "lw": 0, "label": "95 % interval"}
    ax.fill_between(steps, low, high, where=known, **look)
    ax.set_ylim(bottom, top)


def _explain(figure: Any) -> None:
    """What thin and bold lines are, under all panels."""
    lines = require("matplotlib.lines", "fm.monitor.plot", "")
    is_log = any(ax.get_yscale() == "log" for ax in figure.axes)
    keys = [
        lines.Line2D([], [], color="0.3", **_THIN, label="single rows"),
        lines.Line2D(
            [], [], color="0.3", **_BOLD, label=_TREND + (_LOG_TREND if is_log else "")
        ),
    ]
    figure.legend(handles=keys, loc="outside lower left", ncols=2, **_LEGEND)
