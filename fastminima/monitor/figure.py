"""A figure of the rows that a monitor wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from .._optional import require
from .csv_file import read_csv

__all__ = ["plot", "read"]

_DECAY = 0.9  # of the bold line, an average over some ten rows
_BOLD, _THIN = {"lw": 1.8}, {"lw": 0.8, "alpha": 0.35}
_DOTS = {"lw": 0, "marker": ".", "ms": 4, "alpha": 0.45}
_DASHED = {"lw": 1.2, "ls": "--", "color": "0.4"}


@dataclass(frozen=True)
class _Line:
    """One column of the rows; without a style, thin with its running average bold.

    What is averaged is the column over the one named `per`, if any: where that one
    jumps, so does the bold line.
    """

    name: str
    label: str
    style: Mapping[str, Any] | None = None
    per: str | None = None


@dataclass(frozen=True)
class _Panel:
    """Drawn if the rows have the first of its lines."""

    title: str
    lines: Sequence[_Line]
    scale: str = "log"


_PANELS = (
    _Panel("loss", [_Line("loss", "loss")]),
    _Panel(
        "gradient norms",
        [
            _Line("gradient/mean_grad_sq_norm", "of the mean gradient"),
            _Line("gradient/norm_median", "of samples: median"),
            _Line("gradient/norm_max", "of samples: largest", _DOTS),
        ],
    ),
    _Panel(
        "tr Σ, variance of the gradient over samples",
        [_Line("gradient/covariance_trace", "tr Σ")],
    ),
    _Panel(
        "noise scale, in samples",
        [
            _Line("gradient/noise_scale", "single steps", _DOTS),
            _Line("gradient/noise_scale_smoothed", "ratio of averages", _BOLD),
            _Line("factors/batch_size", "batch size", _DASHED),
        ],
    ),
    _Panel(
        "temperature, in units of the loss",
        [_Line("factors/temperature", "", per="factors/ratio")],
    ),
    _Panel(
        "sharpness, largest eigenvalue of the Hessian",
        [_Line("sharpness/eigenvalue_1", "", {**_BOLD, "marker": "."})],
        scale="linear",
    ),
)


def read(path: str | PathLike[str]) -> list[dict[str, float]]:
    """The rows of a file that `JsonLines` or `CSV` wrote; null comes back as NaN.

    A last line that was cut off while it was written is left out.
    """
    if str(path).endswith(".csv"):
        return read_csv(path)
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: math.nan if v is None else v for k, v in r.items()} for r in rows]


def plot(
    rows: str | PathLike[str] | Iterable[Mapping[str, float]],
    to: str | PathLike[str] | None = None,
) -> Any:
    """Draw rows against their step, a panel for each group that they have.

    Bold lines are running averages of the thin ones. On logarithmic axes what is not
    positive is not drawn, such as the noise scale of a batch too small to see the
    signal. A step that goes back (a second run in the file) starts a new line.

    Args:
        rows: what `Monitor.log` returned, or a file of JSON lines.
        to: a file to save the figure in, by its ending.

    Returns:
        The matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is nothing to draw.
    """
    found = read(rows) if isinstance(rows, (str, PathLike)) else list(rows)
    names = {name for row in found for name in row}
    panels = [panel for panel in _PANELS if panel.lines[0].name in names]
    if not panels:
        raise ValueError(
            f"Nothing to draw in {len(found)} rows; their names: {sorted(names)}."
        )
    height = (len(panels) + 1) // 2
    otherwise = "`pip install 'fastminima[examples]'`"
    matplotlib = require("matplotlib.figure", "fm.monitor.plot", otherwise)
    figure = matplotlib.Figure(figsize=(10, 2.5 * height), layout="constrained")
    axes = list(figure.subplots(height, 2, sharex=True, squeeze=False).flat)
    for ax, panel in zip(axes, panels, strict=False):
        _fill(ax, panel, [line for line in panel.lines if line.name in names], found)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[max(0, len(panels) - 2) : len(panels)]:
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.set_xlabel("step")
    if to is not None:
        figure.savefig(Path(to), dpi=120)
    return figure


def _fill(
    ax: Any,
    panel: _Panel,
    lines: Sequence[_Line],
    rows: Sequence[Mapping[str, float]],
) -> None:
    ax.set_yscale(panel.scale)
    for number, line in enumerate(lines):
        steps, values = _series(rows, line.name)
        color = {"color": f"C{number}"}
        if line.style is None:
            _curve(ax, panel, steps, values, **_THIN, **color)
            values = _bold(values, line, rows)
        style = color | dict(line.style or _BOLD)
        _curve(ax, panel, steps, values, **style, label=line.label)
    ax.set_title(panel.title, fontsize=10, loc="left")
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        ax.legend(fontsize=8, edgecolor="none", framealpha=0.8)


def _curve(
    ax: Any, panel: _Panel, steps: list[float], values: list[float], **style: Any
) -> None:
    if panel.scale == "log":
        values = [v if v > 0 else math.nan for v in values]
    ax.plot(steps, values, **style)


def _series(
    rows: Sequence[Mapping[str, float]], name: str
) -> tuple[list[float], list[float]]:
    """Steps and values, with a gap where the step goes back; norms as their roots."""
    steps: list[float] = []
    values: list[float] = []
    for row in rows:
        if name in row:
            if steps and row["step"] < steps[-1]:
                steps.append(math.nan)
                values.append(math.nan)
            value = row[name]
            steps.append(row["step"])
            values.append(math.sqrt(value) if name.endswith("_sq_norm") else value)
    return steps, values


def _bold(
    values: Sequence[float], line: _Line, rows: Sequence[Mapping[str, float]]
) -> list[float]:
    if line.per is None:
        return _averages(values)
    units = _series([row for row in rows if line.name in row], line.per)[1]
    each = [v / u if u else math.nan for v, u in zip(values, units, strict=True)]
    return [v * u for v, u in zip(_averages(each), units, strict=True)]


def _averages(values: Sequence[float]) -> list[float]:
    """Exponential averages, each over the values since the last gap."""
    found: list[float] = []
    total = weight = 0.0
    for value in values:
        if math.isfinite(value):
            total = _DECAY * total + value
            weight = _DECAY * weight + 1
        else:
            total = weight = 0.0
        found.append(total / weight if weight else math.nan)
    return found
