"""The figure, drawn from the records only."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
)

from .analysis import Row, at_end, at_loss, common_loss, correlation
from .settings import Settings

__all__ = ["draw"]

_MARKERS = "osD^vP*X<>hd8p"
_INK, _GRID = "#222222", "#e4e4e4"


def draw(settings: Settings, records: Sequence[dict[str, Any]], path: Path) -> Path:
    """Sharpness against eta/S at matched loss and at the end, a marker a batch size."""
    loss = common_loss(records, settings.rungs)
    moments = {"at the end": at_end(records)}
    if not math.isnan(loss):
        moments = {f"at train loss {loss:g}": at_loss(records, loss)} | moments
    fig, axes = plt.subplots(
        1, len(moments), figsize=(5.2 * len(moments), 4.6), squeeze=False
    )
    sizes = sorted({r.batch_size for rows in moments.values() for r in rows})
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(sizes)))
    looks = {
        size: {"color": colour, "marker": _MARKERS[i % len(_MARKERS)]}
        for i, (size, colour) in enumerate(zip(sizes, colours, strict=True))
    }
    for ax, (moment, rows) in zip(axes[0], moments.items(), strict=True):
        _panel(ax, rows, looks)
        _few_ticks(ax, sorted({r.ratio for r in rows}))
        rho = correlation(rows, "frobenius_norm").rho if len(rows) > 3 else math.nan
        ax.set_title(f"{moment}   (Spearman {rho:+.2f})", fontsize=11, color=_INK)
    axes[0, 0].set_ylabel("‖H‖$_F$   (sharper ↑   ↓ wider)", color=_INK)
    columns = min(len(sizes), 10)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    fig.legend(
        handles,
        labels,
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    shape = "-".join(_runs_of(settings.hidden))
    fig.suptitle(
        "Curvature where SGD ends, against its learning rate / batch size\n"
        f"{settings.dataset}, {settings.train_size} samples, ReLU MLP {shape}",
        fontsize=12,
        color=_INK,
    )
    below = 0.045 + 0.04 * math.ceil(len(sizes) / columns)
    fig.tight_layout(rect=(0, below, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=160)
    plt.close(fig)
    return path


def _panel(ax: Axes, rows: Sequence[Row], looks: dict[int, dict[str, Any]]) -> None:
    """Mean over seeds and their range, one series a batch size, side by side."""
    cells: dict[int, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        cells[row.batch_size][row.ratio].append(row.values["frobenius_norm"])
    for i, (size, look) in enumerate(looks.items()):
        by_ratio = sorted(cells[size].items())
        if not by_ratio:
            continue
        x = np.array([ratio for ratio, _ in by_ratio])
        shift = 1.05 ** (i - (len(looks) - 1) / 2)
        middle = np.array([np.exp(np.mean(np.log(v))) for _, v in by_ratio])
        low = np.array([min(v) for _, v in by_ratio])
        high = np.array([max(v) for _, v in by_ratio])
        ax.errorbar(
            x * shift,
            middle,
            yerr=[middle - low, high - middle],
            label=f"S = {size}",
            linestyle="-" if len(x) > 2 else "none",
            linewidth=1,
            markersize=7,
            capsize=3,
            elinewidth=1.2,
            markeredgecolor="white",
            markeredgewidth=0.8,
            **look,
        )
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("η/S   (learning rate / batch size)", color=_INK)
    ax.grid(True, which="major", color=_GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _few_ticks(ax: Axes, ratios: Sequence[float]) -> None:
    """The ratios of the grid where they are few; 1, 2, 5 where an axis is short."""
    low, high = ax.get_ylim()
    if high / low < 300:
        subs = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5)
        ax.yaxis.set_major_locator(LogLocator(subs=subs))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if len(ratios) <= 6:
        ax.xaxis.set_major_locator(FixedLocator(ratios))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _power_of_ten(x)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_minor_locator(NullLocator())


def _power_of_ten(value: float) -> str:
    """The number 2.5e-4 as people write it, for matplotlib."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"${float(mantissa):g}\\cdot10^{{{int(exponent)}}}$"


def _runs_of(hidden: Sequence[int]) -> list[str]:
    """Hidden widths for people: not fifty written twenty times."""
    if len(set(hidden)) == 1 and len(hidden) > 3:
        return [f"{len(hidden)} layers of {hidden[0]}"]
    return [str(h) for h in hidden]
