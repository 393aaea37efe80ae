"""SGD on a wavy parabola escapes its local minima if the noise is right.

f(x) = x^2 / 4 + sin^2(14 x) / 10 has its best minimum at 0 and 24 more on [-3.3, 3.3].
A step is x <- x - eta f'(x) + u, u uniform on [-s, s]: with s the size of the waves the
walk sees f averaged over them, the parabola; without noise it stays in the minimum next
to where it started, and with far more it finds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples.common import plots
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "WalkSettings", "function", "slope", "smoothed_slope"]

NONE, SMALL, LARGE = 0.0, 0.05, 1.0


@dataclass(frozen=True)
class WalkSettings(Settings):
    """Walks down the wavy parabola.

    Attributes:
        starts: of each seed, uniform on [-reach, reach].
        noises: half-widths s of the uniform displacement, a grid that holds 0, .05, 1.
        steps: with noise.
        last_steps: without, to the bottom of the basin that the walk is in.
        rate: eta.
        reach: of the starts.
        close: to the optimum, of a success.
    """

    starts: int = 400
    noises: tuple[float, ...] = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 1.0)
    steps: int = 1500
    last_steps: int = 300
    rate: float = 0.012
    reach: float = 3.3
    close: float = 0.5


def settings(preset: str, dataset: str) -> WalkSettings:
    """All sizes are those of the design; the presets differ in seeds and starts."""
    made = WalkSettings(preset, dataset, tuple(range(20)))
    if preset == "quick":
        return replace(made, seeds=tuple(range(5)))
    if preset == "paper":
        return replace(made, seeds=tuple(range(100)), starts=4000)
    return made


def tasks(settings: WalkSettings) -> list[Task]:
    return [{"seeds": [seed]} for seed in settings.seeds]


def run(settings: WalkSettings, task: Task, watch: Watch) -> list[Row]:
    rows = []
    for seed in task["seeds"]:
        random = np.random.default_rng(seed)
        x = random.uniform(-settings.reach, settings.reach, settings.starts)
        ends = [_walk(settings, x, noise, random) for noise in settings.noises]
        shares = [float((np.abs(e) < settings.close).mean()) for e in ends]
        rows.append({"seed": seed, "noises": list(settings.noises), "shares": shares})
    return rows


def function(x: np.ndarray) -> np.ndarray:
    return x**2 / 4 + 0.1 * np.sin(14 * x) ** 2


def slope(x: np.ndarray) -> np.ndarray:
    return x / 2 + 1.4 * np.sin(28 * x)


def smoothed_slope(x: np.ndarray, noise: float) -> np.ndarray:
    """Derivative of f convolved with the uniform density on [-noise, noise]."""
    # numpy's sinc has pi in it.
    return x / 2 + 1.4 * np.sinc(28 * noise / np.pi) * np.sin(28 * x)


def convexity(noise: float, reach: float) -> float:
    """The largest c with smoothed_slope(x) x >= c x^2 on [-reach, reach]."""
    x = np.linspace(1e-4, reach, 200_001)
    return float((smoothed_slope(x, noise) / x).min())


def _walk(
    settings: WalkSettings, x: np.ndarray, noise: float, random: np.random.Generator
) -> np.ndarray:
    for _ in range(settings.steps):
        x = x - settings.rate * slope(x)
        if noise:
            x += random.uniform(-noise, noise, len(x))
    for _ in range(settings.last_steps):
        x = x - settings.rate * slope(x)
    return x


def judge(settings: WalkSettings, rows: Sequence[Row], expected: int) -> Verdict:
    none, small, large = (_shares(rows, s) for s in (NONE, SMALL, LARGE))
    claims = [
        Claim(f"noise ±{SMALL:g}: share at the optimum", small, 0.9, digits=3),
        Claim("no noise", none, high=0.25, digits=3),
        Claim(f"noise ±{LARGE:g}", large, high=0.15, digits=3),
    ]
    lines = [
        f"| noise ± | share within {settings.close:g} of the optimum | c, one step |",
        "|---|---|---|",
    ]
    for noise in rows[0]["noises"] if rows else ():
        shares = mean_and_spread(_shares(rows, noise))
        lines.append(f"| {noise:g} | {shares} | {convexity(noise, 3.3):.2g} |")
    return decide(
        claims,
        found=len(rows),
        expected=expected,
        table="\n".join(lines),
        short=(
            f"none {mean_and_spread(none)}, ±{SMALL:g} {mean_and_spread(small)}, "
            f"±{LARGE:g} {mean_and_spread(large)}; n {len(rows)} of {settings.starts}"
        ),
    )


def _shares(rows: Sequence[Row], noise: float) -> list[float]:
    return [r["shares"][r["noises"].index(noise)] for r in rows]


def draw(settings: WalkSettings, rows: Sequence[Row]) -> plots.Figure:
    fig, axes = plots.figure(2)
    ax = axes[0, 0]
    x = np.linspace(-1.5, 1.5, 4001)
    shown = (NONE, SMALL, LARGE)
    for noise, colour in zip(shown, plots.colours(3), strict=True):
        # Of f itself the average is a shift of half a wave's height.
        wave = np.sinc(28 * noise / np.pi)
        y = x**2 / 4 + noise**2 / 12 + 0.05 * (1 - wave * np.cos(28 * x))
        name = "f" if noise == 0 else f"averaged over ±{noise:g}"
        ax.plot(x, y, color=colour, lw=1, label=name)
    ax.set_xlabel("x")
    ax.set_ylabel("value")
    ax.set_title("f, and f averaged over one step's noise")
    ax.legend(loc="upper center", frameon=False)
    ax = axes[0, 1]
    noises = list(settings.noises)
    # Zero has no place on a logarithmic axis.
    places = [n if n else noises[1] / 2 for n in noises]
    values = [_shares(rows, n) for n in noises]
    plots.with_spread(ax, places, values, color=plots.INK, marker="o")
    ax.set_xscale("log")
    plots.few_ticks(ax, [places[0], 0.01, 0.03, 0.1, 0.3, 1])
    ax.set_xticklabels(["0", "0.01", "0.03", "0.1", "0.3", "1"])
    ax.plot(SMALL, 0.9, "^", color="#c4501b", label="asked: above")
    ax.plot([places[0], LARGE], [0.25, 0.15], "v", color="#c4501b", label="below")
    ax.legend(frameon=False)
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("noise: half-width of the displacement a step")
    ax.set_ylabel(f"share ending within {settings.close:g} of the optimum")
    ax.set_title("who finds the best minimum")
    plots.caption(
        fig,
        "The right amount of noise takes SGD out of every local minimum but the best",
        f"f = x²/4 + .1 sin²(14x), η = {settings.rate:g}, {settings.steps} steps "
        f"with noise and {settings.last_steps} without, {settings.starts} starts on "
        f"±{settings.reach:g} for each of {len(rows)} seeds; bars: standard deviation "
        "over seeds.",
    )
    return fig


def nulls(rows: Sequence[Row], seed: int) -> Mapping[str, list[Row]]:
    random = np.random.default_rng(seed)
    shuffled = [{**r, "shares": random.permutation(r["shares"]).tolist()} for r in rows]
    alike = [{**r, "shares": [r["shares"][0]] * len(r["shares"])} for r in rows]
    return {"noise labels permuted": shuffled, "noise does nothing": alike}


EXPERIMENT = Experiment(
    id="kleinberg-1d",
    paper="Kleinberg, Li, Yuan 2018",
    claim=(
        "Noise of the size of the waves takes SGD out of local minima to the best one; "
        "none leaves it where it started, too much finds nothing."
    ),
    folder="kleinberg_escape",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    minutes={"quick": 0.1},
    nulls=nulls,
    exploratory=(
        "That the noise is uniform and that the last steps have none was read off a "
        "trial's numbers: Gaussian noise of deviation .05 had given .73."
    ),
)
