"""Where C = H ends: the gradients' covariance beside the Hessian along training.

With labels that the network's own probabilities would draw, the uncentred second moment
of the gradients of the cross-entropy is the Gauss-Newton matrix, and near that C = H.
Real labels agree with the network more and more, and gradients vanish as p - y while
curvature vanishes as p (1 - p).

A ReLU MLP is trained by SGD on the cross-entropy. When its train loss first is below
each rung, on the same training samples: tr C / tr H, v'Cv / lambda_1 along the top
eigenvector v of H, and the overlap of the spaces of the top k eigenvectors of C and H,
|U'V|_F^2 / k, 1 for one space. C is the centred covariance, by `fm.GradientCovariance`
and `fm.GradientProbe`; tr of the uncentred one is beside it.

Criteria, by the mean over seeds:
1. at train loss 1 tr C / tr H and v'Cv / lambda_1 lie within .5 … 2;
2. at the last rung both are below .5: C = H has ended;
3. tr C / tr H falls with the loss: its slope is positive, log on log over the rungs.
The loss at which each ratio leaves .5 … 2, and the overlap, are reported without a
criterion: no value was known to ask for.

Nulls: the rungs of every run in reverse, and in random order.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastminima as fm
from examples.common import data, measures, plots
from examples.common.seedwise import chunks
from examples.common.stacks import Stack
from examples.common.training import Orders, minibatches, train_steps
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "compare", "leaving_loss"]

KEPT = (0.5, 2.0)
FIRST = 1.0
RATIOS = ("trace", "along", "overlap")
# Steps between two looks at the train loss.
LOOK = 16


@dataclass(frozen=True)
class CovarianceEnd(Settings):
    """What is trained, and when it is measured.

    Attributes:
        samples: training samples; `measured` of them are measured on.
        pool, skip: of `data.prepared`.
        hidden: units of each hidden layer.
        rungs: train losses, falling.
        space: top eigenvectors whose span is compared.
        products: of each estimate of a trace.
    """

    samples: int = 2048
    measured: int = 1024
    pool: int = 2
    skip: int = 6048
    hidden: tuple[int, ...] = (50, 50)
    rate: float = 0.05
    batch_size: int = 16
    rungs: tuple[float, ...] = (1.0, 0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05, 0.02, 0.01)
    most_epochs: int = 150
    space: int = 5
    products: int = 24
    chunk: int = 3


def settings(preset: str, dataset: str) -> CovarianceEnd:
    small = {"pool": 1, "skip": 0, "samples": 1200, "measured": 600}
    fits: dict[str, Any] = small if dataset == "digits" else {}
    if preset == "quick":
        fits |= {"samples": 512, "measured": 256, "rungs": (1.0, 0.5, 0.25, 0.1, 0.03)}
        fits |= {"hidden": (32,), "rate": 0.1, "most_epochs": 100, "products": 18}
        return CovarianceEnd(preset, dataset, tuple(range(100, 105)), chunk=5, **fits)
    if preset == "laptop":
        return CovarianceEnd(preset, dataset, tuple(range(110, 116)), **fits)
    if dataset != "digits":
        fits |= {"samples": 20_000, "measured": 4096, "pool": 1, "hidden": (200,) * 3}
    fits |= {"space": 10, "products": 60}
    return CovarianceEnd(preset, dataset, tuple(range(110, 120)), **fits)


def tasks(end: CovarianceEnd) -> list[Task]:
    return [{"seeds": seeds} for seeds in chunks(end.seeds, end.chunk)]


def run(end: CovarianceEnd, task: Task, watch: Watch) -> list[Row]:
    """Train a stack, and compare C with H when a replica gets to a rung."""
    x, y = data.prepared(
        end.dataset, end.samples, 1, seed=2026, pool=end.pool, skip=end.skip
    ).train
    x = x.flatten(1)
    seeds = task["seeds"]
    stack = Stack.drawn((x.shape[1], *end.hidden, int(y.max()) + 1), seeds)
    orders = Orders(seeds, len(x))
    rates = torch.full((len(seeds),), end.rate)
    part = (x[: end.measured], y[: end.measured])
    found: list[list[Row]] = [[] for _ in seeds]
    for epoch in range(end.most_epochs):
        batches = list(minibatches(orders, end.batch_size))
        for start in range(0, len(batches), LOOK):
            for at, loss in enumerate(stack.mean_loss(x, y).tolist()):
                mine = found[at]
                if len(mine) < len(end.rungs) and loss <= end.rungs[len(mine)]:
                    here = {"loss": loss, "epochs": epoch + start / len(batches)}
                    here |= compare(end, stack.module(at), part)
                    while len(mine) < len(end.rungs) and loss <= end.rungs[len(mine)]:
                        mine.append(here)
            done = min(map(len, found))
            watch.progress(max(done / len(end.rungs), epoch / end.most_epochs))
            if done == len(end.rungs):
                return _rows(end, seeds, found)
            train_steps(stack, x, y, rates, iter(batches[start : start + LOOK]))
    return _rows(end, seeds, found)


def compare(
    end: CovarianceEnd, model: nn.Module, batch: tuple[Tensor, Tensor]
) -> dict[str, float | None]:
    """C against H of one network: traces, the top direction, the top spaces.

    What rests on eigenvectors is None where they did not converge.
    """
    hessian = fm.Hessian(model, measures.cross_entropy_loss, batch)
    covariance = fm.GradientCovariance(model, _losses, batch)
    trace = float(fm.trace(hessian, products=end.products).value)
    noise = measures.gradient_noise(fm.GradientProbe(model), model, batch)
    centred, count = float(noise.covariance_trace), len(batch[1])
    second = centred * (count - 1) / count + float(noise.mean_grad_sq_norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # converged is read
        of_h, of_c = (
            fm.top_eigenpairs(matrix, k=end.space, rtol=0.03, max_products=400)
            for matrix in (hessian, covariance)
        )
    top = of_h.vectors[0]
    overlap = (of_h.vectors @ of_c.vectors.T).square().sum() / end.space
    along = top @ (covariance @ top) / of_h.values[0]
    return {
        "trace": centred / trace,
        "trace_uncentred": second / trace,
        "along": float(along) if of_h.converged else None,
        "overlap": float(overlap) if of_h.converged and of_c.converged else None,
        "lambda_max": float(of_h.values[0]),
    }


def _losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _rows(end: CovarianceEnd, seeds: list[int], found: list[list[Row]]) -> list[Row]:
    """A row a seed, with a list over rungs of each number; None beyond the last."""
    rows = []
    for seed, mine in zip(seeds, found, strict=True):
        row: Row = {"seed": seed}
        for name in ("loss", "epochs", *RATIOS, "trace_uncentred", "lambda_max"):
            values = [here[name] for here in mine]
            values += [None] * (len(end.rungs) - len(mine))
            row[name] = [v if v is None else float(f"{v:.4g}") for v in values]
        rows.append(row)
    return rows


def leaving_loss(losses: Sequence[float], ratios: Sequence[float]) -> float:
    """The loss at which a ratio last leaves .5 … 2, by a line in both logarithms.

    NaN where it never was inside; 0 where it still is.
    """
    inside = [r is not None and KEPT[0] <= r <= KEPT[1] for r in ratios]
    if not any(inside):
        return math.nan
    last = max(i for i, is_inside in enumerate(inside) if is_inside)
    if last + 1 == len(ratios) or ratios[last + 1] is None:
        return 0.0
    a, b = ratios[last], ratios[last + 1]
    bound = KEPT[0] if b < KEPT[0] else KEPT[1]
    share = math.log(bound / a) / math.log(b / a) if b > 0 else 1.0
    low, high = math.log(losses[last]), math.log(losses[last + 1])
    return math.exp(low + share * (high - low))


def judge(end: CovarianceEnd, rows: Sequence[Row], expected: int) -> Verdict:
    first = end.rungs.index(FIRST)

    def at(name: str, rung: int) -> list[float]:
        return [_number(r[name][rung]) for r in rows]

    slopes = [
        float(np.polyfit(np.log(r["loss"]), np.log(r["trace"]), 1)[0])
        if None not in r["trace"]
        else math.nan
        for r in rows
    ]
    last = f"at loss {end.rungs[-1]:g}"
    claims = [
        Claim("tr C/tr H at loss 1", at("trace", first), *KEPT),
        Claim("v'Cv/λ₁ at loss 1", at("along", first), *KEPT),
        Claim(f"tr C/tr H {last}", at("trace", -1), high=KEPT[0]),
        Claim(f"v'Cv/λ₁ {last}", at("along", -1), high=KEPT[0]),
        Claim("d log(tr C/tr H) / d log(loss)", slopes, low=0.0),
    ]
    leave = [
        mean_and_spread([leaving_loss(r["loss"], r[name]) for r in rows], 2)
        for name in ("trace", "along")
    ]
    shared = [mean_and_spread(at("overlap", i), 2) for i in (first, -1)]
    short = (
        f"tr C/tr H {mean_and_spread(claims[0].values, 2)} → "
        f"{mean_and_spread(claims[2].values, 2)} from train loss 1 to "
        f"{end.rungs[-1]:g}; leaves .5 … 2 at loss {leave[0]} (trace), {leave[1]} "
        f"(v'Cv/λ₁); overlap of the top {end.space} {shared[0]} → {shared[1]}"
    )
    return decide(
        claims, found=len(rows), expected=expected, table=_table(end, rows), short=short
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _table(end: CovarianceEnd, rows: Sequence[Row]) -> str:
    names = ("trace", "trace_uncentred", "along", "overlap", "lambda_max", "epochs")
    heads = ("tr C/tr H", "uncentred", "v'Cv/λ₁", f"overlap, {end.space}", "λ₁")
    lines = ["train loss  " + "".join(f"{h:18}" for h in heads) + "epochs"]
    for at, rung in enumerate(end.rungs):
        cells = [
            mean_and_spread([_number(r[name][at]) for r in rows]) for name in names
        ]
        lines.append(f"{rung:10g}  " + "".join(f"{c:18}" for c in cells).rstrip())
    for name, words in (("trace", "tr C/tr H"), ("along", "v'Cv/λ₁")):
        found = [leaving_loss(r["loss"], r[name]) for r in rows]
        lines.append(f"{words} leaves .5 … 2 at train loss {mean_and_spread(found)}")
    return "\n".join(lines)


def draw(end: CovarianceEnd, rows: Sequence[Row]) -> Figure:
    figure, axes = plots.figure(2)
    left, right = axes[0]
    names = {
        "trace": "tr C / tr H",
        "trace_uncentred": "the same, C uncentred",
        "along": "v₁ᵀC v₁ / λ₁",
    }
    for (name, label), colour, marker in zip(
        names.items(), plots.colours(3), plots.MARKERS, strict=False
    ):
        values = [[r[name][i] for r in rows] for i in range(len(end.rungs))]
        look = {"color": colour, "marker": marker}
        plots.with_spread(left, end.rungs, values, label=label, **look)
    left.axhspan(*KEPT, color=plots.GRID, alpha=0.7, lw=0)
    left.axhline(1, color=plots.INK, lw=0.8)
    left.set_yscale("log")
    left.set(xlabel="train loss (training goes right)", ylabel="C over H")
    left.legend(loc="lower left")
    values = [[r["overlap"][i] for r in rows] for i in range(len(end.rungs))]
    plots.with_spread(right, end.rungs, values, color=plots.colours(3)[0], marker="o")
    right.set(xlabel="train loss (training goes right)", ylim=(0, 1.03))
    right.set_ylabel(f"overlap of the top {end.space} eigenvectors of C and H")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.invert_xaxis()
        plots.few_ticks(ax, end.rungs[::2])
    plots.caption(
        figure,
        "C = H holds within a factor of two early in training, and ends: with the "
        "cross-entropy gradients vanish faster than curvature.",
        f"{end.dataset}, {end.samples} samples, ReLU MLP "
        f"{'-'.join(map(str, end.hidden))}, η {end.rate:g}, S {end.batch_size}; "
        f"{len(rows)} seeds, bars: one standard deviation over them. Shaded: .5 … 2.",
    )
    return figure


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    draw_ = random.Random(seed)

    def changed(how: Callable[[list], list]) -> list[Row]:
        return [{**r, **{name: how(r[name]) for name in RATIOS}} for r in rows]

    return {
        "training in reverse": changed(lambda values: values[::-1]),
        "rungs at random": changed(lambda values: draw_.sample(values, len(values))),
    }


EXPERIMENT = Experiment(
    id="c-against-h",
    paper="Luo & Wang 2020",
    claim="The gradients' covariance C is the Hessian H to a factor of two early in "
    "training, and no longer late.",
    folder="noise_and_sharpness",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    datasets=("fashion-mnist", "digits"),
    # Half of the clock of one worker, beside other work.
    nulls=nulls,
)
