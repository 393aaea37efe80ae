"""Full-batch Adam: the largest eigenvalue of P^-1 H rises to 38/eta and stays there.

P is what Adam divides by, `fm.preconditioner(model, optimizer)`, and the eigenvalue is
that of `fm.Hessian(...).preconditioned(P)`. For beta1 = .9 the edge is
(2 + 2 beta1) / ((1 - beta1) eta) = 38 / eta. Beside it lambda_max of H itself, which
has no such edge. Criteria and nulls: `rates`, and one of its own: the edge of gradient
descent in the place of Adam's. The first look is after 50 steps, when Adam has a mean
of squared gradients to divide by. The network and the rates were chosen by trial runs
with seed 100, which the laptop and paper presets do not use.

Source: Cohen et al. (2022), "Adaptive gradient methods at the edge of stability",
arXiv:2207.14484.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastminima as fm
from examples.common import measures, plots
from examples.engine.experiment import Experiment, Row, Task, Watch
from examples.engine.outcome import Verdict
from fastminima.theory import edge_of_stability

from . import rates
from .following import follow, network, samples
from .rates import RateSettings

__all__ = ["EXPERIMENT"]

BETAS = (0.9, 0.99)
RATES = (0.0005, 0.001)


def settings(preset: str, dataset: str) -> RateSettings:
    made = rates.settings_of(preset, dataset, RATES, steps=3000, first=50)
    return replace(made, seeds=made.seeds[:5])


def run(settings: RateSettings, task: Task, watch: Watch) -> list[Row]:
    return [_run(settings, task["rate"], seed, watch) for seed in task["seeds"]]


def _run(settings: RateSettings, rate: float, seed: int, watch: Watch) -> Row:
    whole = samples(settings)
    model = network(settings, whole, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=BETAS)
    plain = fm.SharpnessProbe(model, measures.squared_error)
    edge = edge_of_stability(rate, BETAS[0], BETAS[0])
    start: Tensor | None = None

    def look() -> dict[str, float | None]:
        nonlocal start
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # converged is read
            hessian = fm.Hessian(model, measures.squared_error, whole)
            scaled = hessian.preconditioned(fm.preconditioner(model, optimizer))
            # A warm start is asked for the residual alone.
            miss = 0.002 if start is None else 1.0
            pairs = fm.top_eigenpairs(scaled, start=start, miss=miss)
            found = plain(whole)
        start = pairs.vectors[0]
        return {
            "sharpness": float(pairs.values[0]) / edge if pairs.converged else None,
            "plain": float(found.values[0]) if found.converged else None,
        }

    found = follow(settings, model, optimizer, lambda: whole, whole, look, watch)
    return {"rate": rate, "seed": seed, "edge": edge, **found}


def judge(settings: RateSettings, rows: Sequence[Row], expected: int) -> Verdict:
    table = rates.means(settings, rows, "38/η", {"plain": "λ_max of H"})
    return rates.judged(settings, rows, expected, "38/η", table)


def draw(settings: RateSettings, rows: Sequence[Row]) -> Figure:
    figure, axes = plots.figure(3)
    left, middle, right = axes[0]
    rates.curves(left, settings, rows, "sharpness")
    plots.mark_line(left, 1.0, "38/η")
    left.set(ylabel="λ_max of P⁻¹H over 38/η", ylim=(0, None))
    left.legend(loc="lower right")
    rates.curves(middle, settings, rows, "plain")
    middle.set(ylabel="λ_max of H itself", ylim=(0, None))
    rates.curves(right, settings, rows, "loss")
    right.set(ylabel="train loss")
    plots.log_axis(right)
    plots.caption(
        figure,
        "Full-batch Adam sharpens until the largest eigenvalue of the preconditioned "
        "Hessian is 38/η, and goes on there.",
        f"{settings.dataset}, N = {settings.samples}, squared loss, ReLU MLP "
        f"{'-'.join(map(str, settings.hidden))}, β {BETAS[0]:g}, {BETAS[1]:g}; a line "
        f"a run, {len({r['seed'] for r in rows})} seeds.",
    )
    return figure


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    factor = edge_of_stability(1, BETAS[0], BETAS[0]) / edge_of_stability(1)
    wrong = [
        {**row, "sharpness": [v and v * factor for v in row["sharpness"]]}
        for row in rows
    ]
    return rates.nulls(rows, seed) | {"the edge is 2/η": wrong}


EXPERIMENT = Experiment(
    id="edge-adam",
    paper="Cohen et al. 2022",
    claim="Full-batch Adam sharpens until the largest eigenvalue of its preconditioned "
    "Hessian is 38/η and stays within a tenth of it, while the loss goes on falling.",
    folder="edge_of_stability",
    settings=settings,
    tasks=rates.tasks_of,
    run=run,
    judge=judge,
    draw=draw,
    datasets=("fashion-mnist", "digits"),
    nulls=nulls,
)
