"""F4: a cyclic learning rate against a cyclic batch size with the same ratio eta / S.

Criteria, fixed before the run on a new split and new seeds. For each shape of the cycle
(square, triangle), with values paired by seed:

1. validation accuracy, mean over all epochs: the cycles lie above the constants;
2. the cycle of the batch size less that of the rate, in validation accuracy over all
   epochs, is within a third of the distance from the cycles to the nearer constant;
3. the same of log train loss, in the epochs of high eta / S and in those of low eta / S
   one by one, so that deviations of opposite sign do not cancel.

The two constants, of the same ratio as each other, are the null of (2) and (3) in the
same run: their difference is in the table. All arms see the same number of samples;
each has orders of its own. Their numbers of updates differ, which is the claim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.common import data, plots
from examples.common.seedwise import chunks
from examples.common.stacks import Stack
from examples.common.tables import aligned
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

from .cycles import Arm, Cycle, constant, train_epoch
from .large import schedule_of, train_large
from .small import (
    CLASSES,
    TRAINED,
    Samples,
    listed,
    samples,
    standing,
    status_of,
)

__all__ = ["EXPERIMENT", "Exchange"]

# Half-width of the equivalence, as a share of the distance to the constants.
SHARE = 1 / 3
# Training samples whose loss is followed, of a large network.
MEASURED = 5000
BATCH, RATE, SMALL, LARGE = "batch", "rate", "constant, low rate", "constant, large S"
CONSTANTS = (SMALL, LARGE)
WAYS = {BATCH: "batch_size", RATE: "lr"}


@dataclass(frozen=True)
class Exchange(Settings):
    """Attributes: network and data, the high eta and S, and the cycle.

    Attributes:
        network: "mlp", or one of `networks.NETWORKS`.
        factor: between the two ratios.
        stage, stages: epochs of half a cycle, and how many halves.
        chunk: seeds in one task.
    """

    network: str = "mlp"
    train: int = 2080
    validation: int = 4000
    split_seed: int = 2026
    skip: int = 6048
    pool: int = 2
    hidden: tuple[int, ...] = (50, 50)
    learning_rate: float = 0.04
    batch_size: int = 16
    factor: int = 5
    stage: int = 5
    stages: int = 8
    shapes: tuple[str, ...] = ("square", "triangle")
    chunk: int = 8

    @property
    def epochs(self) -> int:
        """Of every arm."""
        return self.stage * self.stages

    @property
    def arms(self) -> list[Arm]:
        """The cycles, and the two constants that belong to both shapes."""
        ratio = self.learning_rate / self.batch_size
        found = [
            Arm(
                f"{shape} {name}",
                vary,
                self.learning_rate,
                self.batch_size,
                ratio / self.factor,
                ratio,
                shape,
                order=2 * at + which,
            )
            for at, shape in enumerate(self.shapes)
            for which, (name, vary) in enumerate(WAYS.items())
        ]
        low, large = self.learning_rate / self.factor, self.batch_size * self.factor
        found.append(constant(SMALL, low, self.batch_size, order=10))
        found.append(constant(LARGE, self.learning_rate, large, order=11))
        return found


def settings(preset: str, dataset: str) -> Exchange:
    """The preset's; digits have samples of their own."""
    digits: dict[str, Any] = {}
    if dataset == "digits":
        digits = {"train": 1440, "validation": 357}
    if preset == "quick":
        small: dict[str, Any] = {
            "train": 480,
            "validation": 300,
            "stage": 2,
            "stages": 4,
        }
        return Exchange(preset, dataset, (100, 101, 102), **small, chunk=3)
    if preset == "laptop":
        return Exchange(preset, dataset, tuple(range(100, 124)), **digits)
    return Exchange(
        preset,
        dataset,
        tuple(range(100, 105)),
        network="vgg11",
        train=45_000,
        validation=5_000,
        split_seed=777,
        skip=0,
        pool=1,
        learning_rate=0.005,
        batch_size=128,
        stage=15,
        stages=20,
        shapes=("square",),
        chunk=1,
    )


def tasks(settings: Exchange) -> list[Task]:
    """Some seeds of an arm each; those with the most updates first."""
    arms = sorted(settings.arms, key=lambda arm: arm.vary == "batch_size")
    arms.sort(key=lambda arm: arm.batch_size)
    return [
        {"arm": arm.name, "seeds": seeds}
        for arm in arms
        for seeds in chunks(settings.seeds, settings.chunk)
    ]


def run(settings: Exchange, task: Task, watch: Watch) -> list[Row]:
    """Train the seeds of a task in one arm."""
    arm = next(a for a in settings.arms if a.name == task["arm"])
    if settings.network == "mlp":
        return _run_mlp(settings, arm, task["seeds"], watch)
    return [_run_large(settings, arm, seed, watch) for seed in task["seeds"]]


def _run_large(settings: Exchange, arm: Arm, seed: int, watch: Watch) -> Row:
    history = train_large(
        settings.network,
        data.prepared(
            settings.dataset, settings.train, settings.validation, settings.split_seed
        ),
        seed,
        watch,
        rate=arm.learning_rate,
        batch_size=arm.batch_size,
        epochs=settings.epochs,
        schedule=schedule_of(arm, settings.stage),
        measured_samples=MEASURED,
    )
    row = {"arm": arm.name, "seed": seed, "status": history.status}
    # The first point is before the first step; a run that diverged has fewer.
    return row | {
        name: listed([p[name] for p in history.points[1:]])
        for name in ("train_loss", "validation_accuracy")
    }


def _run_mlp(
    settings: Exchange, arm: Arm, seeds: Sequence[int], watch: Watch
) -> list[Row]:
    sample = _samples(settings)
    sizes = (sample[0].shape[1], *settings.hidden, CLASSES)
    stack = Stack.drawn(sizes, seeds)
    start = stack.mean_loss(sample[0], sample[1]).tolist()
    cycle = Cycle(arm, seeds, settings.train, settings.stage)
    curves: list[dict[str, list[float]]] = []
    for epoch in range(settings.epochs):
        train_epoch(stack, *sample[:2], cycle)
        curves.append(standing(stack, sample))
        watch.progress((epoch + 1) / settings.epochs)
    last = curves[-1]
    return [
        {
            "arm": arm.name,
            "seed": seed,
            "status": status_of(
                start[r], last["train_loss"][r], last["train_accuracy"][r]
            ),
            "train_loss": listed([c["train_loss"][r] for c in curves]),
            "validation_accuracy": listed(
                [c["validation_accuracy"][r] for c in curves]
            ),
        }
        for r, seed in enumerate(seeds)
    ]


def _samples(settings: Exchange) -> Samples:
    return samples(
        settings.dataset,
        settings.train,
        settings.validation,
        seed=settings.split_seed,
        skip=settings.skip,
        pool=settings.pool,
    )


# By arm and seed, a curve over epochs.
Curves = Mapping[str, Mapping[int, np.ndarray]]


def judge(settings: Exchange, rows: Sequence[Row], expected: int) -> Verdict:
    """The criteria at the head of this file."""
    good = [row for row in rows if row["status"] == TRAINED]
    accuracy = _curves(good, "validation_accuracy")
    loss = {
        arm: {seed: np.log(curve) for seed, curve in curves.items()}
        for arm, curves in _curves(good, "train_loss").items()
    }
    claims, shorts = [], []
    for shape in settings.shapes:
        every = np.ones(settings.epochs, bool)
        gain = _gain(accuracy, shape, every)
        same = _shares(accuracy, shape, every)
        claims.append(
            Claim(f"{shape}: accuracy of cycles less constants", gain, low=0.0)
        )
        claims.append(_equal(f"{shape}: accuracy, batch less rate", same))
        for name, phase in _phases(settings, shape).items():
            values = _shares(loss, shape, phase)
            claims.append(
                _equal(f"{shape}: log loss at {name} ratio, batch less rate", values)
            )
        shorts.append(
            f"{shape}: batch less rate {_signed(same)} of the distance to the "
            f"constants, which lie {mean_and_spread(gain, 2)} lower"
        )
    remark = "Shares of the distance from the cycles to the nearer constant."
    return decide(
        claims,
        found=len(good),
        expected=expected,
        table=_table(settings, accuracy, loss),
        short="; ".join(shorts) + f" (n {len(settings.seeds)} seeds)",
        remark=remark,
    )


def _equal(name: str, values: Sequence[float]) -> Claim:
    return Claim(name, values, low=-SHARE, high=SHARE)


def _curves(rows: Sequence[Row], what: str) -> Curves:
    found: dict[str, dict[int, np.ndarray]] = {}
    for row in rows:
        curve = np.array([np.nan if v is None else v for v in row[what]], float)
        found.setdefault(row["arm"], {})[row["seed"]] = curve
    return found


def _phases(settings: Exchange, shape: str) -> dict[str, np.ndarray]:
    """Which epochs belong to the upper half of the cycle, and which to the lower."""
    place = np.arange(settings.epochs) % (2 * settings.stage)
    if shape == "square":
        high = place < settings.stage
    else:  # by the ratio at the end of the epoch
        high = np.abs((place + 1) / settings.stage - 1) >= 0.5
    return {"high": high, "low": ~high}


def _together(curves: Curves, arms: Sequence[str]) -> list[int]:
    """Seeds that all of some arms have."""
    seeds = [set(curves.get(arm, {})) for arm in arms]
    return sorted(set.intersection(*seeds))


def _gain(curves: Curves, shape: str, epochs: np.ndarray) -> list[float]:
    """Cycles less constants, seed by seed."""
    cycles = [f"{shape} {BATCH}", f"{shape} {RATE}"]
    seeds = _together(curves, [*cycles, *CONSTANTS])

    def mean(arms: Sequence[str], seed: int) -> float:
        return float(np.mean([curves[arm][seed][epochs] for arm in arms]))

    return [mean(cycles, s) - mean(CONSTANTS, s) for s in seeds]


def _shares(curves: Curves, shape: str, epochs: np.ndarray) -> list[float]:
    """Batch less rate, over the distance of their mean from the nearer constant."""
    cycles = [f"{shape} {BATCH}", f"{shape} {RATE}"]
    seeds = _together(curves, [*cycles, *CONSTANTS])
    if not seeds:
        return []

    def mean(arms: Sequence[str]) -> float:
        return float(np.mean([curves[a][s][epochs] for a in arms for s in seeds]))

    distance = min(abs(mean(cycles) - mean([name])) for name in CONSTANTS)
    batch, rate = (curves[name] for name in cycles)
    if distance == 0:
        return [math.nan] * len(seeds)
    return [
        float(np.mean(batch[s][epochs] - rate[s][epochs])) / distance for s in seeds
    ]


def _signed(values: Sequence[float]) -> str:
    return mean_and_spread(values, 2)


def _table(settings: Exchange, accuracy: Curves, loss: Curves) -> str:
    lines = []
    for arm in settings.arms:
        if arm.name not in accuracy:
            continue
        phases = _phases(settings, arm.shape)
        mine, losses = accuracy[arm.name].values(), loss[arm.name].values()
        lines.append(
            [
                arm.name,
                str(len(mine)),
                mean_and_spread([c[-1] for c in mine]),
                mean_and_spread([c.mean() for c in mine]),
                mean_and_spread([c[phases["high"]].mean() for c in losses]),
                mean_and_spread([c[phases["low"]].mean() for c in losses]),
            ]
        )
    lines += [
        _difference(settings, accuracy, loss, f"{shape} {BATCH}", f"{shape} {RATE}")
        for shape in settings.shapes
    ]
    lines.append(_difference(settings, accuracy, loss, SMALL, LARGE))
    head = ["arm", "seeds", "val. acc., end", "val. acc., all epochs"]
    head += ["log train loss, high", "low"]
    return aligned(head, lines) + (
        "\nMean ± standard deviation over seeds; differences are paired by seed.\n"
        "high, low: epochs of high and low η/S (of the square cycle, for constants)."
    )


def _difference(
    settings: Exchange, accuracy: Curves, loss: Curves, first: str, second: str
) -> list[str]:
    shape = first.split()[0] if first.split()[0] in settings.shapes else "square"
    phases = _phases(settings, shape)
    seeds = _together(accuracy, [first, second])

    def less(curves: Curves, epochs: np.ndarray | slice) -> str:
        each = [curves[first][s][epochs] - curves[second][s][epochs] for s in seeds]
        return mean_and_spread([float(np.mean(d)) for d in each], 2)

    return [
        f"{first} less {second.removeprefix(shape + ' ')}",
        str(len(seeds)),
        less(accuracy, slice(-1, None)),
        less(accuracy, slice(None)),
        less(loss, phases["high"]),
        less(loss, phases["low"]),
    ]


def draw(settings: Exchange, rows: Sequence[Row]) -> Figure:
    """Accuracy and train loss along training, a row of panels for each shape."""
    figure, axes = plots.figure(2, len(settings.shapes), sharex=True)
    colours = plots.colours(3)
    looks = {
        BATCH: {"color": colours[0], "ls": "-"},
        RATE: {"color": colours[2], "ls": (0, (4, 2))},
        SMALL: {"color": "#555555", "ls": ":"},
        LARGE: {"color": "#999999", "ls": "-."},
    }
    epochs = np.arange(1, settings.epochs + 1)
    for at, shape in enumerate(settings.shapes):
        for column, what in enumerate(("validation_accuracy", "train_loss")):
            ax = axes[at, column]
            curves = _curves([r for r in rows if r["status"] == TRAINED], what)
            for number, (name, look) in enumerate(looks.items()):
                found = curves.get(f"{shape} {name}", curves.get(name))
                if found is None:
                    continue
                ours = name in (BATCH, RATE)
                plots.with_spread(
                    ax,
                    epochs,
                    np.stack(list(found.values())).T,
                    label=f"cyclic {name}" if ours else name,
                    points=False,
                    errorevery=(number, max(1, settings.epochs // 10)),
                    **look,
                )
            _shade(ax, settings, shape)
        axes[at, 0].set_title(f"{shape} cycle")
        axes[at, 0].set_ylabel("validation accuracy")
        axes[at, 1].set_ylabel("train loss (cross-entropy)")
        axes[at, 1].set_yscale("log")
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    if axes[0, 0].get_lines():
        axes[0, 0].legend(loc="lower right")
    plots.caption(
        figure,
        "A cyclic batch size and a cyclic learning rate of the same η/S give the "
        "same curves",
        f"{settings.network} on {settings.dataset}, {settings.train} samples, "
        f"{len(settings.seeds)} seeds; η/S moves by a factor {settings.factor}, high "
        "where shaded. Lines are means over seeds, bars one standard deviation. The "
        "constants have the low η/S throughout.",
    )
    return figure


def _shade(ax: plots.Axes, settings: Exchange, shape: str) -> None:
    high = _phases(settings, shape)["high"]
    for epoch in np.flatnonzero(high):
        ax.axvspan(epoch + 0.5, epoch + 1.5, color="#f3efe0", lw=0, zorder=0)


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Rows of which the claim is false."""
    rng = np.random.default_rng(seed)
    by_seed: dict[int, list[Row]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row)
    permuted = []
    for group in by_seed.values():
        arms = [group[i]["arm"] for i in rng.permutation(len(group))]
        permuted += [{**r, "arm": a} for r, a in zip(group, arms, strict=True)]
    constants = {r["seed"]: r for r in rows if r["arm"] == LARGE}

    def stands(row: Row, which: tuple[str, ...]) -> Row:
        if not row["arm"].endswith(which) or row["seed"] not in constants:
            return row
        return {**constants[row["seed"]], "arm": row["arm"]}

    return {
        "arms permuted within each seed": permuted,
        "batch size does not cycle": [stands(r, (f" {BATCH}",)) for r in rows],
        "nothing cycles": [stands(r, (f" {BATCH}", f" {RATE}")) for r in rows],
    }


EXPERIMENT = Experiment(
    id="f4",
    paper="Jastrzębski et al. 2017",
    claim=(
        "A cyclic batch size and a cyclic learning rate with the same ratio are "
        "exchangeable: their curves overlap, away from those of constants."
    ),
    folder="three_factors",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    datasets={
        "quick": ("fashion-mnist", "digits"),
        "laptop": ("fashion-mnist", "digits"),
        "paper": ("cifar10", "fashion-mnist"),
    },
    paper_number=(
        "VGG-11, CIFAR-10: test accuracy 89.39 % (cyclic batch), 89.24 % (cyclic "
        "rate); 87.25 % and 86.92 % (constants)"
    ),
    nulls=nulls,
)
