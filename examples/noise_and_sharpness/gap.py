"""The stochastic sharpness gap: how far below 2/eta lambda_max stays, and the noise.

The paper's formula, as its abstract has it, is a gap of eta beta sigma_u^2 / (4 alpha)
below 2/eta, sigma_u^2 the variance of the mini-batch gradient along the top
eigenvector, alpha the rate of progressive sharpening and beta a third derivative.
**alpha and beta are not measured here**, so the formula's size is not tested. What is:
that there is a gap with small batches, none with the full batch, and that it grows
with sigma_u^2 = (1/S - 1/N) v'Sigma v, v the top eigenvector of the full-batch Hessian
and Sigma the covariance of the gradients of single samples, by `fm.GradientCovariance`.
sigma_u^2 is varied by the batch size, and other things vary with it.

gap = 1 - eta lambda_max / 2, a share of 2/eta, its mean over the second half of
training; sigma_u^2, which falls by decades, by its geometric mean. By seed, criteria:
1. full batch: the gap is within -.1 … .1;
2. S = 8 and 16: it is above .1;
3. it grows with the noise: the slope of the gap on log10 sigma_u^2, over batch sizes
   less the full one, is positive seed by seed, above .05 a decade.
The bounds were set after trial runs with seeds 100 and 101, which the laptop and paper
presets do not use. Without a criterion: the slope of log gap on log sigma_u^2, which is
1 where alpha and beta do not change with it; and the slope among the seeds of one batch
size, where the noise differs and S does not (added after the laptop run, on seeing the
figure).

Nulls: batch sizes in reverse; the gap the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

import fastminima as fm
from examples.common import plots
from examples.common.stacks import Stack
from examples.engine.experiment import Experiment, Row, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

from .edge import Edge, late, run_edge, sample_losses, settings_of, tasks_of, top

__all__ = ["EXPERIMENT"]

SMALL = (8, 16)


def settings(preset: str, dataset: str) -> Edge:
    return settings_of(preset, dataset, (4, 8, 16, 32, 64))


def run(edge: Edge, task: Task, watch: Watch) -> list[Row]:
    return run_edge(edge, task, watch, _look)


def _look(
    edge: Edge, size: int, stack: Stack, at: int, x: Tensor, y: Tensor, memory: Row
) -> dict[str, float | None]:
    """lambda_max over 2/eta, and the variance of the mini-batch gradient along v."""
    model = stack.module(at)
    value, vector = top(model, (x, y), memory)
    covariance = fm.GradientCovariance(model, sample_losses, (x, y))
    along = float(vector @ (covariance @ vector))
    return {
        "lambda_max": None if value is None else edge.rate / 2 * value,
        "noise": (1 / size - 1 / len(x)) * along,
        "sample_noise": along,
    }


def _gap(row: Row) -> float:
    return 1 - late(row, "lambda_max")


def judge(edge: Edge, rows: Sequence[Row], expected: int) -> Verdict:
    full = edge.batch_sizes[-1]

    def gaps(size: int) -> list[float]:
        return [_gap(r) for r in rows if r["batch_size"] == size]

    seeds = sorted({r["seed"] for r in rows})
    slopes = [_slope([r for r in rows if r["seed"] == s], full) for s in seeds]
    claims = [
        Claim("gap of the full batch, over 2/η", gaps(full), -0.1, 0.1),
        *(Claim(f"at S {s}", gaps(s), low=0.1) for s in SMALL),
        Claim(
            "slope of the gap on log₁₀ of the noise", [s[0] for s in slopes], low=0.05
        ),
    ]
    cells = [
        f"{mean_and_spread(gaps(s), 2)} at S {s}" for s in (*SMALL, full) if gaps(s)
    ]
    exponent = mean_and_spread([s[1] for s in slopes], 2)
    table = _table(edge, rows) + (
        f"\nslope of log gap on log noise where the gap is above .02: {exponent}"
        "\nslope of the gap on log₁₀ of the noise among the seeds of one batch size: "
        + ", ".join(
            f"{_within([r for r in rows if r['batch_size'] == s]):+.2f} at S {s}"
            for s in edge.batch_sizes[:-1]
        )
    )
    short = f"gap over 2/η {', '.join(cells)} (the full batch)"
    return decide(claims, found=len(rows), expected=expected, table=table, short=short)


def _late_noise(row: Row, name: str = "noise") -> float:
    """log10 of the geometric mean over the second half: it falls by decades."""
    values = row[name][len(row[name]) // 2 :]
    if any(v is None or v <= 0 for v in values):
        return math.nan
    return float(np.mean(np.log10(values)))


def _slope(rows: Sequence[Row], full: int) -> tuple[float, float]:
    """Slopes of gap and log gap on log sigma_u^2, one seed over batch sizes."""
    points = [(_late_noise(r), _gap(r)) for r in rows if r["batch_size"] < full]
    if len(points) < 2 or not np.isfinite(points).all():
        return math.nan, math.nan
    noise, gap = np.array(points).T
    open_ = gap > 0.02
    log_slope = (
        float(np.polyfit(noise[open_], np.log10(gap[open_]), 1)[0])
        if open_.sum() > 1
        else math.nan
    )
    return float(np.polyfit(noise, gap, 1)[0]), log_slope


def _within(rows: Sequence[Row]) -> float:
    """Slope of the gap on log10 of the noise over seeds."""
    noise = [_late_noise(r) for r in rows]
    gap = [_gap(r) for r in rows]
    if len(rows) < 3 or not np.isfinite([*noise, *gap]).all():
        return math.nan
    return float(np.polyfit(noise, gap, 1)[0])


def _table(edge: Edge, rows: Sequence[Row]) -> str:
    lines = [
        "    S   gap over 2/η     noise along v₁     of one sample      train loss"
    ]
    for size in edge.batch_sizes:
        mine = [r for r in rows if r["batch_size"] == size]
        noise = [
            mean_and_spread([10 ** _late_noise(r, name) for r in mine], 3)
            for name in ("noise", "sample_noise")
        ]
        loss = mean_and_spread([r["loss"][-1] for r in mine], 2)
        gap = mean_and_spread([_gap(r) for r in mine])
        lines.append(f"{size:5d}   {gap:16} {noise[0]:18} {noise[1]:18} {loss}")
    return "\n".join(lines)


def draw(edge: Edge, rows: Sequence[Row]) -> Figure:
    figure, axes = plots.figure(3)
    left, middle, right = axes[0]
    sizes = edge.batch_sizes
    for size, colour, marker in zip(
        sizes, plots.colours(len(sizes)), plots.MARKERS, strict=False
    ):
        mine = [r for r in rows if r["batch_size"] == size]
        if not mine:
            continue
        label = "full batch" if size == sizes[-1] else f"S {size}"
        look = {"color": colour, "marker": ".", "label": label, "points": False}
        for ax, name in ((left, "lambda_max"), (middle, "sample_noise")):
            values = [[r[name][i] for r in mine] for i in range(edge.looks)]
            if ax is middle:
                values = [[math.log10(v) for v in at if v] for at in values]
            plots.with_spread(ax, mine[0]["step"], values, **look)
        if size == sizes[-1]:
            continue
        x = [10 ** _late_noise(r) for r in mine]
        y = [_gap(r) for r in mine]
        right.plot(x, y, marker, color=colour, ms=4, alpha=0.8, label=label)
    gaps = [_gap(r) for r in rows if r["batch_size"] == sizes[-1]]
    if gaps:
        plots.mark_line(right, float(np.mean(gaps)), "full batch")
    plots.mark_line(left, 1.0, "2/η")
    for ax in (left, middle):
        ax.axvspan(edge.steps / 2, edge.steps, color=plots.GRID, alpha=0.5, lw=0)
        ax.set_xlabel("steps (shaded: what is averaged)")
    left.set(ylabel="λ_max over 2/η", ylim=(0, 1.7))
    left.legend(ncols=2, loc="upper left")
    middle.set(ylabel="log₁₀ v₁ᵀΣv₁, of one sample's gradient")
    right.set(xscale="log", xlabel="noise along v₁, (1/S - 1/N) v₁ᵀΣv₁")
    right.set_ylabel("gap below 2/η, as a share of it")
    right.legend()
    plots.caption(
        figure,
        "Small batches keep λ_max below 2/η, the more the smaller they are and so the "
        "noisier along the top eigenvector; the full batch does not.",
        f"{edge.dataset}, N = {edge.samples}, squared loss, ReLU MLP "
        f"{'-'.join(map(str, edge.hidden))}, η {edge.rate:g}; "
        f"{len({r['seed'] for r in rows})} seeds; bars: one standard deviation over "
        "them; right: a point a seed, means over the second half of training.",
    )
    return figure


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    sizes = sorted({r["batch_size"] for r in rows})
    turned = dict(zip(sizes, sizes[::-1], strict=True))
    same = {(r["seed"]): r["lambda_max"] for r in rows}
    return {
        "batch sizes in reverse": [
            {**r, "batch_size": turned[r["batch_size"]]} for r in rows
        ],
        "one gap for all": [{**r, "lambda_max": same[r["seed"]]} for r in rows],
    }


EXPERIMENT = Experiment(
    id="sharpness-gap",
    paper="arXiv:2604.21016 (2026)",
    claim="Small batches keep λ_max below 2/η, the more the smaller they are; the full "
    "batch has no gap.",
    folder="noise_and_sharpness",
    settings=settings,
    tasks=tasks_of,
    run=run,
    judge=judge,
    draw=draw,
    datasets=("fashion-mnist", "digits"),
    # Half of the clock of one worker, beside other work.
    nulls=nulls,
    exploratory="The slope among the seeds of one batch size was looked at after the "
    "run, and decides nothing.",
)
