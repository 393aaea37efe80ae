"""Members on one stream of samples restart those that have converged to a bad minimum.

Each member fits a in sin(ax) to sin(2x) by SGD, all on the same x, and keeps running
means of its cost and gradient. One whose mean gradient is near zero has converged; if
its mean cost is above the best one's, it is unfit and starts anew at random. Clocked:
all are tested at the same few times. Hasty: each is tested all the time.

All repetitions of many seeds run at once here, as arrays and without autograd; a
congregation of networks is `fm.optim.Congregation`, whose rule this is (tested).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from examples.common import plots
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "RestartSettings", "moved", "unfit"]

MEMBERS = (1, 2, 4, 8)
RULES = ("clocked", "hasty")
# Seeds whose repetitions run as one array.
STACK = 10


@dataclass(frozen=True)
class RestartSettings(Settings):
    """One fitted number, whose cost has many minima.

    Attributes:
        members: of the congregations, from 1 on.
        repetitions: of each seed.
        steps: samples x of each repetition, uniform on [-3, 3].
        rate: mu, of SGD on (sin(ax) - sin(2x))^2 / 2.
        memory: tau, the weight of a new value in the running means.
        flat: a mean gradient below it in size means converged.
        youth: steps after a start before a member is tested or compared with.
        margin: delta, by how much the mean cost of an unfit one is above the least.
        every: steps between two tests of the hasty ones.
        period: steps between two tests of the clocked ones.
        reach: a is drawn from [-reach, reach], and held there.
        close: to 2, of a success.
    """

    members: tuple[int, ...] = MEMBERS
    repetitions: int = 20
    steps: int = 40_000
    rate: float = 0.02
    memory: float = 0.005
    flat: float = 0.05
    youth: int = 800
    margin: float = 0.1
    every: int = 20
    period: int = 4000
    reach: float = 10.0
    close: float = 0.2


def settings(preset: str, dataset: str) -> RestartSettings:
    """Quick has fewer, shorter runs; that of the paper many more, its size unknown."""
    made = RestartSettings(preset, dataset, tuple(range(20)))
    if preset == "quick":
        return replace(made, seeds=tuple(range(12)), steps=12_000, members=MEMBERS[:3])
    if preset == "paper":
        return replace(made, seeds=tuple(range(100)))
    return made


def tasks(settings: RestartSettings) -> list[Task]:
    seeds = settings.seeds
    stacks = [list(seeds[i : i + STACK]) for i in range(0, len(seeds), STACK)]
    return [
        {"members": members, "rule": rule, "seeds": stack}
        for members, rule, stack in itertools.product(
            settings.members[::-1], RULES, stacks
        )
        # A single member has nothing to be compared with: no rule restarts it.
        if members > 1 or rule == "hasty"
    ]


def run(settings: RestartSettings, task: Task, watch: Watch) -> list[Row]:
    s, members, seeds = settings, task["members"], task["seeds"]
    randoms = [np.random.default_rng([seed, members]) for seed in seeds]
    tested = s.every if task["rule"] == "hasty" else s.period

    def draw(reach: float, *shape: int) -> np.ndarray:
        """Uniform numbers; those of each seed by its own generator, along axis 0."""
        drawn = [r.uniform(-reach, reach, shape) for r in randoms]
        return np.concatenate(drawn).astype(np.float32)

    a = draw(s.reach, s.repetitions, members)
    cost, gradient, age = np.zeros_like(a), np.zeros_like(a), np.zeros_like(a)
    restarts, shares = np.zeros(len(a)), []
    marks = set(np.linspace(0, s.steps, 21).astype(int)[1:].tolist())
    for step in range(1, s.steps + 1):
        if (step - 1) % 1000 == 0:
            x_block = draw(3.0, s.repetitions, 1000)
            watch.progress(step / s.steps)
        x = x_block[:, (step - 1) % 1000, None]  # pyright: ignore[reportPossiblyUnboundVariable]
        a, slope, error = moved(s, a, x)
        cost += s.memory * (error * error / 2 - cost)
        gradient += s.memory * (slope - gradient)
        age += 1
        if step % tested == 0:
            fresh = draw(s.reach, s.repetitions, members)
            leaving = unfit(s, cost, gradient, age)
            a = np.where(leaving, fresh, a)
            for state in (cost, gradient, age):
                state[leaving] = 0
            restarts += leaving.sum(1)
        if step in marks:
            shares.append(_successes(s, a, cost, age).reshape(len(seeds), -1).mean(1))
    history = np.stack(shares, axis=1)
    ends = restarts.reshape(len(seeds), -1).mean(1)
    return [
        {
            "members": members,
            "rule": task["rule"],
            "seed": seed,
            "share": float(history[i, -1]),
            "history": [round(float(v), 3) for v in history[i]],
            "restarts": float(ends[i]),
        }
        for i, seed in enumerate(seeds)
    ]


def moved(
    s: RestartSettings, a: np.ndarray, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """After a step of SGD, with the gradient and error there were before it."""
    ax = a * x
    error = np.sin(ax) - np.sin(2 * x)
    slope = error * np.cos(ax) * x
    return np.clip(a - s.rate * slope, -s.reach, s.reach), slope, error


def unfit(
    s: RestartSettings, cost: np.ndarray, gradient: np.ndarray, age: np.ndarray
) -> np.ndarray:
    """Those that have converged and are worse than the best by the margin."""
    cost, gradient = _corrected(s, cost, age), _corrected(s, gradient, age)
    old = age > s.youth
    best = np.where(old, cost, np.inf).min(1, keepdims=True)
    return old & (np.abs(gradient) < s.flat) & (cost > best + s.margin)


def _successes(
    s: RestartSettings, a: np.ndarray, cost: np.ndarray, age: np.ndarray
) -> np.ndarray:
    """Whether the member of the least mean cost is at the optimum."""
    old = np.where(age > s.youth, _corrected(s, cost, age), np.inf)
    best = a[np.arange(len(a)), old.argmin(1)]
    return np.abs(best - 2) < s.close


def _corrected(s: RestartSettings, mean: np.ndarray, age: np.ndarray) -> np.ndarray:
    """A running mean that started at zero, over the weight it has by now."""
    return mean / np.maximum(1 - (1 - s.memory) ** age, s.memory)


def judge(settings: RestartSettings, rows: Sequence[Row], expected: int) -> Verdict:
    claims = [_difference(rows, (2, rule), (1, "hasty"), 0.0) for rule in RULES] + [
        _difference(rows, (4, rule), (2, rule), 0.0) for rule in RULES
    ]
    if 8 in settings.members:
        # Eight can be no better than four that always find it.
        claims += [_difference(rows, (8, rule), (4, rule), -0.05) for rule in RULES]
    claims.append(_difference(rows, (4, "hasty"), (4, "clocked"), 0.0))
    claims += [_above_loners(rows, m) for m in (2, 4)]
    found = {
        (m, rule): mean_and_spread(list(_shares(rows, m, rule).values()))
        for m in settings.members
        for rule in RULES
    }
    lines = ["| members | clocked | hasty | restarts, clocked | hasty |"]
    lines.append("|---|---|---|---|---|")
    for m in settings.members:
        restarts = [
            mean_and_spread(
                [r["restarts"] for r in rows if (r["members"], r["rule"]) == (m, rule)]
            )
            for rule in RULES
        ]
        clocked = found[m, "clocked"] if m > 1 else ""
        lines.append(
            f"| {m} | {clocked} | {found[m, 'hasty']} | {' | '.join(restarts)} |"
        )
    cells = [f"1: {found[1, 'hasty']}"]
    cells += [
        f"{m}: {found[m, 'clocked']}, {found[m, 'hasty']}" for m in settings.members[1:]
    ]
    n = len(_shares(rows, 4, "hasty"))
    return decide(
        claims,
        found=len(rows),
        expected=expected,
        table="\n".join(lines),
        short=f"members: clocked, hasty: {'; '.join(cells)}; n {n} of "
        f"{settings.repetitions}",
    )


def _above_loners(rows: Sequence[Row], members: int) -> Claim:
    """Clocked members together against as many that never restart, any one of them."""
    alone = list(_shares(rows, 1, "hasty").values())
    by_luck = 1 - (1 - float(np.mean(alone or [0.0]))) ** members
    together = _shares(rows, members, "clocked").values()
    return Claim(
        f"success, {members} clocked less {members} on their own ({by_luck:.2f})",
        [share - by_luck for share in together],
        low=0.0,
    )


def _shares(rows: Sequence[Row], members: int, rule: str) -> dict[int, float]:
    return {
        r["seed"]: r["share"]
        for r in rows
        if r["members"] == members and r["rule"] == rule
    }


def _difference(
    rows: Sequence[Row], more: tuple[int, str], less: tuple[int, str], low: float
) -> Claim:
    """That the first of two arms succeeds more often, seed by seed."""
    first, second = _shares(rows, *more), _shares(rows, *less)
    names = [f"{m} {rule}" if m > 1 else "1" for m, rule in (more, less)]
    return Claim(
        f"success, {names[0]} less {names[1]}",
        [first[s] - second[s] for s in first if s in second],
        low,
    )


def draw(settings: RestartSettings, rows: Sequence[Row]) -> plots.Figure:
    fig, axes = plots.figure(2)
    colours = dict(zip(RULES, plots.colours(3)[:2], strict=True))
    ax = axes[0, 0]
    for rule, mark in zip(RULES, plots.MARKERS, strict=False):
        values = [
            list(_shares(rows, m, rule if m > 1 else "hasty").values())
            for m in settings.members
        ]
        plots.with_spread(
            ax, settings.members, values, label=rule, color=colours[rule], marker=mark
        )
    ax.set_xscale("log", base=2)
    plots.few_ticks(ax, settings.members)
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("members")
    ax.set_ylabel("share of repetitions that find a = 2")
    ax.set_title(f"after {settings.steps:,} samples".replace(",", " "))
    ax.legend(frameon=False, loc="lower right")
    ax = axes[0, 1]
    lines = {2: ":", 4: "-", 8: "--"}
    for (m, style), rule in itertools.product(lines.items(), RULES):
        own = [r["history"] for r in rows if (r["members"], r["rule"]) == (m, rule)]
        if own:
            steps = np.linspace(0, settings.steps, len(own[0]) + 1)[1:] / 1000
            ax.plot(
                steps,
                np.mean(own, axis=0),
                style,
                color=colours[rule],
                label=f"{m} {rule}",
            )
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("samples seen, thousands")
    ax.set_title("on the way, mean over seeds")
    ax.legend(frameon=False, ncols=3, loc="lower right")
    n = len({r["seed"] for r in rows})
    plots.caption(
        fig,
        "More members find the global minimum more often, and sooner if each decides "
        "for itself",
        f"sin(ax) fitted to sin(2x), a in ±{settings.reach:g}, μ = {settings.rate:g}, "
        f"τ = {settings.memory:g}, margin {settings.margin:g}; clocked: tested every "
        f"{settings.period} steps, hasty: every {settings.every}. Bars: standard "
        f"deviation over {n} seeds of {settings.repetitions} repetitions each; faint: "
        "each seed.",
    )
    return fig


def nulls(rows: Sequence[Row], seed: int) -> Mapping[str, list[Row]]:
    random = np.random.default_rng(seed)
    shares = random.permutation([r["share"] for r in rows])
    return {
        "outcomes permuted over members and rules": [
            {**r, "share": float(v)} for r, v in zip(rows, shares, strict=True)
        ],
        "the two rules exchanged": [
            {**r, "rule": RULES[r["rule"] == "clocked"]} if r["members"] > 1 else r
            for r in rows
        ],
    }


EXPERIMENT = Experiment(
    id="congregation",
    paper="congregational gradient descent (Blackmore, Williamson, Mareels, Sethares)",
    claim=(
        "A congregation finds the global minimum more often than as many members on "
        "their own, and more often if tested all the time (hasty) than on a clock."
    ),
    folder="congregation",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    minutes={"quick": 0.1},
    nulls=nulls,
    exploratory=(
        "All parameters are our choice, made in trials; which of the two rules "
        "wins by how much depends on the clock's period."
    ),
)
