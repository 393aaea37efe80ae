"""Full-batch gradient descent: lambda_max rises to 2/eta and stays there.

The two largest eigenvalues of the Hessian of all samples along training, by
`fm.SharpnessProbe(k=2)`, at three learning rates. Criteria and nulls: `rates`. The
network and the rates were chosen by trial runs with seeds 100 and 101, which the laptop
and paper presets do not use.

Source: Cohen et al. (2021), "Gradient descent on neural networks typically occurs at
the edge of stability", arXiv:2103.00065.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

import fastminima as fm
from examples.common import measures, plots
from examples.engine.experiment import Experiment, Row, Task, Watch
from examples.engine.outcome import Verdict
from fastminima.theory import edge_of_stability

from . import rates
from .following import follow, network, samples
from .rates import RateSettings

__all__ = ["EXPERIMENT"]

RATES = (0.1, 0.15, 0.2)


def settings(preset: str, dataset: str) -> RateSettings:
    # Digits are less curved.
    factor = 2 if dataset == "digits" else 1
    return rates.settings_of(preset, dataset, [factor * r for r in RATES], steps=4000)


def run(settings: RateSettings, task: Task, watch: Watch) -> list[Row]:
    return [_run(settings, task["rate"], seed, watch) for seed in task["seeds"]]


def _run(settings: RateSettings, rate: float, seed: int, watch: Watch) -> Row:
    whole = samples(settings)
    model = network(settings, whole, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    probe = fm.SharpnessProbe(model, measures.squared_error, k=2)
    edge = edge_of_stability(rate)

    def look() -> dict[str, float | None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # converged is read
            pairs = probe(whole)
        shares = [float(v) / edge if pairs.converged else None for v in pairs.values]
        return dict(zip(("sharpness", "second"), shares, strict=True))

    found = follow(settings, model, optimizer, lambda: whole, whole, look, watch)
    return {"rate": rate, "seed": seed, "edge": edge, **found}


def judge(settings: RateSettings, rows: Sequence[Row], expected: int) -> Verdict:
    table = rates.means(settings, rows, "2/η", {"second": "second eigenvalue"})
    return rates.judged(settings, rows, expected, "2/η", table)


def draw(settings: RateSettings, rows: Sequence[Row]) -> Figure:
    figure, axes = plots.figure(3)
    left, middle, right = axes[0]
    rates.curves(left, settings, rows, "sharpness", is_share=True)
    for rate, colour in zip(
        settings.rates, plots.colours(len(settings.rates)), strict=True
    ):
        edge = edge_of_stability(rate)
        plots.mark_line(left, edge, f"2/η = {edge:.3g}", colour=colour)
    left.set(ylabel="λ_max", ylim=(0, None))
    left.legend(loc="lower right")
    rates.curves(middle, settings, rows, "sharpness")
    rates.curves(middle, settings, rows, "second", linestyle=":")
    plots.mark_line(middle, 1.0, "2/η")
    middle.set(ylabel="λ₁ (lines) and λ₂ (dotted) over 2/η", ylim=(0, None))
    rates.curves(right, settings, rows, "loss")
    right.set(ylabel="train loss")
    plots.log_axis(right)
    plots.caption(
        figure,
        "Full-batch gradient descent sharpens until λ_max is 2/η, and goes on there: "
        "the loss falls on, no longer at every step.",
        f"{settings.dataset}, N = {settings.samples}, squared loss, ReLU MLP "
        f"{'-'.join(map(str, settings.hidden))}; a line a run, "
        f"{len({r['seed'] for r in rows})} seeds.",
    )
    return figure


EXPERIMENT = Experiment(
    id="edge-gd",
    paper="Cohen et al. 2021",
    claim="Full-batch gradient descent sharpens until λ_max is 2/η and stays within a "
    "tenth of it, while the loss goes on falling.",
    folder="edge_of_stability",
    settings=settings,
    tasks=rates.tasks_of,
    run=run,
    judge=judge,
    draw=draw,
    datasets=("fashion-mnist", "digits"),
    nulls=rates.nulls,
    exploratory="Five seeds had left η = 0.2 undecided, their means moved by spikes of "
    "single looks. The median took the place of the mean, and seeds were doubled.",
)
