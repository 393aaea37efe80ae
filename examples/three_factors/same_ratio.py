"""F3: are minima of one ratio eta/S, at eta and S scaled by beta, equally wide?

Criteria, written before the laptop run. Seed by seed, log of the curvature along the
line at the scaled arm's end over that at the reference's: its interval lies within a
quarter of the effect of a ratio eight times lower, an arm of the same run, (1) after
equal epochs for each beta; and (2) at matched loss, quenched, so does that of
lambda_max.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from examples.common import seedwise
from examples.engine.experiment import Experiment, Row
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

from . import interpolation, lines
from .lines import Lines, log_ratio

__all__ = ["EXPERIMENT"]

# The reference; beta = 1/4, 1 (another start), 2 and 4; a lower ratio, for the scale.
ARMS = ((0.08, 16), (0.02, 4), (0.08, 16), (0.16, 32), (0.32, 64), (0.01, 16))
PAPER_ARMS = (
    *((0.1, 50), (0.025, 12), (0.1, 50), (0.2, 100), (0.4, 200)),
    (0.0125, 50),
)
BETAS = {1: 0.25, 2: 1.0, 3: 2.0, 4: 4.0}
LOW_RATE = 5
NAMES = {**{arm: f"β = {beta:g}" for arm, beta in BETAS.items()}, LOW_RATE: "η/8, S"}
SHARE = 0.25


def settings(preset: str, dataset: str) -> Lines:
    return lines.settings(preset, dataset, ARMS, "vgg11", PAPER_ARMS)


def judge(s: Lines, found: Sequence[Row], expected: int) -> Verdict:
    """Equivalence, on the scale of the effect of the ratio in the same run."""
    good = [r for r in found if r["status"] == "finished"]
    claims = []
    for moment, measure, words in (
        ("end", "along", "equal epochs, curvature along the line"),
        ("quenched", "lambda_max", "matched loss, λ_max"),
    ):
        effect = float(np.mean(log_ratio(good, LOW_RATE, moment, measure) or [0.0]))
        for arm, beta in BETAS.items():
            values = log_ratio(good, arm, moment, measure)
            claims.append(
                Claim(
                    f"{words}, β {beta:g}, over the effect of η/8",
                    [v / max(effect, 1e-9) for v in values],
                    low=-SHARE,
                    high=SHARE,
                )
            )
    quenched = log_ratio(good, LOW_RATE, "quenched", "along")
    sharper = {
        name: log_ratio(good, arm, "quenched", "lambda_max")
        for arm, name in NAMES.items()
    }
    return decide(
        claims,
        found=len(good),
        expected=expected,
        table=interpolation.table(good, NAMES),
        short="log λ_max over the reference's, matched loss: "
        + ", ".join(
            f"{name} {mean_and_spread(values, 2)}" for name, values in sharper.items()
        )
        + f"; n {len(quenched)} seeds",
        remark="At matched loss the lower ratio itself is "
        f"{mean_and_spread(quenched, 2)} (± standard deviation) sharper along the line "
        "in the logarithm, too little to measure β by.",
    )


def draw(s: Lines, found: Sequence[Row]) -> Figure:
    """Loss along the lines, a colour a beta."""
    return interpolation.draw_lines(
        s,
        found,
        NAMES,
        "Minima found at one ratio η/S are equally wide, whatever η and S",
        f"{s.dataset}, {s.train_size} samples, {s.network}; reference (α = 0) "
        f"η = {s.arms[0][0]:g}, S = {s.arms[0][1]}, others β times both; {s.epochs} "
        f"epochs, or quenched to train loss {s.target:g}",
    )


def nulls(found: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Arms permuted among the runs of each seed: then betas differ like ratios."""
    return {"arms permuted within each seed": seedwise.shuffled(found, seed, "arm")}


EXPERIMENT = Experiment(
    id="f3",
    paper="Jastrzębski et al. 2017",
    claim="Minima found at one ratio η/S are equally wide, whatever η and S.",
    folder="three_factors",
    settings=settings,
    tasks=lines.tasks,
    run=lines.run,
    rows=lines.rows,
    judge=judge,
    draw=draw,
    nulls=nulls,
    datasets={
        "quick": ("fashion-mnist", "digits"),
        "laptop": ("fashion-mnist", "digits"),
        "paper": ("cifar10", "fashion-mnist", "digits"),
    },
    paper_number="a figure: VGG-11, CIFAR-10, η = .1β, S = 50β, β = ¼, 1, 4",
)
