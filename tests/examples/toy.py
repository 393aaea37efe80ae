"""An experiment of a few milliseconds, for tests of the engine."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from examples.common import plots
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide


@dataclass(frozen=True)
class Toy(Settings):
    """Attributes: what to draw, and how to misbehave."""

    tasks: int = 6
    mean: float = 1.0
    pause: float = 0.0
    trouble: str = ""  # "raise", "die", "hang" or "overflow": what task 1 does
    log: str = ""  # a file that gets a line for each start of a task
    gate: str = ""  # a folder in which a file of a task's number lets it go on


def settings(preset: str, dataset: str) -> Toy:
    return Toy(preset, dataset, seeds=(0, 1))


def tasks(toy: Toy) -> list[Task]:
    return [{"number": n, "seeds": list(toy.seeds)} for n in range(toy.tasks)]


def run(toy: Toy, task: Task, watch: Watch) -> list[Row]:
    if toy.log:
        with Path(toy.log).open("a") as file:
            file.write(f"{task['number']} {os.getpid()}\n")
    while toy.gate and not (Path(toy.gate) / str(task["number"])).exists():
        time.sleep(0.002)
    if task["number"] == 1:
        _misbehave(toy.trouble)
    for part in range(10):
        watch.progress(part / 10)
        time.sleep(toy.pause / 10)
    rng = [random.Random(1000 * task["number"] + seed) for seed in task["seeds"]]
    return [
        {"seed": s, "value": toy.mean + r.gauss(0, 0.1)}
        for s, r in zip(task["seeds"], rng, strict=True)
    ]


def _misbehave(how: str) -> None:
    if how == "raise":
        raise FloatingPointError("the loss is 1e40")
    if how == "die":
        os._exit(9)
    if how == "hang":
        time.sleep(3600)


def judge(toy: Toy, rows: Sequence[Row], expected: int) -> Verdict:
    claim = Claim("the mean", [row["value"] for row in rows], low=0.0)
    return decide([claim], found=len(rows), expected=expected, table="value")


def draw(toy: Toy, rows: Sequence[Row]) -> Figure:
    figure, axes = plots.figure(1)
    axes[0, 0].plot([row["value"] for row in rows], "o")
    plots.caption(figure, "Toy", "Each point is a run.")
    return figure


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    return {"values centred": [{**row, "value": row["value"] - 1} for row in rows]}


EXPERIMENT = Experiment(
    id="toy",
    paper="nobody",
    claim="The mean is positive.",
    folder="toy",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    nulls=nulls,
)
