"""SVAG against SGD: whether SGD goes as its stochastic differential equation does.

SVAG(l) takes steps of eta/l along (1 + s)/2 g1 + (1 - s)/2 g2, s = sqrt(2 l - 1), g1
and g2 of two batches of size S: l steps have the drift and the noise of one of SGD,
and tend to the equation as l grows. If curves at equal time eta * steps agree from
l = 1, which is SGD, on, the equation describes SGD. Batches are drawn with
replacement, independently; seeds share their starting weights over all l.

The control is SGD with batches of 4 S: another equation, a quarter of the noise. What
is compared is the log of the train loss at equal times, averaged over the second half
of training, where noise decides it; d(l) is the mean over times of the curve of l less
that of SGD, by seed.

Criteria, D the control's mean difference:
1. the control differs: -d(control), by seed, above .1 (it is lower, by 10 % or more);
2. d(l)/|D| lies within -1/3 … 1/3 for l = 2, 4 and 8.
The difference of validation accuracy is in the table, without a criterion.

Nulls: the control put in the place of l = 8; the control put in the place of SGD.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.common import data, plots
from examples.common.seedwise import chunks
from examples.common.stacks import Stack, cross_entropy, sgd_step
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "svag_step"]

LEVELS = (1, 2, 4, 8)
CONTROL = "control"
# How many batches of SGD the control's batch holds.
LARGER = 4


@dataclass(frozen=True)
class Svag(Settings):
    """What is trained.

    Attributes:
        samples, validation: of each kind.
        pool, skip: of `data.prepared`.
        hidden: units of each hidden layer.
        rate, batch_size: eta and S of the SGD that is simulated.
        steps: of SGD; SVAG takes l times as many, of two batches each.
        looks: at equal times.
    """

    samples: int = 1024
    validation: int = 2000
    pool: int = 2
    skip: int = 6048
    hidden: tuple[int, ...] = (32, 32)
    rate: float = 0.1
    batch_size: int = 8
    steps: int = 2000
    looks: int = 40
    chunk: int = 6


def settings(preset: str, dataset: str) -> Svag:
    fits: dict[str, Any] = {}
    if dataset == "digits":
        fits = {"pool": 1, "skip": 0, "samples": 1024, "validation": 700}
    if preset == "quick":
        fits |= {"samples": 256, "validation": 500, "steps": 600, "looks": 20}
        fits |= {"hidden": (16,), "chunk": 8}
        return Svag(preset, dataset, tuple(range(100, 108)), **fits)
    if preset == "laptop":
        return Svag(preset, dataset, tuple(range(110, 122)), **fits)
    if dataset != "digits":
        fits |= {"samples": 20_000, "validation": 10_000, "pool": 1}
    fits |= {"hidden": (200, 200), "batch_size": 32, "steps": 40_000}
    return Svag(preset, dataset, tuple(range(110, 122)), **fits)


def tasks(svag: Svag) -> list[Task]:
    """The largest l first: it takes l times as many steps."""
    return [
        {"level": level, "seeds": seeds}
        for level in (*reversed(LEVELS), CONTROL)
        for seeds in chunks(svag.seeds, svag.chunk)
    ]


def run(svag: Svag, task: Task, watch: Watch) -> list[Row]:
    """Curves of train loss and validation accuracy at equal times."""
    split = data.prepared(
        svag.dataset,
        svag.samples,
        svag.validation,
        seed=2026,
        pool=svag.pool,
        skip=svag.skip,
    )
    (x, y), (vx, vy) = ((x.flatten(1), y) for x, y in (split.train, split.validation))
    seeds, level = task["seeds"], task["level"]
    l = 1 if level == CONTROL else level
    size = svag.batch_size * (LARGER if level == CONTROL else 1)
    stack = Stack.drawn((x.shape[1], *svag.hidden, int(y.max()) + 1), seeds)
    # Another noise for each l: were it shared, curves would agree for that reason too.
    mark = 1000 * (1 + (LEVELS.index(level) if level in LEVELS else len(LEVELS)))
    draws = [torch.Generator().manual_seed(mark + s) for s in seeds]
    rates = torch.full((len(seeds),), svag.rate)
    rows: list[Row] = [
        {"seed": s, "level": level, "time": [], "loss": [], "accuracy": []}
        for s in seeds
    ]

    def gradients() -> list[Tensor]:
        index = torch.stack(
            [torch.randint(len(x), (size,), generator=g) for g in draws]
        )
        return stack.grads(cross_entropy(stack(x[index]), y[index]))

    every = svag.steps // svag.looks
    for number in range(1, svag.looks + 1):
        for _ in range(every * l):
            first = gradients()
            second = gradients() if l > 1 else first
            svag_step(stack.params, first, second, rates, l)
        watch.progress(number / svag.looks)
        losses = stack.mean_loss(x, y)
        right = stack.accuracy(vx, vy)
        for at, row in enumerate(rows):
            loss = float(losses[at])
            row["time"].append(float(f"{number * every * svag.rate:.5g}"))
            row["loss"].append(float(f"{loss:.4g}") if math.isfinite(loss) else None)
            row["accuracy"].append(round(float(right[at]), 4))
    return rows


def svag_step(
    params: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    rates: Tensor,
    l: float,
) -> None:
    """A step of SVAG in place, each replica with its own rate, as `fm.optim.SVAG`."""
    s = math.sqrt(2 * l - 1)
    amplified = [
        (1 + s) / 2 * a + (1 - s) / 2 * b for a, b in zip(first, second, strict=True)
    ]
    sgd_step(params, amplified, rates / l)


def _differences(
    rows: Sequence[Row], level: int | str, name: str = "loss"
) -> list[float]:
    """Mean over the second half of a curve less SGD's, seed by seed."""
    found = []
    for seed in sorted({r["seed"] for r in rows}):
        mine = [r for r in rows if r["seed"] == seed and r["level"] == level]
        base = [r for r in rows if r["seed"] == seed and r["level"] == 1]
        if mine and base:
            found.append(_late(mine[0], name) - _late(base[0], name))
    return found


def _late(row: Row, name: str) -> float:
    values = row[name][len(row[name]) // 2 :]
    if None in values:
        return math.nan
    return float(np.mean(np.log(values) if name == "loss" else values))


def judge(svag: Svag, rows: Sequence[Row], expected: int) -> Verdict:
    control = _differences(rows, CONTROL)
    scale = abs(float(np.mean(control))) if control else 0.0
    scale = scale or math.nan  # a control that does not differ measures nothing
    claims = [Claim("log loss of SGD over 4 S's", [-c for c in control], low=0.1)]
    claims += [
        Claim(
            f"log loss of l = {level} over SGD's, as a share of that",
            [d / scale for d in _differences(rows, level)],
            -1 / 3,
            1 / 3,
        )
        for level in LEVELS[1:]
    ]
    cells = [
        f"l = {level}: {mean_and_spread(c.values, 2)}"
        for level, c in zip(LEVELS[1:], claims[1:], strict=True)
    ]
    short = (
        f"difference of log train loss from SGD, over that of 4 S "
        f"({mean_and_spread(control, 2)}): {', '.join(cells)}"
    )
    return decide(
        claims,
        found=len(rows),
        expected=expected,
        table=_table(svag, rows),
        short=short,
    )


def _table(svag: Svag, rows: Sequence[Row]) -> str:
    lines = ["              log loss - SGD's   accuracy - SGD's     loss at the end"]
    for level in (*LEVELS, CONTROL):
        mine = [r for r in rows if r["level"] == level]
        cells = [
            mean_and_spread(_differences(rows, level, name), 2)
            for name in ("loss", "accuracy")
        ]
        ends = mean_and_spread([r["loss"][-1] for r in mine], 3)
        words = f"SGD, {LARGER} S" if level == CONTROL else f"l = {level}"
        lines.append(f"{words:12}  {cells[0]:18} {cells[1]:20} {ends}")
    return "\n".join(lines)


def draw(svag: Svag, rows: Sequence[Row]) -> Figure:
    figure, axes = plots.figure(2)
    left, right = axes[0]
    names: dict[int | str, str] = {level: f"l = {level}" for level in LEVELS}
    names[1] = "SGD (l = 1)"
    names[CONTROL] = f"SGD, {LARGER} S"
    colours = [*plots.colours(len(LEVELS)), "#c0392b"]
    for (level, label), colour in zip(names.items(), colours, strict=True):
        mine = [r for r in rows if r["level"] == level]
        if not mine:
            continue
        values = [[r["loss"][i] for r in mine] for i in range(svag.looks)]
        values = [[v for v in at if v] for at in values]
        look = {"color": colour, "marker": ".", "points": False, "elinewidth": 0.6}
        look["linestyle"] = "--" if level == CONTROL else "-"
        logs = [[math.log10(v) for v in at] for at in values]
        plots.with_spread(left, mine[0]["time"], logs, label=label, **look)
    places = [*range(1, len(LEVELS)), len(LEVELS)]
    values = [_differences(rows, level) for level in (*LEVELS[1:], CONTROL)]
    plots.with_spread(right, places, values, color=colours[0], marker="o", ls="")
    control = values[-1]
    if control:
        third = abs(float(np.mean(control))) / 3
        right.axhspan(-third, third, color=plots.GRID, alpha=0.7, lw=0)
    right.axhline(0, color=plots.INK, lw=0.8)
    right.set_xticks(places, [*(f"l = {v}" for v in LEVELS[1:]), f"SGD, {LARGER} S"])
    right.set_ylabel("log train loss less that of SGD")
    left.set(xlabel="time, η · steps", ylabel="log₁₀ train loss")
    left.axvspan(
        svag.rate * svag.steps / 2,
        svag.rate * svag.steps,
        color=plots.GRID,
        alpha=0.5,
        lw=0,
    )
    left.legend()
    plots.caption(
        figure,
        "SVAG, which tends to the stochastic differential equation as l grows, trains "
        "as SGD does; the difference is less than a third of that of a quarter of the "
        "noise.",
        f"{svag.dataset}, {svag.samples} samples, MLP "
        f"{'-'.join(map(str, svag.hidden))}, η {svag.rate:g}, S {svag.batch_size}; "
        f"{len({r['seed'] for r in rows})} seeds, bars: one standard deviation. "
        "Shaded: what is averaged (left), a third of the control's difference (right).",
    )
    return figure


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    last = LEVELS[-1]
    control = {r["seed"]: r for r in rows if r["level"] == CONTROL}
    swapped = [
        {**control[r["seed"]], "level": last}
        if r["level"] == last and r["seed"] in control
        else r
        for r in rows
    ]
    alike = [
        {**r, "loss": control[r["seed"]]["loss"]}
        if r["level"] == 1 and r["seed"] in control
        else r
        for r in rows
    ]
    return {"the control as l = 8": swapped, "SGD is the control": alike}


EXPERIMENT = Experiment(
    id="svag",
    paper="Li, Malladi, Arora 2021",
    claim="SVAG with l = 2, 4, 8 trains as SGD does at equal time: the stochastic "
    "differential equation describes SGD.",
    folder="three_factors",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    datasets=("fashion-mnist", "digits"),
    # Half of the clock of one worker, beside other work.
    nulls=nulls,
)
