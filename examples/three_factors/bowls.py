"""Two bowls in one dimension: does eta/S, as a temperature, say which SGD ends in?

L(x) = min(.05 + (x + .6)^2 / 2, 16 (x - .25)^2 / 2): a higher bowl, sixteen times
flatter. Gradient noise is isotropic, of deviation sigma / sqrt(S) with sigma = 20, so
that the theory's density is exp(-L/n) at n = eta sigma^2 / 2S; its share of the flat
bowl is computed by quadrature.

Criteria, each by the mean over seeds of one set of walkers a seed:
1. at eta = .005 the share of the flat bowl is that of exp(-L/n) to .03, for n = .05,
   .10 and .20;
2. there, walkers that start in the flat and in the sharp bowl agree to .05: the shares
   are stationary;
3. (beta eta, beta S) leaves it alone for eta lambda_max <= .1: at .04 it is within .03
   of exp(-L/n) as well;
4. beyond that the flat bowl is favoured: at eta lambda_max = .32 its share is more than
   .05 above, at 1.28 more than .2.

Nulls: the shares dealt out anew to the temperatures, and walkers that stay where they
started.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastminima as fm
from examples.common import plots
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "gibbs_share"]

FLAT, SHARP = (-0.6, 0.05, 1.0), (0.25, 0.0, 16.0)  # place, depth, curvature
SIGMA = 20.0
RATE = 0.005
TEMPERATURES = (0.05, 0.10, 0.20)
COLD = TEMPERATURES[0]
# eta lambda_max of the sharp bowl, at the lowest temperature.
STEPS = (0.04, 0.08, 0.32, 0.64, 1.28, 1.92)
BLOCK = 500


@dataclass(frozen=True)
class Bowls(Settings):
    """How many walkers, and for how long.

    Attributes:
        walkers: of each seed.
        burn_in: eta times steps that are not looked at, at n = .05, where crossings
            are rarest; less where it is hotter, by 1/n. Memory lasts for some 35 there.
        flow: eta times steps after it, over which shares are averaged.
        chunk: seeds a task.
    """

    walkers: int = 1000
    burn_in: float = 150.0
    flow: float = 300.0
    chunk: int = 4


def settings(preset: str, dataset: str) -> Bowls:
    if preset == "quick":
        return Bowls(preset, dataset, tuple(range(100, 105)), 400, 100.0, 100.0, 5)
    if preset == "laptop":
        return Bowls(preset, dataset, tuple(range(110, 118)))
    return Bowls(preset, dataset, tuple(range(110, 130)), 5000, 300.0, 1000.0)


def tasks(bowls: Bowls) -> list[Task]:
    """A task a point of the grid and a few seeds; the smallest steps last longest."""
    cells = [(COLD, step) for step in STEPS]
    cells += [(n, RATE * SHARP[2]) for n in TEMPERATURES[1:]]
    chunks = [
        list(bowls.seeds[at : at + bowls.chunk])
        for at in range(0, len(bowls.seeds), bowls.chunk)
    ]
    return [
        {"temperature": n, "step": step, "seeds": chunk}
        for n, step in sorted(cells, key=lambda cell: cell[1])
        for chunk in chunks
    ]


def run(bowls: Bowls, task: Task, watch: Watch) -> list[Row]:
    """Shares of time in the flat bowl, of the walkers of each seed."""
    rate = task["step"] / SHARP[2]
    batch_size = rate * SIGMA**2 / (2 * task["temperature"])
    draws = [torch.Generator().manual_seed(seed) for seed in task["seeds"]]
    x = torch.full((len(draws), bowls.walkers), FLAT[0])
    x[:, bowls.walkers // 2 :] = SHARP[0]
    shorter = COLD / task["temperature"]
    first = math.ceil(shorter * bowls.burn_in / rate)
    last = math.ceil(shorter * (bowls.burn_in + bowls.flow) / rate)
    kick = rate * SIGMA / math.sqrt(batch_size)
    in_flat = torch.zeros_like(x)
    for start in range(0, last, BLOCK):
        watch.progress(start / last)
        count = min(BLOCK, last - start)
        noise = torch.stack(
            [torch.randn(count, bowls.walkers, generator=draw) for draw in draws], dim=1
        )
        for at, kicks in enumerate(noise.mul_(kick)):
            is_flat = _is_flat(x)
            if start + at >= first:
                in_flat += is_flat
            x = x - rate * _slope(x, is_flat) + kicks
    share = in_flat / (last - first)
    half = bowls.walkers // 2
    return [
        {
            "seed": seed,
            "temperature": task["temperature"],
            "step": task["step"],
            "batch_size": batch_size,
            "flat": float(share[at].mean()),
            "from_flat": float(share[at, :half].mean()),
            "from_sharp": float(share[at, half:].mean()),
        }
        for at, seed in enumerate(task["seeds"])
    ]


def _bowl(x: Tensor, bowl: tuple[float, float, float]) -> Tensor:
    place, depth, curvature = bowl
    return depth + curvature / 2 * (x - place) ** 2


def _is_flat(x: Tensor) -> Tensor:
    """Where the flat bowl is the lower one; beyond the sharp one it is again."""
    return _bowl(x, FLAT) < _bowl(x, SHARP)


def _slope(x: Tensor, is_flat: Tensor) -> Tensor:
    """The derivative of the lower of the two bowls."""
    return torch.where(is_flat, FLAT[2] * (x - FLAT[0]), SHARP[2] * (x - SHARP[0]))


@cache
def gibbs_share(temperature: float) -> float:
    """Share of exp(-L/n) that lies in the flat bowl, by quadrature."""
    x = torch.linspace(-8, 6, 400_001, dtype=torch.float64)
    density = torch.exp(-torch.minimum(_bowl(x, FLAT), _bowl(x, SHARP)) / temperature)
    return float(density[_is_flat(x)].sum() / density.sum())


def judge(bowls: Bowls, rows: Sequence[Row], expected: int) -> Verdict:
    def excess(n: float, step: float) -> list[float]:
        return [r["flat"] - gibbs_share(n) for r in _cell(rows, n, step)]

    base = RATE * SHARP[2]
    claims = [
        Claim(f"share - Gibbs at n = {n:g}", excess(n, base), -0.03, 0.03)
        for n in TEMPERATURES
    ]
    slowest = max(
        TEMPERATURES,
        key=lambda n: np.mean(
            [abs(r["from_flat"] - r["from_sharp"]) for r in _cell(rows, n, base)] or [0]
        ),
    )
    starts = [r["from_flat"] - r["from_sharp"] for r in _cell(rows, slowest, base)]
    claims += [
        Claim(f"share from flat - from sharp, n = {slowest:g}", starts, -0.05, 0.05),
        Claim("share - Gibbs at ηλ = .04", excess(COLD, STEPS[0]), -0.03, 0.03),
        Claim("at ηλ = .32", excess(COLD, 0.32), low=0.05),
        Claim("at ηλ = 1.28", excess(COLD, 1.28), low=0.2),
    ]
    means = [
        mean_and_spread([r["flat"] for r in _cell(rows, n, base)]) for n in TEMPERATURES
    ]
    beyond = mean_and_spread([r["flat"] for r in _cell(rows, COLD, 1.28)])
    wanted = " / ".join(f"{gibbs_share(n):.3f}" for n in TEMPERATURES)
    short = f"P(flat) {' / '.join(means)} (Gibbs {wanted}); {beyond} at ηλ = 1.28"
    return decide(
        claims, found=len(rows), expected=expected, table=_table(rows), short=short
    )


def _cell(rows: Sequence[Row], n: float, step: float) -> list[Row]:
    return [r for r in rows if r["temperature"] == n and abs(r["step"] - step) < 1e-9]


def _cells(rows: Sequence[Row]) -> list[tuple[float, float]]:
    return sorted({(r["temperature"], r["step"]) for r in rows})


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "   n    ηλ_max      S    P(flat)            Gibbs  Laplace  from flat, sharp"
    ]
    for n, step in _cells(rows):
        cell = _cell(rows, n, step)
        starts = [np.mean([r[k] for r in cell]) for k in ("from_flat", "from_sharp")]
        lines.append(
            f"{n:5.2f}   {step:6.2f}  {cell[0]['batch_size']:6.0f}   "
            f"{mean_and_spread([r['flat'] for r in cell]):17}  {gibbs_share(n):.3f}  "
            f"{_laplace(n):.3f}    {starts[0]:.3f}, {starts[1]:.3f}"
        )
    return "\n".join(lines)


def _laplace(temperature: float) -> float:
    """Laplace's approximation of the same share, as `fm.theory` has it."""
    depths = torch.tensor([FLAT[1], SHARP[1]])
    curvatures = torch.tensor([FLAT[2], SHARP[2]])
    return float(fm.theory.bowl_occupancy(depths, curvatures.log(), temperature)[0])


def draw(bowls: Bowls, rows: Sequence[Row]) -> Figure:
    figure, axes = plots.figure(2, sharey=True)
    hot, cold = plots.colours(3)[:2]
    left, right = axes[0]
    base = RATE * SHARP[2]
    n = np.geomspace(0.03, 0.3, 60)
    left.plot(n, [gibbs_share(float(v)) for v in n], color=plots.INK, lw=1.2)
    left.text(0.065, 0.62, "exp(-L/n)", fontsize=8.5, color=plots.INK)
    shares = [[r["flat"] for r in _cell(rows, v, base)] for v in TEMPERATURES]
    plots.with_spread(left, TEMPERATURES, shares, color=hot, marker="o", ls="")
    left.set_xscale("log")
    plots.few_ticks(left, TEMPERATURES)
    left.set(xlabel="temperature n = ησ²/2S", ylabel="share of time in the flat bowl")
    left.set_title("η = .005, ηλ = .08")
    shares = [[r["flat"] for r in _cell(rows, COLD, v)] for v in STEPS]
    plots.with_spread(right, STEPS, shares, color=cold, marker="s")
    right.set_xscale("log")
    plots.few_ticks(right, STEPS)
    plots.mark_line(right, gibbs_share(COLD), "exp(-L/n)")
    right.set(xlabel="ηλ of the sharp bowl; S grows with η")
    right.set_title("n = .05")
    right.set_ylim(0.45, 1.03)
    plots.caption(
        figure,
        "η/S, as a temperature, says how often SGD is in the flat bowl, while ηλ ≲ .1; "
        "larger steps favour it beyond that.",
        f"{len({r['seed'] for r in rows})} seeds of {bowls.walkers} walkers, started "
        "half in each bowl. Points: seeds; bars: one standard deviation over them.",
    )
    return figure


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    base = RATE * SHARP[2]
    turned = dict(zip(TEMPERATURES, TEMPERATURES[1:] + TEMPERATURES[:1], strict=True))
    dealt = [
        {**r, "temperature": turned[r["temperature"]]}
        if abs(r["step"] - base) < 1e-9
        else r
        for r in rows
    ]
    stuck = [{**r, "flat": 0.5, "from_flat": 1.0, "from_sharp": 0.0} for r in rows]
    return {"temperatures exchanged": dealt, "walkers that do not move": stuck}


EXPERIMENT = Experiment(
    id="two-bowls",
    paper="Jastrzębski et al. 2017",
    claim="Which of two bowls SGD is in follows the temperature ησ²/2S, while ηλ ≲ .1; "
    "larger steps favour the flatter one.",
    folder="three_factors",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    # Half of the clock of one worker, beside other work.
    nulls=nulls,
)
