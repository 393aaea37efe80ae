"""A figure of the rows that a monitor wrote."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

__all__ = ["plot", "read"]

_NAN = math.nan
# Title, then lines: name, label, style.
_SOLID, _LIGHT = {"lw": 1.8}, {"lw": 0, "marker": ".", "ms": 4, "alpha": 0.45}
_DASHED = {"lw": 1.2, "ls": "--", "color": "0.4"}
_PANELS: tuple[tuple[str, tuple[tuple[str, str, dict[str, Any]], ...]], ...] = (
    ("loss", (("loss", "loss", _SOLID),)),
    (
        "gradient norms",
        (
            ("gradient/norm_max", "largest |g_n|", _LIGHT),
            ("gradient/norm_median", "median |g_n|", _SOLID),
            ("gradient/mean_grad_sq_norm", "|mean g|", _SOLID),
        ),
    ),
    ("tr Σ", (("gradient/covariance_trace", "tr Σ", _SOLID),)),
    (
        "noise scale [samples]",
        (
            ("gradient/noise_scale", "one step", _LIGHT),
            ("gradient/noise_scale_smoothed", "ratio of averages", _SOLID),
            ("factors/batch_size", "batch size", _DASHED),
        ),
    ),
    (
        "temperature, η/S · σ²/2 [loss]",
        (("factors/temperature", "temperature", _SOLID),),
    ),
    ("sharpness", (("sharpness/eigenvalue_1", "largest eigenvalue", _SOLID),)),
)


def read(path: str | PathLike[str]) -> list[dict[str, float]]:
    """The rows of a file that `JsonLines` wrote; null comes back as NaN.

    A last line that was cut off while it was written is left out.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: _NAN if v is None else v for k, v in row.items()} for row in rows]


def plot(
    rows: str | PathLike[str] | Iterable[Mapping[str, float]],
    to: str | PathLike[str] | None = None,
) -> Any:
    """Draw rows against their step, a panel for each group that they have.

    Axes of values are logarithmic: what is not positive, such as the noise scale of a
    batch too small to see the signal, is not drawn. A step that goes back (a second
    run in the same file) starts a new line.

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
    panels = [
        (title, [line for line in lines if line[0] in names])
        for title, lines in _PANELS
        if lines[-1][0] in names or lines[0][0] in names
    ]
    if not panels:
        raise ValueError(
            f"Nothing to draw in {len(found)} rows; their names: {sorted(names)}."
        )
    height = (len(panels) + 1) // 2
    figure = _figure()(figsize=(10, 2.6 * height), layout="constrained")
    axes = list(figure.subplots(height, 2, sharex=True, squeeze=False).flat)
    for ax, (title, lines) in zip(axes, panels, strict=False):
        for name, label, style in lines:
            _draw(ax, found, name, label, style)
        _finish(ax, title, len(lines) > 1)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    if to is not None:
        figure.savefig(Path(to), dpi=120)
    return figure


def _draw(
    ax: Any, rows: Sequence[Mapping[str, float]], name: str, label: str, style: Any
) -> None:
    steps, values = _series(rows, name)
    if name.endswith("_sq_norm"):
        values = [math.sqrt(v) for v in values]
    ax.plot(steps, [v if v > 0 else _NAN for v in values], label=label, **style)


def _series(
    rows: Sequence[Mapping[str, float]], name: str
) -> tuple[list[float], list[float]]:
    """Steps and values, with a gap where the step goes back."""
    steps: list[float] = []
    values: list[float] = []
    for row in rows:
        if name in row:
            if steps and row["step"] < steps[-1]:
                steps.append(_NAN)
                values.append(_NAN)
            steps.append(row["step"])
            values.append(row[name])
    return steps, values


def _finish(ax: Any, title: str, has_several: bool) -> None:
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.xaxis.set_tick_params(labelbottom=True)
    ax.grid(alpha=0.25, which="major")
    ax.spines[["top", "right"]].set_visible(False)
    if has_several:
        ax.legend(frameon=False, fontsize=8)


def _figure() -> Any:
    try:
        return importlib.import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(
            "fm.monitor.plot needs matplotlib, which is not installed. Run `pip "
            "install matplotlib`, or `pip install 'fastminima[examples]'`."
        ) from error
