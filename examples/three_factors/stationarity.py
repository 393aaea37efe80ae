"""Yaida's fluctuation-dissipation relations on a network at stationarity.

If SGD at a constant rate is stationary, then for any observable its mean does not
change in a step, whatever the loss looks like. Of |theta|^2 and of the loss itself:

    <theta . grad L> = eta/2 <tr C~>,
    <|grad L|^2>     = eta/2 <tr(H C~)> + O(eta^2),

C~ the second moment of the mini-batch gradient, grad L and H of all samples. The loss
is the cross-entropy with weight decay, which makes SGD stationary; samples of a batch
are drawn with replacement, independently of the past.

Left sides are measured by full-batch gradients; tr C~ = |grad L|^2 + tr Sigma / S by
`fm.GradientProbe` over all samples; tr(H C~) by Hessian products along gradients of
mini-batches of size S drawn for the measurement. None of them is one of training's own
steps: with those the first relation would hold by algebra.

Criteria, by seed, of ratios of right to left side, means over the second half:
1. the first is within .9 … 1.1;
2. the second is within .9 … 1.1;
3. over the first 200 steps of training the first is below .8: it is not an identity;
4. with C~ of batches four times as large it is below .8: it is this noise that counts.

Nulls: measured at the start; C~ of another batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastminima as fm
from examples.common import data, measures, plots
from examples.common.second_order import grads_and_products, inner
from examples.common.seedwise import chunks
from examples.common.stacks import Stack, cross_entropy, sgd_step
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "sides"]

# How much larger the batch is whose C~ serves as the null.
OTHER = 4
NAMES = ("dot", "trace", "trace_other", "sq_norm", "curved", "loss")


@dataclass(frozen=True)
class Stationarity(Settings):
    """What is trained, and when it is measured.

    Attributes:
        samples: N, all of which the full-batch quantities are of.
        pool, skip: of `data.prepared`.
        hidden: units of each hidden layer.
        decay: lambda of the loss's lambda |theta|^2 / 2; memory of |theta|^2 lasts for
            1 / (2 eta lambda) steps.
        start: steps that count as the start.
        burn_in: steps not looked at.
        steps: those after it, over which is averaged.
        every: steps between two measurements.
        draws: mini-batches of one measurement of tr(H C~).
    """

    samples: int = 512
    pool: int = 2
    skip: int = 6048
    hidden: tuple[int, ...] = (16,)
    rate: float = 0.05
    batch_size: int = 8
    decay: float = 0.02
    start: int = 200
    burn_in: int = 10_000
    steps: int = 30_000
    every: int = 50
    draws: int = 4
    chunk: int = 3


def settings(preset: str, dataset: str) -> Stationarity:
    fits: dict[str, Any] = {"pool": 1, "skip": 0} if dataset == "digits" else {}
    if preset == "quick":
        fits |= {"samples": 256, "burn_in": 2500, "steps": 5000, "every": 40}
        fits |= {"chunk": 5, "draws": 3}
        return Stationarity(preset, dataset, tuple(range(100, 105)), **fits)
    if preset == "laptop":
        return Stationarity(preset, dataset, tuple(range(110, 116)), **fits)
    fits |= {"samples": 4096 if dataset != "digits" else 1600, "hidden": (100, 100)}
    fits |= {"burn_in": 50_000, "steps": 200_000, "every": 100, "draws": 8}
    return Stationarity(preset, dataset, tuple(range(110, 120)), **fits)


def tasks(s: Stationarity) -> list[Task]:
    return [{"seeds": seeds} for seeds in chunks(s.seeds, s.chunk)]


def run(s: Stationarity, task: Task, watch: Watch) -> list[Row]:
    """Train a stack, and average both sides at its start and in its stationary part."""
    x, y = data.prepared(
        s.dataset, s.samples, 1, seed=2026, pool=s.pool, skip=s.skip
    ).train
    x = x.flatten(1)
    seeds = task["seeds"]
    stack = Stack.drawn((x.shape[1], *s.hidden, int(y.max()) + 1), seeds)
    draws = [torch.Generator().manual_seed(s_) for s_ in seeds]
    apart = [torch.Generator().manual_seed(10_000 + s_) for s_ in seeds]
    rates = torch.full((len(seeds),), s.rate)
    early: list[dict[str, Tensor]] = []
    found: list[dict[str, Tensor]] = []
    whole = s.burn_in + s.steps
    for step in range(whole):
        if step < s.start and step % max(1, s.start // 10) == 0:
            early.append(sides(s, stack, x, y, apart))
        elif step >= s.burn_in and step % s.every == 0:
            found.append(sides(s, stack, x, y, apart))
            watch.progress(step / whole)
        index = _drawn(draws, len(x), s.batch_size)
        grads = stack.grads(cross_entropy(stack(x[index]), y[index]))
        with torch.no_grad():
            for g, p in zip(grads, stack.params, strict=True):
                g.add_(p, alpha=s.decay)
        sgd_step(stack.params, grads, rates)
    return [_row(s, seed, at, early, found) for at, seed in enumerate(seeds)]


def _drawn(draws: Sequence[torch.Generator], samples: int, size: int) -> Tensor:
    """Indices [replicas, batch], with replacement."""
    return torch.stack([torch.randint(samples, (size,), generator=g) for g in draws])


def sides(
    s: Stationarity,
    stack: Stack,
    x: Tensor,
    y: Tensor,
    draws: Sequence[torch.Generator],
) -> dict[str, Tensor]:
    """Both sides of both relations at one moment, less eta/2, each [replicas].

    "dot" theta . grad L, "trace" tr C~ and "trace_other" that of larger batches,
    "sq_norm" |grad L|^2, "curved" an unbiased estimate of tr(H C~), and the "loss".
    """
    params = [p.detach() for p in stack.params]
    labels = y.expand(len(stack), -1)

    def decayed(grads: Sequence[Tensor]) -> list[Tensor]:
        return [g + s.decay * p for g, p in zip(grads, params, strict=True)]

    losses = cross_entropy(stack(x[None]), labels)
    full = decayed(stack.grads(losses))
    curved = torch.zeros(len(stack))
    for _ in range(s.draws):
        index = _drawn(draws, len(x), s.batch_size)
        batch = decayed(stack.grads(cross_entropy(stack(x[index]), y[index])))
        again = cross_entropy(stack(x[None]), labels)
        _, products = grads_and_products(stack, again, batch)
        of_decay = s.decay * inner(batch, batch)
        curved += (inner(batch, products) + of_decay) / s.draws
    noise = torch.tensor(
        [_covariance_trace(stack, at, x, y) for at in range(len(stack))]
    )
    # The samples are all there are: the population's variance, not the unbiased one.
    noise *= (len(x) - 1) / len(x)
    sq_norm = inner(full, full)
    decay = s.decay / 2 * inner(params, params)
    return {
        "dot": inner(params, full),
        "trace": sq_norm + noise / s.batch_size,
        "trace_other": sq_norm + noise / (OTHER * s.batch_size),
        "sq_norm": sq_norm,
        "curved": curved,
        "loss": losses.detach().mean(dim=1) + decay,
    }


def _covariance_trace(stack: Stack, at: int, x: Tensor, y: Tensor) -> float:
    model = stack.module(at)
    noise = measures.gradient_noise(fm.GradientProbe(model), model, (x, y))
    return float(noise.covariance_trace)


def _row(
    s: Stationarity,
    seed: int,
    at: int,
    early: Sequence[dict[str, Tensor]],
    found: Sequence[dict[str, Tensor]],
) -> Row:
    row: Row = {"seed": seed}
    for name in NAMES:
        values = torch.stack([f[name][at] for f in found]).double()
        # The rates' halves, and the means of tenths of the time, which show a drift.
        factor = s.rate / 2 if name in ("trace", "trace_other", "curved") else 1.0
        row[name] = [
            float(f"{factor * float(part.mean()):.5g}")
            for part in values.tensor_split(10)
        ]
        start = torch.stack([f[name][at] for f in early]).mean()
        row[f"{name}_start"] = float(f"{factor * float(start):.5g}")
    return row


def _first(row: Row, right: str = "trace") -> float:
    return float(np.mean(row[right]) / np.mean(row["dot"]))


def _second(row: Row) -> float:
    return float(np.mean(row["curved"]) / np.mean(row["sq_norm"]))


def _at_start(row: Row) -> float:
    return row["trace_start"] / row["dot_start"]


def judge(s: Stationarity, rows: Sequence[Row], expected: int) -> Verdict:
    claims = [
        Claim("½η⟨tr C̃⟩ / ⟨θ·∇L⟩", [_first(r) for r in rows], 0.9, 1.1, digits=3),
        Claim("½η⟨tr HC̃⟩ / ⟨|∇L|²⟩", [_second(r) for r in rows], 0.9, 1.1, digits=3),
        Claim("the first at the start", [_at_start(r) for r in rows], high=0.8),
        Claim(
            f"the first, C̃ of {OTHER} S",
            [_first(r, "trace_other") for r in rows],
            high=0.8,
        ),
    ]
    first, second, start, other = (mean_and_spread(c.values) for c in claims)
    short = (
        f"½η⟨tr C̃⟩/⟨θ·∇L⟩ {first}, ½η⟨tr HC̃⟩/⟨|∇L|²⟩ {second}; the first at the "
        f"start {start}, with C̃ of {OTHER} S {other}"
    )
    return decide(
        claims, found=len(rows), expected=expected, table=_table(s, rows), short=short
    )


def _table(s: Stationarity, rows: Sequence[Row]) -> str:
    lines = [
        "seed     θ·∇L  η/2 trC̃   ratio  start    4 S     |∇L|²  η/2 trHC̃  ratio   loss"
    ]
    for r in rows:
        mean = {name: float(np.mean(r[name])) for name in NAMES}
        lines.append(
            f"{r['seed']:4d}   {mean['dot']:8.3g}  {mean['trace']:8.3g}  "
            f"{_first(r):6.3f} {_at_start(r):6.3f} {_first(r, 'trace_other'):6.3f}  "
            f"{mean['sq_norm']:8.3g}  {mean['curved']:8.3g}  {_second(r):6.3f}   "
            f"{mean['loss']:.3f}"
        )
    return "\n".join(lines)


def draw(s: Stationarity, rows: Sequence[Row]) -> Figure:
    figure, axes = plots.figure(2)
    for ax, left, right, words in (
        (axes[0, 0], "dot", "trace", ("⟨θ·∇L⟩", "½η⟨tr C̃⟩")),
        (axes[0, 1], "sq_norm", "curved", ("⟨|∇L|²⟩", "½η⟨tr(H C̃)⟩")),
    ):
        ends = []
        here, start = plots.colours(3)[:2]
        for r in rows:
            x, y = np.array(r[left]), np.array(r[right])
            ax.plot(x, y, ".", ms=3, alpha=0.35, color=here)
            ax.errorbar(
                x.mean(),
                y.mean(),
                y.std(ddof=1),
                x.std(ddof=1),
                "o",
                ms=4,
                color=here,
                elinewidth=0.8,
                label="stationary" * (r is rows[0]) or None,
            )
            at_start = (r[f"{left}_start"], r[f"{right}_start"])
            ax.plot(
                *at_start,
                "s",
                ms=4,
                color=start,
                label="start of training" * (r is rows[0]) or None,
            )
            ends += [*x, *y, *at_start]
        span = [0.8 * min(ends), 1.2 * max(ends)]
        ax.plot(span, span, "--", color=plots.INK, lw=1, label="equal")
        plots.log_axis(ax, "x")
        plots.log_axis(ax, "y")
        ax.set(xlabel=words[0], ylabel=words[1])
        ax.legend()
    plots.caption(
        figure,
        "Both sides of Yaida's relations: equal at stationarity, far from it early in "
        "training.",
        f"{s.dataset}, N = {s.samples}, MLP {'-'.join(map(str, s.hidden))}, η "
        f"{s.rate:g}, S {s.batch_size}, weight decay {s.decay:g}; {len(rows)} seeds, "
        f"means over {s.steps} steps; small points are tenths of them, bars their "
        "standard deviation.",
    )
    return figure


def nulls(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    early = [{**r, **{n: [r[f"{n}_start"]] for n in NAMES}} for r in rows]
    other = [{**r, "trace": r["trace_other"]} for r in rows]
    return {"measured at the start": early, "C of another batch size": other}


EXPERIMENT = Experiment(
    id="yaida",
    paper="Yaida 2018",
    claim="At stationarity ⟨θ·∇L⟩ = ½η⟨tr C̃⟩ and ⟨|∇L|²⟩ = ½η⟨tr(H C̃)⟩ of the "
    "mini-batch gradient's second moment.",
    folder="three_factors",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    datasets=("fashion-mnist", "digits"),
    # Half of the clock of one worker, beside other work.
    nulls=nulls,
)
