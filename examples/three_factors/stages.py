"""F7: stages of high noise lead to wider minima, stages of low noise to sharper ones.

Criteria, fixed before the run on a new split and new seeds. The noise eta / S goes to
and fro between two values, low first, by the learning rate or by the batch size; the
loss is squared. Over a stage log lambda_max and log ||H||_F change; of each seed the
mean change over its low stages and over its high stages counts, without the first stage
of each, in which the network is still learning. For both ways and both measures:

1. the change over low-noise stages is above 0;
2. the change over high-noise stages is below 0.

A drift along training, of whatever sign, cannot meet both. Nor can the train loss be
what is measured: it falls in low-noise stages, where sharpness is to rise. Under
cross-entropy H goes to 0 with the loss, and the sign of a change is that of the loss:
the same stages under cross-entropy stand beside it, with some of the seeds, not judged.
The stages are of equal epochs for both ways; a low-noise stage by batch size has fewer
updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.common import data, measures, plots, stacks
from examples.common.seedwise import chunks
from examples.common.stacks import Stack
from examples.common.tables import aligned
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

from .cycles import Arm, Cycle, train_epoch
from .large import schedule_of, train_large
from .small import (
    CLASSES,
    DIVERGED,
    TRAINED,
    listed,
    samples,
    standing,
    status_of,
)

__all__ = ["EXPERIMENT", "Stages"]

# Changes left out, counted from that over the second stage.
FIRST = 1
WAYS = {"rate": "lr", "batch": "batch_size"}
SQUARED, CROSS_ENTROPY = "squared", "cross-entropy"
JUDGED = {"lambda_max": "λ_max", "frobenius": "‖H‖_F"}
# What is also in the table.
MEASURED = {**JUDGED, "trace": "tr H", "train_loss": "train loss"}
_LOSSES = {
    SQUARED: (stacks.squared_loss, measures.squared_error),
    CROSS_ENTROPY: (stacks.cross_entropy, measures.cross_entropy_loss),
}


@dataclass(frozen=True)
class Stages(Settings):
    """Network, data, the high eta and S, and the stages.

    Attributes:
        network: "mlp", or one of `networks.NETWORKS`, with the cross-entropy.
        losses: judged the first; the others reported, of the first task's seeds.
        factor: between the two ratios.
        stage, stages: epochs of a stage, and how many; low noise first.
        measured: training samples that curvature is measured on.
        products: with the Hessian, for ||H||_F and for tr H.
        chunk: seeds in one task.
    """

    network: str = "mlp"
    losses: tuple[str, ...] = (SQUARED, CROSS_ENTROPY)
    train: int = 2048
    validation: int = 4000
    split_seed: int = 2026
    skip: int = 6048
    pool: int = 2
    hidden: tuple[int, ...] = (50, 50)
    learning_rate: float = 0.03
    batch_size: int = 4
    factor: int = 5
    stage: int = 5
    stages: int = 8
    measured: int = 1024
    products: int = 24
    chunk: int = 6

    @property
    def epochs(self) -> int:
        """Of every run."""
        return self.stage * self.stages

    @property
    def looks(self) -> list[int]:
        """Epochs to measure after: the first and the last of each stage."""
        last = [self.stage * (at + 1) for at in range(self.stages)]
        return sorted({*last, *(epoch - self.stage + 1 for epoch in last)})


def settings(preset: str, dataset: str) -> Stages:
    """The preset's; digits have samples of their own."""
    digits: dict[str, Any] = {}
    if dataset == "digits":
        digits = {"train": 1440, "validation": 357}
    if preset == "quick":
        small: dict[str, Any] = {
            "train": 512,
            "validation": 357,
            "stage": 2,
            "stages": 6,
        }
        small |= {"measured": 256, "products": 8, "batch_size": 8}
        return Stages(preset, dataset, (100, 101, 102), **small, learning_rate=0.04)
    if preset == "laptop":
        return Stages(preset, dataset, tuple(range(100, 112)), **digits)
    return Stages(
        preset,
        dataset,
        tuple(range(100, 108)),
        network="vgg11",
        losses=(CROSS_ENTROPY,),
        train=45_000,
        validation=5_000,
        split_seed=777,
        skip=0,
        pool=1,
        learning_rate=0.005,
        batch_size=128,
        stage=15,
        stages=20,
        chunk=1,
    )


def tasks(settings: Stages) -> list[Task]:
    """Some seeds of one way and loss each; those with the most updates first."""
    groups = chunks(settings.seeds, settings.chunk)
    return [
        {"loss": loss, "way": way, "seeds": seeds}
        for way in WAYS
        for at, loss in enumerate(settings.losses)
        for seeds in (groups[:1] if at else groups)
    ]


def arm_of(settings: Stages, way: str) -> Arm:
    """The cycle that alternates the stages."""
    ratio = settings.learning_rate / settings.batch_size
    return Arm(
        way,
        WAYS[way],
        settings.learning_rate,
        settings.batch_size,
        ratio / settings.factor,
        ratio,
        first="low",
        order=list(WAYS).index(way),
    )


def run(settings: Stages, task: Task, watch: Watch) -> list[Row]:
    """Train the seeds of a task through all stages."""
    if settings.network == "mlp":
        return _run_mlp(settings, task, watch)
    return [_run_large(settings, task, seed, watch) for seed in task["seeds"]]


def _run_large(settings: Stages, task: Task, seed: int, watch: Watch) -> Row:
    arm = arm_of(settings, task["way"])
    history = train_large(
        settings.network,
        data.prepared(
            settings.dataset, settings.train, settings.validation, settings.split_seed
        ),
        seed,
        watch,
        lambda model, part: measures.curvature(model, part, products=settings.products),
        measured=settings.measured,
        rate=arm.learning_rate,
        batch_size=arm.batch_size,
        epochs=settings.epochs,
        schedule=schedule_of(arm, settings.stage),
        measured_samples=5000,
    )
    row: Row = {"loss": task["loss"], "way": task["way"], "seed": seed}
    row["status"] = history.status
    # Point 0 is before the first step; a run that diverged has fewer.
    for epoch, point in enumerate(history.points):
        if epoch in settings.looks:
            _keep(row, point, epoch % settings.stage == 0)
    return row


def _run_mlp(settings: Stages, task: Task, watch: Watch) -> list[Row]:
    seeds, (loss, mean_loss) = task["seeds"], _LOSSES[task["loss"]]
    sample = samples(
        settings.dataset,
        settings.train,
        settings.validation,
        seed=settings.split_seed,
        skip=settings.skip,
        pool=settings.pool,
    )
    x, y = sample[:2]
    stack = Stack.drawn((x.shape[1], *settings.hidden, CLASSES), seeds)
    start = stack.mean_loss(x, y, loss).tolist()
    cycle = Cycle(arm_of(settings, task["way"]), seeds, len(y), settings.stage)
    rows: list[Row] = [
        {"loss": task["loss"], "way": task["way"], "seed": seed} for seed in seeds
    ]
    part = x[: settings.measured], y[: settings.measured]
    for epoch in range(1, settings.epochs + 1):
        train_epoch(stack, x, y, cycle, loss)
        watch.progress(epoch / settings.epochs)
        if epoch not in settings.looks:
            continue
        found = standing(stack, sample, loss)
        is_end = epoch % settings.stage == 0
        for r, row in enumerate(rows):
            now = {name: values[r] for name, values in found.items()}
            row["status"] = status_of(
                start[r], now["train_loss"], now["train_accuracy"]
            )
            if row["status"] != DIVERGED:
                products = settings.products if is_end else 0
                now |= measures.curvature(
                    stack.module(r), part, mean_loss, products=products
                )
            _keep(row, now, is_end)
    return rows


def _keep(row: Row, now: Mapping[str, float], is_end: bool) -> None:
    """Add to the curves; ||H||_F and tr H at the ends of stages only."""
    names = ["lambda_max", "train_loss", "validation_accuracy"]
    for name in [*names, *(["frobenius", "trace"] if is_end else [])]:
        row.setdefault(name, []).extend(listed([now.get(name, math.nan)], 4))


def judge(settings: Stages, rows: Sequence[Row], expected: int) -> Verdict:
    """The criteria at the head of this file."""
    good = [row for row in rows if row["status"] == TRAINED]
    claims, shorts = [], []
    for way in WAYS:
        ours = [r for r in good if (r["way"], r["loss"]) == (way, settings.losses[0])]
        for what, name in JUDGED.items():
            low, high = _changes(settings, ours, what)
            claims.append(Claim(f"{way}: log {name} over low stages", low, low=0.0))
            claims.append(Claim(f"{way}: log {name} over high stages", high, high=0.0))
            shorts.append(
                f"by {way}: log {name} {_signed(low)} over low-noise, "
                f"{_signed(high)} over high-noise stages"
            )
    return decide(
        claims,
        found=len(good),
        expected=expected,
        table=_table(settings, good),
        short="; ".join(shorts) + f" (n {len(settings.seeds)} seeds)",
    )


def _ends(settings: Stages, row: Row, what: str) -> np.ndarray:
    """A curve at the ends of the stages."""
    curve = np.array([math.nan if v is None else v for v in row[what]], float)
    return curve if len(curve) == settings.stages else curve[1::2]


def _steps(settings: Stages, row: Row, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Changes of the logarithm over each low stage, and over each high one."""
    change = np.diff(np.log(_ends(settings, row, what)))
    return change[FIRST::2], change[FIRST + 1 :: 2]


def _changes(
    settings: Stages, rows: Sequence[Row], what: str
) -> tuple[list[float], list[float]]:
    """Mean changes over low and over high stages, a value a seed."""
    steps = [_steps(settings, row, what) for row in rows]
    return [_mean(low) for low, _ in steps], [_mean(high) for _, high in steps]


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _signed(values: Sequence[float]) -> str:
    text = mean_and_spread(values, 2)
    return text if text.startswith(("-", "+")) else f"+{text}"


def _table(settings: Stages, rows: Sequence[Row]) -> str:
    lines = []
    for loss in settings.losses:
        for way in WAYS:
            ours = [r for r in rows if (r["way"], r["loss"]) == (way, loss)]
            if not ours:
                continue
            for what, name in MEASURED.items():
                low, high = _changes(settings, ours, what)
                lines.append(
                    [
                        f"{loss}, by {way}",
                        f"log {name}",
                        _signed(low),
                        _agree(settings, ours, what, 0, 1),
                        _signed(high),
                        _agree(settings, ours, what, 1, -1),
                    ]
                )
            ends = np.stack([_ends(settings, r, "validation_accuracy") for r in ours])
            steps = np.diff(ends, axis=1)
            low, high = steps[:, FIRST::2], steps[:, FIRST + 1 :: 2]
            lines.append(
                [
                    f"{loss}, by {way}",
                    "val. accuracy",
                    _signed(list(low.mean(axis=1))),
                    f"{(low > 0).sum()}/{low.size} > 0",
                    _signed(list(high.mean(axis=1))),
                    f"{(high < 0).sum()}/{high.size} < 0",
                ]
            )
    head = ["", "change of", "low-noise stages", "", "high-noise stages", ""]
    return "\n".join([aligned(head, lines), "", _levels(settings, rows)])


def _agree(
    settings: Stages, rows: Sequence[Row], what: str, which: int, sign: int
) -> str:
    steps = np.concatenate([_steps(settings, row, what)[which] for row in rows])
    return f"{(sign * steps > 0).sum()}/{len(steps)} {'>' if sign > 0 else '<'} 0"


def _levels(settings: Stages, rows: Sequence[Row]) -> str:
    """Where the stages end."""
    lines = []
    for loss in settings.losses:
        for way in WAYS:
            ours = [r for r in rows if (r["way"], r["loss"]) == (way, loss)]
            if not ours:
                continue
            for start, name in ((FIRST + 1, "low"), (FIRST + 2, "high")):
                cells = []
                for what in ("lambda_max", "train_loss", "validation_accuracy"):
                    ends = [_ends(settings, r, what)[start::2] for r in ours]
                    cells.append(mean_and_spread([_mean(e) for e in ends]))
                lines.append([f"{loss}, by {way}", name, *cells])
    head = ["at the ends of stages", "noise", "λ_max", "train loss", "val. accuracy"]
    return aligned(head, lines) + (
        "\nMean ± standard deviation over seeds, of a seed's mean over stages."
    )


def draw(settings: Stages, rows: Sequence[Row]) -> Figure:
    """Sharpness, train loss and accuracy along training, a row of panels for a loss."""
    names = {
        **JUDGED,
        "train_loss": "train loss",
        "validation_accuracy": "validation accuracy",
    }
    rows = [row for row in rows if row["status"] == TRAINED]
    figure, axes = plots.figure(4, len(settings.losses), sharex=True)
    colours = plots.colours(3)
    looks: dict[str, dict[str, Any]] = {
        "rate": {"color": colours[0], "ls": "-"},
        "batch": {"color": colours[2], "ls": (0, (4, 2))},
    }
    for at, loss in enumerate(settings.losses):
        for ax, (what, name) in zip(axes[at], names.items(), strict=True):
            for way, look in looks.items():
                ours = [r for r in rows if (r["way"], r["loss"]) == (way, loss)]
                if ours:
                    looked = settings.looks
                    ends = [e for e in looked if e % settings.stage == 0]
                    plots.with_spread(
                        ax,
                        ends if what == "frobenius" else looked,
                        list(zip(*(r[what] for r in ours), strict=True)),
                        label=f"by {way}",
                        points=False,
                        **look,
                    )
            ax.set_ylabel(f"{name} ({loss})" if what == "train_loss" else name)
            if what != "validation_accuracy":
                plots.log_axis(ax)
            for stage in range(1, settings.stages, 2):
                first = stage * settings.stage
                ax.axvspan(
                    first + 0.5, first + settings.stage + 0.5, color="#f3efe0", zorder=0
                )
        axes[at, 0].set_title(f"{loss} loss" + (", not judged" if at else ""))
    for ax in axes[-1]:
        ax.set_xlabel("epoch")
    if axes[0, 0].get_lines():
        axes[0, 0].legend()
    few = f", {settings.chunk} where not judged" * (len(settings.losses) > 1)
    plots.caption(
        figure,
        "Noise up: the minimum becomes wider; noise down: it becomes sharper; by "
        "learning rate and by batch size alike",
        f"{settings.network} on {settings.dataset}, {settings.train} samples, "
        f"{len(settings.seeds)} seeds{few}. η/S is {settings.factor} times as high "
        "where shaded. Lines are means over seeds, bars one standard deviation; ‖H‖_F "
        "is measured at the ends of stages.",
    )
    return figure


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Rows of which the claim is false."""
    rng = np.random.default_rng(seed)
    names = ("lambda_max", "frobenius")

    def changed(how: Callable[[list], list]) -> list[Row]:
        return [{**row, **{name: how(row[name]) for name in names}} for row in rows]

    def drift(factor: float) -> Callable[[list], list]:
        return lambda curve: [factor ** (at / len(curve)) for at in range(len(curve))]

    return {
        "epochs permuted within each seed": changed(
            lambda curve: [curve[i] for i in rng.permutation(len(curve))]
        ),
        "low and high noise exchanged": changed(
            lambda curve: [None if v is None else 1 / v for v in curve]
        ),
        "sharpness only rises": changed(drift(10.0)),
        "sharpness only falls": changed(drift(0.1)),
    }


EXPERIMENT = Experiment(
    id="f7",
    paper="Jastrzębski et al. 2017",
    claim=(
        "Stages of high noise lead to wider minima and stages of low noise to sharper "
        "ones, whether the learning rate changes or the batch size."
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
        "VGG-11, CIFAR-10, stages of 15 epochs: accuracy 89.9 ± .20 % (by batch), "
        "90.2 ± .10 % (by rate)"
    ),
    nulls=nulls,
)
