"""F2 with batch normalisation: the line, its statistics re-estimated and not.

Residual networks as the paper's, small ones at laptop size, at equal epochs. In between
two networks the statistics of batch normalisation are those of neither: re-estimated,
they are what the network would have after some steps of rate 0; interpolated, a mixture
of the ends'.

Criteria, written before the laptop run. Seed by seed, statistics re-estimated: log of
the curvature along the line at the end of low eta/S over that at the end of high eta/S
is above 0, for low eta and for high S; the same for an arm of equal ratio, the null,
lies within a third of the smaller of the two effects. And statistics matter: log of
the loss half way between reference and the arm of equal ratio, interpolated over
re-estimated, is above 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from examples.common import seedwise
from examples.engine.experiment import Experiment, Row
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

from . import interpolation, lines
from .interpolation import HIGH_S, LOW_RATE, NAMES, SAME
from .lines import Lines, log_ratio

__all__ = ["EXPERIMENT"]

ARMS = ((0.1, 16), (0.2, 32), (0.1, 128), (0.0125, 16))


def settings(preset: str, dataset: str) -> Lines:
    """ResNet-8 on 14 x 14 pixels; the paper's ResNet-56, the epochs our choice."""
    is_digits, is_quick = dataset == "digits", preset == "quick"
    is_paper = preset == "paper"
    train_size = 256 if is_quick else 1440 if is_digits else 2048
    return Lines(
        preset=preset,
        dataset=dataset,
        seeds=tuple(range(3)) if is_quick else tuple(range(100, 106)),
        train_size=45_000 if is_paper else train_size,
        validation_size=5_000 if is_paper else 100 if is_quick else 350,
        split_seed=777 if is_paper else 2026,
        pool=1 if is_digits or is_paper else 2,
        skip=0 if is_digits or is_paper else 6048,
        hidden=(),
        network="resnet56" if is_paper else "resnet8",
        arms=interpolation.PAPER_ARMS if is_paper else ARMS,
        epochs=200 if is_paper else 24 if is_quick else 10,
        rung=math.inf,
        target=math.inf,
        rate=0.0,
        most_steps=0,
        measure_size=5_000 if is_paper else 1024,
        products=3 if is_quick else 6,
        seeds_a_task=1,
    )


def judge(s: Lines, found: Sequence[Row], expected: int) -> Verdict:
    """Curvature along the line, and what the statistics do half way."""
    good = [r for r in found if r["status"] == "finished"]
    effects = {arm: log_ratio(good, arm, "end", "along") for arm in NAMES}
    both = [np.mean(effects[arm] or [0.0]) for arm in (HIGH_S, LOW_RATE)]
    smaller = max(1e-9, abs(float(min(both))))
    middle = [_at_the_middle(s, r) for r in good if r["arm"] == SAME]
    claims = [
        Claim(f"log curvature along the line, {NAMES[arm]}", effects[arm], low=0)
        for arm in (HIGH_S, LOW_RATE)
    ]
    claims += [
        Claim(
            "an arm of equal ratio, over the smaller of the two",
            [null / smaller for null in effects[SAME]],
            low=-1 / 3,
            high=1 / 3,
        ),
        Claim("log loss half way, interpolated less re-estimated", middle, low=0),
    ]
    return decide(
        claims,
        found=len(good),
        expected=expected,
        table=interpolation.table(good, NAMES, lines.moments(s)),
        short="log curvature along the line over the reference's: "
        + ", ".join(
            f"{name} {mean_and_spread(effects[arm], 2)}" for arm, name in NAMES.items()
        )
        + f"; half way, log of interpolated over re-estimated loss "
        f"{mean_and_spread(middle, 2)}; n {len(middle)} seeds",
    )


def _at_the_middle(s: Lines, row: Row) -> float:
    place = lines.alphas(s).index(0.5)
    return math.log(row["end_losses_interpolated"][place] / row["end_losses"][place])


def draw(s: Lines, found: Sequence[Row]) -> Figure:
    """Loss and accuracy along the line, and what the statistics make of it."""
    return interpolation.draw_lines(
        s,
        found,
        NAMES,
        "With batch normalisation too, networks of low η/S are sharper along the line; "
        "in between its statistics have to be re-estimated",
        f"{s.dataset}, {s.train_size} samples, {s.network}, {s.epochs} epochs; "
        f"reference (α = 0) η = {s.arms[0][0]:g}, S = {s.arms[0][1]}",
        panels=(
            ("end_losses", "train loss, re-estimated"),
            ("end_losses_interpolated", "train loss, interpolated"),
            ("end_accuracies", "validation accuracy, re-estimated"),
        ),
    )


def nulls(found: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Arms permuted within each seed; statistics that make no difference."""
    same = [
        {**r, "end_losses_interpolated": r.get("end_losses")}
        if r["seed"] % 2
        else {
            **r,
            "end_losses": r.get("end_losses_interpolated"),
            "end_losses_interpolated": r.get("end_losses"),
        }
        for r in found
    ]
    return {
        "arms permuted within each seed": seedwise.shuffled(found, seed, "arm"),
        "statistics without a difference, or with the opposite": same,
    }


EXPERIMENT = Experiment(
    id="f2-batchnorm",
    paper="Jastrzębski et al. 2017",
    claim="With BatchNorm too, minima of a lower η/S are sharper along the line, whose "
    "statistics have to be re-estimated.",
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
        "paper": ("cifar10", "fashion-mnist"),
    },
    paper_number="a figure: ResNet-56, CIFAR-10, η/S = .1/128 against .1/1024, .01/128",
)
