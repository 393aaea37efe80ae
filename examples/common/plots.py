"""One plotting style for all experiments; figures hold their claim in the caption."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
)
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

__all__ = [
    "GRID",
    "INK",
    "MARKERS",
    "caption",
    "colours",
    "few_ticks",
    "figure",
    "log_axis",
    "mark_line",
    "save",
    "with_spread",
]

INK, GRID, PALE = "#222222", "#e4e4e4", "#8a8a8a"
MARKERS = "osD^vP*X<>hd8p"
# Width of one panel and height, in inches.
PANEL = (4.3, 3.5)

_STYLE: dict[RcKeyType, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


def figure(
    columns: int, rows: int = 1, *, sharey: bool = False, sharex: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure of panels, [rows, columns], in the house style."""
    plt.rcParams.update(_STYLE)
    return plt.subplots(
        rows,
        columns,
        figsize=(PANEL[0] * columns, PANEL[1] * rows),
        squeeze=False,
        sharey=sharey,
        sharex=sharex,
        layout="constrained",
    )


def caption(fig: Figure, claim: str, detail: str) -> None:
    """The claim above the panels; what was run, and what the bars are, under it.

    A claim is what the paper says; whether it held is for the verdict.
    """
    width = int(fig.get_figwidth() * 12.2)
    lines = textwrap.wrap(f"Claim: {claim}", width)
    small = textwrap.wrap(detail, int(fig.get_figwidth() * 15.2))
    height = fig.get_figheight()
    top = 0.24 * len(lines) + 0.17 * len(small) + 0.16
    fig.set_figheight(height + top)
    total = height + top
    engine = fig.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, 0, 1, height / total))
    y = 1 - 0.1 / total
    fig.text(0.012, y, "\n".join(lines), va="top", fontsize=11.5, color=INK)
    y -= 0.24 * len(lines) / total
    fig.text(0.012, y, "\n".join(small), va="top", fontsize=8.5, color="#666666")


def save(fig: Figure, path: Path) -> list[Path]:
    """Write `path` as PNG and as vector PDF, without a date; closes the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(".png"), path.with_suffix(".pdf")]
    fig.savefig(written[0], dpi=140)
    with Image.open(written[0]) as image:  # a third of the size; 128 colours are plenty
        image.convert("RGB").quantize(128).save(written[0], optimize=True)
    fig.savefig(written[1], metadata={"CreationDate": None, "ModDate": None})
    plt.close(fig)
    return written


def colours(count: int) -> list[Any]:
    """`count` colours in order, told apart in grey as well."""
    return list(mpl.colormaps["viridis"](np.linspace(0.05, 0.82, max(count, 1))))


def with_spread(
    ax: Axes,
    x: Iterable[float],
    values: Iterable[Iterable[float | None]],
    *,
    label: str | None = None,
    points: bool = True,
    **look: Any,
) -> None:
    """A line through the means of each group; bars are one standard deviation.

    Args:
        ax: where.
        x: a place for each group.
        values: the values of each group, such as one a seed.
        label: in the legend.
        points: draw every value as a faint point as well.
        look: of the line: color, marker, linestyle.
    """
    groups = [
        np.asarray([v for v in group if v is not None], float) for group in values
    ]
    kept = [(at, g) for at, g in zip(x, groups, strict=True) if len(g)]
    if not kept:
        return
    at = [k[0] for k in kept]
    means = [g.mean() for _, g in kept]
    spread = [g.std(ddof=1) if len(g) > 1 else 0.0 for _, g in kept]
    look = {"capsize": 2.5, "elinewidth": 1, **look}
    ax.errorbar(at, means, yerr=spread, label=label, **look)
    if points:
        colour = look.get("color", PALE)
        for place, group in kept:
            ax.plot([place] * len(group), group, ".", ms=3, alpha=0.35, color=colour)


def few_ticks(ax: Axes, places: Sequence[float], axis: str = "x") -> None:
    """Exactly these ticks, as plain numbers: for the few values of a grid."""
    which = ax.xaxis if axis == "x" else ax.yaxis
    which.set_major_locator(FixedLocator(list(places)))
    which.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}"))
    which.set_minor_locator(NullLocator())
    which.set_minor_formatter(NullFormatter())


def log_axis(ax: Axes, axis: str = "y") -> None:
    """A logarithmic axis with plain numbers: 1, 2, 5 a decade, or 1 and 3 across.

    Over more than three decades the decades only. To be called after plotting.
    """
    which = ax.xaxis if axis == "x" else ax.yaxis
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    low, high = ax.get_xlim() if axis == "x" else ax.get_ylim()
    subs = (1.0, 3.0) if axis == "x" else (1.0, 2.0, 5.0)
    if high > 1e3 * low > 0:
        subs = (1.0,)
    which.set_major_locator(LogLocator(subs=subs, numticks=12))
    which.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
    which.set_minor_formatter(NullFormatter())


def mark_line(
    ax: Axes, value: float, text: str, axis: str = "y", colour: str = PALE
) -> None:
    """A dashed line at a value that theory gives, with its name."""
    if axis == "y":
        ax.axhline(value, color=colour, ls="--", lw=1)
        ax.annotate(
            text,
            (0.99, value),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
            color="#666666",
            bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.5},
        )
    else:
        ax.axvline(value, color=colour, ls="--", lw=1)
        ax.annotate(
            text,
            (value, 0.98),
            xycoords=("data", "axes fraction"),
            ha="left",
            va="top",
            fontsize=8,
            color="#666666",
            rotation=90,
        )
