"""F6: how far (beta eta, beta S) goes: where the ratio stops to be all that counts.

Criteria, fixed before the run on a new split and new seeds. Values are paired by seed,
accuracy is of validation, at equal epochs; chance for a network that diverged:

1. for each N, over the beta > 1 at which the mean eta lambda_max after the first epoch
   is below 1: the mean accuracy is within .01 of that at beta = 1;
2. for each N: at the largest beta it is more than .03 below that at beta = 1;
3. the drop comes half a doubling to two and a half doublings of beta after the
   eta lambda_max of the first epoch reaches 2, not at it. The drop: where accuracy is
   .03 below that at beta = 1; both places are interpolated in log beta, and the mean
   over N is the value of a seed;
4. the drop comes at a smaller beta for the smaller N, at the same number of epochs.

Equal epochs are few updates for a large beta. So every network trains on to the same
number of updates as well, and what is there at equal updates stands beside it: there a
drop is not for want of updates. It is reported, not judged; small beta have not trained
for long there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastminima as fm
import fastminima.theory
from examples.common import data, plots
from examples.common.measures import cross_entropy_loss
from examples.common.seedwise import chunks
from examples.common.stacks import Stack
from examples.common.tables import aligned
from examples.common.training import Orders, minibatches, train_steps
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

from .large import train_large
from .small import (
    CLASSES,
    DIVERGED,
    TRAINED,
    UNTRAINED,
    Samples,
    samples,
    standing,
    status_of,
)

__all__ = ["EXPERIMENT", "Breakdown"]

CLOSE, DROP = 0.01, 0.03
# eta lambda_max: still the small-step regime below the first, unstable at the second.
SMALL_STEP, EDGE = 1.0, 2.0
DOUBLINGS = (0.5, 2.5)


@dataclass(frozen=True)
class Breakdown(Settings):
    """Network, data, and the grid (learning_rate * beta, batch_size * beta).

    Attributes:
        network: "mlp", or one of `networks.NETWORKS`.
        sizes: of the training set, N.
        epochs: the equal ones.
        updates: the equal ones.
        betas: powers of 2 from 1 on.
        measured: training samples that curvature is measured on.
        eigenvalues: how many of the largest go into the edge of stability.
        chunk: seeds in one task.
    """

    network: str = "mlp"
    sizes: tuple[int, ...] = (1024, 4096)
    validation: int = 4000
    split_seed: int = 2026
    skip: int = 6048
    pool: int = 2
    hidden: tuple[int, ...] = (50, 50)
    learning_rate: float = 0.01
    batch_size: int = 4
    betas: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    epochs: int = 12
    updates: int = 960
    measured: int = 1024
    eigenvalues: int = 10
    chunk: int = 6


def settings(preset: str, dataset: str) -> Breakdown:
    """The preset's; digits have samples of their own."""
    digits = {"sizes": (360, 1440), "validation": 357} if dataset == "digits" else {}
    if preset == "quick":
        return Breakdown(
            preset,
            dataset,
            (100, 101, 102),
            sizes=(256, 1024),
            validation=357,
            betas=(1, 8, 64),
            epochs=3,
            updates=48,
            measured=256,
            eigenvalues=3,
            chunk=3,
        )
    if preset == "laptop":
        return Breakdown(preset, dataset, tuple(range(100, 112)), **digits)
    return Breakdown(
        preset,
        dataset,
        (100, 101, 102),
        network="vgg11",
        sizes=(12_000, 22_500, 45_000),
        validation=5_000,
        split_seed=777,
        skip=0,
        pool=1,
        learning_rate=0.1,
        batch_size=50,
        betas=(1, 2, 3, 4, 5, 7, 9, 11, 13, 15),
        epochs=100,
        updates=0,
        chunk=1,
    )


def tasks(settings: Breakdown) -> list[Task]:
    """Some seeds at one N and beta each, those with the most updates first."""
    return [
        {"samples": n, "beta": beta, "seeds": seeds}
        for n in sorted(settings.sizes, reverse=True)
        for beta in settings.betas
        for seeds in chunks(settings.seeds, settings.chunk)
    ]


def run(settings: Breakdown, task: Task, watch: Watch) -> list[Row]:
    """Train the seeds of a task, to equal epochs and to equal updates."""
    if settings.network == "mlp":
        return _run_mlp(settings, task, watch)
    return [_run_large(settings, task, seed, watch) for seed in task["seeds"]]


def _run_large(settings: Breakdown, task: Task, seed: int, watch: Watch) -> Row:
    """To equal epochs; the smaller training sets are the beginnings of the largest."""
    n, beta = task["samples"], task["beta"]
    whole = data.prepared(
        settings.dataset, max(settings.sizes), settings.validation, settings.split_seed
    )
    x, y = whole.train
    row: Row = _row(settings, n, beta, seed)

    def measure(model: torch.nn.Module, part: tuple[Tensor, Tensor]) -> dict[str, Any]:
        return _edge(model, part, row, "now", settings.eigenvalues)

    history = train_large(
        settings.network,
        data.Split((x[:n], y[:n]), whole.validation),
        seed,
        watch,
        measure,
        measured=min(n, settings.measured),
        rate=row["learning_rate"],
        batch_size=row["batch_size"],
        epochs=settings.epochs,
        measured_samples=5000,
    )
    start, *rest = history.points
    first, last = rest[:1], rest[-1] if rest else start
    died = history.status == DIVERGED
    row |= {"status": history.status, "epochs_status": history.status}
    row |= {"start_loss": start["train_loss"], "epochs_train_loss": last["train_loss"]}
    row["epochs_accuracy"] = 1 / CLASSES if died else last["validation_accuracy"]
    row["first_eta_lambda"] = first[0].get("now_eta_lambda") if first else None
    names = ("now_eta_lambda", "stability_ratio", "critical_rate")
    row |= {
        n.replace("now", "epochs"): last[n] for n in names if n in last and not died
    }
    return row


def _row(settings: Breakdown, n: int, beta: float, seed: int) -> Row:
    return {
        "samples": n,
        "beta": beta,
        "learning_rate": settings.learning_rate * beta,
        "batch_size": round(settings.batch_size * beta),
        "seed": seed,
    }


def _run_mlp(settings: Breakdown, task: Task, watch: Watch) -> list[Row]:
    n, beta, seeds = task["samples"], task["beta"], task["seeds"]
    whole = samples(
        settings.dataset,
        max(settings.sizes),
        settings.validation,
        seed=settings.split_seed,
        skip=settings.skip,
        pool=settings.pool,
    )
    sample = (whole[0][:n], whole[1][:n], *whole[2:])
    stack = Stack.drawn((sample[0].shape[1], *settings.hidden, CLASSES), seeds)
    start = stack.mean_loss(*sample[:2]).tolist()
    rows = [
        _row(settings, n, beta, seed) | {"start_loss": start[r]}
        for r, seed in enumerate(seeds)
    ]
    rate, size = rows[0]["learning_rate"], rows[0]["batch_size"]
    # Where to look, in updates; an epoch is as many as have a whole batch.
    per_epoch = n // size
    looks = {
        "first": per_epoch,
        "epochs": per_epoch * settings.epochs,
        "updates": settings.updates,
    }
    last, done = max(looks.values()), 0
    batches = _endless(Orders(seeds, n), size)
    for until in sorted({0, *looks.values(), *range(0, last, 64)}):
        x, y = sample[:2]
        rates = torch.full((len(stack),), rate)
        done += train_steps(stack, x, y, rates, islice(batches, until - done))
        watch.progress(done / last)
        for name in [name for name, at in looks.items() if at == until and at]:
            _look(settings, name, stack, sample, rows)
    for row in rows:
        row["status"] = row["epochs_status"]
    return rows


def _endless(orders: Orders, batch_size: int) -> Iterator[Tensor]:
    while True:
        yield from minibatches(orders, batch_size)


def _look(
    settings: Breakdown,
    name: str,
    stack: Stack,
    sample: Samples,
    rows: Sequence[Row],
) -> None:
    """Add to each replica's row how it stands; curvature of those that have trained."""
    found = standing(stack, sample)
    part = sample[0][: settings.measured], sample[1][: settings.measured]
    for r, row in enumerate(rows):
        loss, right = found["train_loss"][r], found["train_accuracy"][r]
        status = status_of(row["start_loss"], loss, right)
        row[f"{name}_status"] = status
        row[f"{name}_train_loss"] = loss
        row[f"{name}_accuracy"] = (
            1 / CLASSES if status == DIVERGED else found["validation_accuracy"][r]
        )
        if math.isfinite(loss) and status != DIVERGED:
            count = settings.eigenvalues if name == "epochs" else 1
            row |= _edge(stack.module(r), part, row, name, count)


def _edge(
    module: torch.nn.Module,
    part: tuple[Tensor, Tensor],
    row: Row,
    name: str,
    count: int,
) -> dict[str, Any]:
    """eta lambda_max; of several eigenvalues K, and the rate at which it would be 1."""
    hessian = fm.Hessian(module, cross_entropy_loss, part)
    pairs = fm.top_eigenpairs(hessian, k=count, rtol=1e-2, max_products=300)
    if not (pairs.converged and bool(pairs.values[0] > 0)):
        return {}
    edge = {f"{name}_eta_lambda": row["learning_rate"] * float(pairs.values[0])}
    if count > 1:
        values, factors = pairs.values, (row["batch_size"], row["samples"])
        edge["stability_ratio"] = fm.theory.stability_ratio(
            values, row["learning_rate"], *factors
        )
        edge["critical_rate"] = fm.theory.critical_learning_rate(values, *factors)
    return edge


# By N, beta and seed.
Table = Mapping[int, Mapping[float, Mapping[int, float]]]


def judge(settings: Breakdown, rows: Sequence[Row], expected: int) -> Verdict:
    """The criteria at the head of this file."""
    accuracy = _table_of(rows, "epochs_accuracy")
    edge = _table_of(rows, "first_eta_lambda")
    claims, shorts = [], []
    drops: dict[int, dict[int, float]] = {}
    edges: dict[int, dict[int, float]] = {}
    for n in sorted(settings.sizes):
        held = _small_steps(settings, edge[n])
        name = f"N {n}: accuracy, β {_range(held)} less β 1"
        claims.append(Claim(name, _less_first(accuracy[n], held), -CLOSE, CLOSE))
        last = max(settings.betas)
        lost = [-v for v in _less_first(accuracy[n], [last])]
        claims.append(Claim(f"N {n}: lost at β {last:g}", lost, low=DROP))
        drops[n], edges[n] = _drops(accuracy[n]), _reached(edge[n])
        shorts.append(
            f"N {n}: drop at β {_beta(drops[n])}, ηλ = 2 at β {_beta(edges[n])}"
        )
    seeds = sorted(set.intersection(*(set(d) for d in drops.values())))
    after = [float(np.mean([drops[n][s] - edges[n][s] for n in drops])) for s in seeds]
    claims.append(Claim("doublings from ηλ_max = 2 to the drop", after, *DOUBLINGS))
    few, many = min(settings.sizes), max(settings.sizes)
    later = [drops[many][s] - drops[few][s] for s in seeds]
    claims.append(Claim(f"doublings from the drop of N {few} to N {many}", later, 0.0))
    shorts.append(f"{mean_and_spread(after, 2)} doublings between")
    return decide(
        claims,
        found=len(rows),
        expected=expected,
        table=_text(settings, rows),
        short="; ".join(shorts) + f" (n {len(seeds)} seeds)",
        remark=f"{_at_equal_updates(settings, rows)}{_counts(rows)}",
    )


def _table_of(rows: Sequence[Row], what: str) -> dict[int, dict[float, dict]]:
    found: dict[int, dict[float, dict[int, float]]] = {}
    for row in rows:
        group = found.setdefault(row["samples"], {}).setdefault(row["beta"], {})
        value = row.get(what)
        group[row["seed"]] = math.nan if value is None else float(value)
    return found


def _small_steps(settings: Breakdown, edge: Mapping[float, Mapping]) -> list[float]:
    """The beta above 1 at which eta lambda_max is small on average."""
    found = []
    for beta in sorted(settings.betas)[1:]:
        values = list(edge.get(beta, {}).values())
        if not values or not np.mean(values) < SMALL_STEP:
            break
        found.append(beta)
    return found


def _less_first(accuracy: Mapping[float, Mapping], betas: Sequence[float]) -> list:
    """Mean accuracy at some beta less that at the first, seed by seed."""
    first = accuracy[min(accuracy)]
    if not betas:
        return []
    return [
        float(np.mean([accuracy[b].get(seed, math.nan) for b in betas]) - first[seed])
        for seed in sorted(first)
    ]


def _drops(
    accuracy: Mapping[float, Mapping], *, best: bool = False
) -> dict[int, float]:
    """log2 of the beta at which accuracy has fallen by DROP, by seed.

    From that at the first beta; or, where small beta have not trained for long, from
    the best of the smaller ones.
    """
    betas = sorted(accuracy)
    found = {}
    for seed in accuracy[betas[0]]:
        curve = np.array([accuracy[b].get(seed, math.nan) for b in betas])
        level = np.fmax.accumulate(curve) if best else curve[0]
        lost = dict(zip(betas, (level - curve).tolist(), strict=True))
        found[seed] = _crossing(lost, DROP)
    return found


def _reached(edge: Mapping[float, Mapping]) -> dict[int, float]:
    """log2 of the beta at which eta lambda_max has risen to EDGE, by seed."""
    seeds = edge[min(edge)]
    return {
        seed: _crossing(
            {b: math.log(g.get(seed, math.nan)) for b, g in edge.items()},
            math.log(EDGE),
        )
        for seed in seeds
    }


def _crossing(values: Mapping[float, float], level: float) -> float:
    """log2 of the beta at which values first rise to a level; NaN if they do not.

    Values that are missing, as the curvature of dead networks, are passed over.
    """
    known = [(math.log2(b), v) for b, v in sorted(values.items()) if v == v]
    if known and known[0][1] >= level:
        return known[0][0]
    for (left, low), (right, high) in pairwise(known):
        if low < level <= high:
            return left + (right - left) * (level - low) / (high - low)
    return math.nan


def _range(betas: Sequence[float]) -> str:
    if not betas:
        return "none"
    return f"{betas[0]:g}" if len(betas) == 1 else f"{betas[0]:g}-{betas[-1]:g}"


def _beta(logs: Mapping[int, float]) -> str:
    known = [v for v in logs.values() if math.isfinite(v)]
    return f"{2 ** np.mean(known):.3g}" if known else "none"


def _counts(rows: Sequence[Row]) -> str:
    """How many networks diverged or never trained."""
    found = {s: sum(r["status"] == s for r in rows) for s in (DIVERGED, UNTRAINED)}
    words = {DIVERGED: "diverged", UNTRAINED: "did not train"}
    listed = " and ".join(f"{n} {words[s]}" for s, n in found.items() if n)
    return f"Of {len(rows)} networks at equal epochs {listed}." if listed else ""


def _at_equal_updates(settings: Breakdown, rows: Sequence[Row]) -> str:
    """Where accuracy drops there, from the best at a smaller beta; not judged."""
    if not settings.updates:
        return ""
    accuracy = _table_of(rows, "updates_accuracy")
    drops = {n: _beta(_drops(accuracy[n], best=True)) for n in sorted(accuracy)}
    places = ", ".join(f"{beta} (N {n})" for n, beta in drops.items())
    return f"At equal updates, not judged, the drop is at β {places}. "


def _text(settings: Breakdown, rows: Sequence[Row]) -> str:
    """A line for each N and beta."""
    lines = []
    for n in sorted(settings.sizes):
        for beta in sorted(settings.betas):
            here = [r for r in rows if r["samples"] == n and r["beta"] == beta]
            if not here:
                continue
            good = [r for r in here if r["status"] == TRAINED]
            late = [r for r in here if r.get("updates_status") == TRAINED]

            def shown(what: str, of: Sequence[Row], digits: int = 3) -> str:
                return mean_and_spread([r.get(what) for r in of], digits)

            lines.append(
                [
                    str(n),
                    f"{beta:g}",
                    f"{len(good)}/{len(here)}",
                    shown("epochs_accuracy", here),
                    shown("updates_accuracy", here),
                    shown("first_eta_lambda", here, 2),
                    shown("epochs_eta_lambda", good, 2),
                    shown("updates_eta_lambda", late, 2),
                    shown("epochs_train_loss", good, 2),
                    _median([r.get("stability_ratio") for r in good]),
                    _median([_over_critical(r) for r in good]),
                ]
            )
    head = ["N", "beta", "trained", "acc., equal epochs", "equal updates"]
    head += ["ηλ, epoch 1", "ηλ, epochs", "ηλ, updates", "train loss", "K", "η/η_c"]
    return aligned(head, lines) + (
        f"\nMean ± standard deviation over seeds; medians for K and η/η_c. "
        f"{settings.epochs} epochs; {settings.updates}\nupdates. ηλ: learning rate "
        "times λ_max. Networks that did not train have an accuracy but no\ncurvature. "
        f"K, and η over the critical rate, from the {settings.eigenvalues} largest "
        "eigenvalues at equal epochs:\na lower bound, by the theory of the squared "
        "loss."
    )


def _median(values: Sequence[float | None]) -> str:
    """Of K, which may be infinite: recorded as None."""
    known = [math.inf if v is None else v for v in values]
    return f"{np.median(known):.2g}" if known else "-"


def _over_critical(row: Row) -> float | None:
    critical = row.get("critical_rate")
    return None if critical is None else row["learning_rate"] / critical


def draw(settings: Breakdown, rows: Sequence[Row]) -> Figure:
    """Accuracy at equal epochs, at equal updates, and eta lambda_max, against beta."""
    panels = ["epochs", "updates"] if settings.updates else ["epochs"]
    figure, axes = plots.figure(len(panels) + 1)
    colours = plots.colours(len(settings.sizes))
    trained = [row for row in rows if row["status"] == TRAINED]
    names = {
        "epochs": f"equal epochs ({settings.epochs})",
        "updates": f"equal updates ({settings.updates})",
    }
    for at, n in enumerate(sorted(settings.sizes)):
        look = {"color": colours[at], "marker": plots.MARKERS[at]}
        for ax, name in zip(axes[0], panels, strict=False):
            _line(ax, rows, n, f"{name}_accuracy", f"N = {n}", **look)
        ax = axes[0, -1]
        _line(ax, rows, n, "first_eta_lambda", f"N = {n}, epoch 1", **look)
        hollow = {**look, "mfc": "white", "ls": ":"}
        _line(ax, trained, n, "epochs_eta_lambda", f"N = {n}, at the end", **hollow)
        edge = _reached(_table_of(rows, "first_eta_lambda").get(n, {1: {}}))
        known = [v for v in edge.values() if math.isfinite(v)]
        for ax in axes[0] if known else ():
            ax.axvline(2 ** np.mean(known), color=colours[at], ls="--", lw=1)
    for ax, name in zip(axes[0], panels, strict=False):
        ax.set_title(names[name])
        ax.set_ylabel("validation accuracy")
    axes[0, -1].set_title("step against curvature")
    axes[0, -1].set_ylabel("ηλ_max")
    axes[0, -1].set_yscale("log")
    axes[0, -1].set_ylim(bottom=0.05)
    plots.mark_line(axes[0, -1], EDGE, "")
    axes[0, -1].annotate("ηλ_max = 2", (1, EDGE * 1.1), fontsize=8, color="#666666")
    axes[0, -1].legend()
    axes[0, 0].legend(loc="lower left")
    for ax in axes[0]:
        ax.set_xscale("log", base=2)
        ax.set_xlabel("β")
        plots.few_ticks(ax, settings.betas)
    plots.caption(
        figure,
        "(βη, βS) does the same up to some β, and the break comes after ηλ_max has "
        "reached 2",
        f"{settings.network} on {settings.dataset}; η = {settings.learning_rate:g}β, "
        f"S = {settings.batch_size}β, {len(settings.seeds)} seeds. Dashed: the β at "
        "which ηλ_max after the first epoch reaches 2, by N. Points are seeds, lines "
        "their means, bars one standard deviation. At the end: networks that trained.",
    )
    return figure


def _line(
    ax: plots.Axes, rows: Sequence[Row], n: int, what: str, label: str, **look: Any
) -> None:
    groups = _table_of(rows, what).get(n, {})
    at = sorted(groups)
    values = [[v for v in groups[b].values() if math.isfinite(v)] for b in at]
    plots.with_spread(ax, at, values, label=label, **look)


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Rows of which the claim is false."""
    rng = np.random.default_rng(seed)
    groups: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["samples"], row["seed"]), []).append(row)
    permuted, flat, at_once = [], [], []
    for group in groups.values():
        group = sorted(group, key=lambda row: row["beta"])
        order = rng.permutation(len(group))
        first = group[0]["epochs_accuracy"]
        for row, other in zip(group, order, strict=True):
            permuted.append({**row, "epochs_accuracy": group[other]["epochs_accuracy"]})
            flat.append({**row, "epochs_accuracy": first})
            step = row.get("first_eta_lambda")
            fell = step is None or step >= EDGE
            at_once.append({**row, "epochs_accuracy": first - 0.2 * fell})
    return {
        "accuracies permuted over beta within each seed": permuted,
        "nothing drops": flat,
        "accuracy falls as ηλ_max reaches 2": at_once,
    }


EXPERIMENT = Experiment(
    id="f6",
    paper="Jastrzębski et al. 2017",
    claim=(
        "(βη, βS) gives the same accuracy up to some β and then breaks down, after "
        "ηλ_max has reached 2, and at equal epochs, not updates, earlier for smaller N."
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
    nulls=nulls,
)
