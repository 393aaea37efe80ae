"""Full batches at several learning rates: is each run's sharpness that of its edge?

What gradient descent and Adam have in common. A row has "sharpness" along the run, a
share of the edge at its learning rate; the criteria, by seed and for each rate:
1. its median over the second half is within a tenth of the edge;
2. the loss at the end is below that on arrival there: it goes on falling.
A run that does not come to the edge has no value; see `judging`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from examples.common import plots
from examples.common.tables import aligned
from examples.engine.experiment import Row, Task
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

from .following import EdgeSettings
from .judging import BRACKET, arrival, remark, second_half, settled

__all__ = [
    "RateSettings",
    "chosen",
    "curves",
    "judged",
    "means",
    "nulls",
    "settings_of",
    "tasks_of",
    "upheavals",
]


@dataclass(frozen=True)
class RateSettings(EdgeSettings):
    """The network at several learning rates.

    Attributes:
        rates: each is run with every seed.
    """

    rates: tuple[float, ...] = (0.1, 0.2)


def settings_of(
    preset: str, dataset: str, rates: Sequence[float], *, steps: int, **more: Any
) -> RateSettings:
    """The presets; `steps` and `more` are those of laptop, a look every 100 steps.

    quick has the rates but for the first, for which it is too short.
    """
    same: dict[str, Any] = {"rates": tuple(rates), "steps": steps, **more}
    same |= {"pool": 1, "skip": 0} if dataset == "digits" else {}
    seeds = tuple(range(110, 120))
    if preset == "quick":
        same |= {"rates": tuple(rates[1:]), "samples": 256, "steps": steps * 6 // 10}
        seeds = tuple(range(100, 103))
    same["looks"] = same["steps"] // 100
    if preset == "paper":
        same |= {"hidden": (200, 200), "steps": 20_000, "looks": 100, "pool": 1}
        same |= {"samples": 1600 if dataset == "digits" else 5000}
    return RateSettings(preset, dataset, seeds, **same)


def tasks_of(settings: RateSettings) -> list[Task]:
    """A run each."""
    return [
        {"rate": rate, "seeds": [seed]}
        for rate in settings.rates
        for seed in settings.seeds
    ]


def chosen(rows: Sequence[Row], rate: float) -> list[Row]:
    """The runs at a rate."""
    return [row for row in rows if row["rate"] == rate]


def judged(
    settings: RateSettings, rows: Sequence[Row], expected: int, edge: str, table: str
) -> Verdict:
    """The verdict; `edge` is what a share is one of, "2/η"."""
    claims, cells = [], []
    for rate in settings.rates:
        mine = chosen(rows, rate)
        at = [settled(row, "sharpness") for row in mine]
        claims.append(Claim(f"sharpness over {edge} at η {rate:g}", at, *BRACKET))
        falls = [_fall(row) for row in mine]
        claims.append(Claim("loss at the end over that on arrival", falls, high=1))
        cells.append(f"{mean_and_spread(at)} at η {rate:g}")
    return decide(
        claims,
        found=len(rows),
        expected=expected,
        table=table,
        short=f"sharpness over {edge}: {', '.join(cells)}",
        remark=remark(rows, "sharpness", lambda row: f"η {row['rate']:g}"),
    )


def _fall(row: Row) -> float:
    at = arrival(row, "sharpness")
    if at is None or row["loss"][-1] is None:
        return math.nan
    return row["loss"][-1] / row["loss"][at]


def upheavals(row: Row) -> list[float]:
    """Shares of the steps that raised the loss: before the arrival, and after it."""
    at = arrival(row, "sharpness")
    if at is None:
        return [math.nan, math.nan]
    before, after = row["rises"][1 : at + 1], row["rises"][at + 1 :]
    return [sum(v) / len(v) if v else math.nan for v in (before, after)]


def means(
    settings: RateSettings, rows: Sequence[Row], edge: str, more: dict[str, str]
) -> str:
    """A line a rate; `more` has titles of the means of other numbers, by name."""
    head = ["η", edge, "begins", "settles", *more.values()]
    head += ["steps that raise the loss before", "after", "loss at the end"]
    lines = []
    for rate in settings.rates:
        mine = chosen(rows, rate)
        columns = [
            [row["sharpness"][0] for row in mine],
            [settled(row, "sharpness") for row in mine],
            *([second_half(row, name) for row in mine] for name in more),
            *zip(*(upheavals(row) for row in mine), strict=True),
            [row["loss"][-1] for row in mine],
        ]
        numbers = [row["edge"] for row in mine]
        cells = [f"{rate:g}", f"{numbers[0]:g}" if numbers else "-"]
        lines.append(cells + [mean_and_spread(list(c)) for c in columns])
        lines[-1] += ["-"] * (len(head) - len(lines[-1]))
    return aligned(head, lines)


def curves(
    ax: Axes,
    settings: RateSettings,
    rows: Sequence[Row],
    name: str,
    *,
    is_share: bool = False,
    linestyle: str = "-",
) -> None:
    """Every run as a line, a colour a rate; of a share, times the edge."""
    colours = plots.colours(len(settings.rates))
    for rate, colour in zip(settings.rates, colours, strict=True):
        for at, row in enumerate(chosen(rows, rate)):
            scale = row["edge"] if is_share else 1.0
            y = [math.nan if v is None else v * scale for v in row[name]]
            label = None if at else f"η {rate:g}"
            ax.plot(row["step"], y, color=colour, lw=0.9, ls=linestyle, label=label)
    ax.set_xlabel("steps (shaded: what is averaged)")
    ax.axvspan(settings.steps / 2, settings.steps, color=plots.GRID, alpha=0.5, lw=0)


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """No sharpening; no end of it; and, of several rates, one sharpness at all."""
    least, most = (of(row["rate"] for row in rows) for of in (min, max))
    found = {
        "it stays as it began": [
            {**row, "sharpness": row["sharpness"][:1] * len(row["sharpness"])}
            for row in rows
        ],
        "it goes on rising": [
            _with(row, lambda at, v: v * (1 + at / 20)) for row in rows
        ],
    }
    if least < most:
        found["it does not know the rate"] = [
            _with(row, lambda at, v, by=row["rate"] / least: v * by) for row in rows
        ]
    return found


def _with(row: Row, change: Callable[[int, float], float]) -> Row:
    """The row with its sharpness changed; what is missing stays so."""
    own = enumerate(row["sharpness"])
    return {**row, "sharpness": [v and change(at, v) for at, v in own]}
