"""F1: do learning rate and batch size set the width of the minimum by their ratio?

Networks are trained over a grid of learning rates eta and batch sizes S until their
train loss first is at most a rung, then *quenched*: gradient descent on all samples at
one small rate down to one lower loss. Curvature and validation accuracy are measured
before the quench and after it. Before it they are those of a noisy iterate, taken at
the moment of a lucky fluctuation; after it those of the minimum that SGD was near.

What decides, with which seeds and samples, was written down first, in
protocols/f1.toml: laptop reads all of its settings from there.
"""

from __future__ import annotations

import hashlib
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastminima as fm
from examples.common import data, measures, plots, seedwise, stacks, training
from examples.common.tables import aligned
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "Width"]

PROTOCOL = Path(__file__).parent / "protocols" / "f1.toml"
# Displacements of the finite differences, in units of the parameters.
STEPS = (0.1, 0.01)


@dataclass(frozen=True)
class Width(Settings):
    """The grid and the measurement.

    Attributes:
        hidden: width of each hidden layer of the ReLU MLP.
        pairs: (learning rate, batch size) of the grid.
        rung: train loss of the snapshot. target, rate, most_steps: of the quench.
        checks: evaluations of the train loss an epoch, in search of the rung.
        measure_size: training samples that curvature is measured on.
        products: Hessian products for each stochastic estimate.
        seeds_a_task: replicas of each pair that are trained in one stack.
        protocol: hash of the file that fixed all this beforehand; "" if none did.
    """

    train_size: int
    validation_size: int
    split_seed: int
    pool: int
    skip: int
    hidden: tuple[int, ...]
    pairs: tuple[tuple[float, int], ...]
    most_epochs: int
    rung: float
    target: float
    rate: float
    most_steps: int
    checks: int = 2
    measure_size: int = 2048
    products: int = 24
    equivalence: float = 1 / 3
    seeds_a_task: int = 2
    protocol: str = ""


def settings(preset: str, dataset: str) -> Width:
    """Of a preset: laptop is the protocol's, quick cut down, paper at its own size."""
    text = PROTOCOL.read_bytes()
    p = tomllib.loads(text.decode())
    runs, its_data, measurement = p["runs"], p["data"], p["measurement"]
    common: dict[str, Any] = {
        "preset": preset,
        "dataset": dataset,
        "split_seed": its_data["split_seed"],
        "rung": measurement["rung"],
        "target": measurement["target"],
        "rate": measurement["rate"],
        "most_steps": measurement["most_steps"],
        "equivalence": p["decision"]["equivalence"],
    }
    pairs = _pairs(runs["ratios"], runs["batch_sizes"])
    is_digits = dataset == "digits"
    sizes: dict[str, Any] = {
        "train_size": 1440 if is_digits else its_data["train_size"],
        "validation_size": 357 if is_digits else its_data["validation_size"],
        "pool": 1 if is_digits else its_data["pool"],
        "skip": 0 if is_digits else its_data["skip"],
    }
    if preset == "quick":
        return Width(
            **common,
            **{**sizes, "train_size": 1024},
            seeds=(0, 1, 2),
            hidden=tuple(runs["hidden"]),
            pairs=_pairs((1e-3, 2.5e-3, 6.3e-3), (8, 16)),
            most_epochs=100,
            measure_size=512,
            products=6,
            seeds_a_task=3,
        )
    if preset == "laptop":
        is_written = dataset == its_data["name"]
        return Width(
            **common,
            **sizes,
            seeds=tuple(runs["seeds"]),
            hidden=tuple(runs["hidden"]),
            pairs=pairs,
            most_epochs=runs["most_epochs"],
            checks=measurement["checks"],
            products=measurement["products"],
            protocol=hashlib.sha256(text).hexdigest()[:12] if is_written else "",
        )
    return Width(
        **{**common, "rung": 0.4, "target": 0.3, "rate": 0.02},
        train_size=1440 if is_digits else 45_000,
        validation_size=357 if is_digits else 10_000,
        pool=1,
        skip=0,
        seeds=(0, 1, 2, 3, 4),
        hidden=(50,) * 20,
        pairs=tuple(dict.fromkeys(_STUDY + _SCALINGS)),
        most_epochs=60,
        checks=4,
        measure_size=4096,
        products=100,
        seeds_a_task=5,
    )


def _pairs(
    ratios: Sequence[float], sizes: Sequence[int]
) -> tuple[tuple[float, int], ...]:
    return tuple((float(f"{r * s:.6g}"), s) for r in ratios for s in sizes)


# The 16 pairs of a reproducibility study of the paper.
_STUDY = (
    *((0.05, 50), (0.05, 1000), (0.025, 500), (0.04, 1000), (0.02, 500), (0.02, 100)),
    *((0.01, 50), (0.01, 100), (0.02, 200), (0.005, 1000), (0.03, 50), (0.02, 50)),
    *((0.06, 75), (0.015, 100), (0.011, 100), (0.0075, 100)),
)
# And within the paper's range, three batch sizes for each of four ratios.
_SCALINGS = (
    *_pairs((5e-5,), (100, 200, 500)),
    *_pairs((1e-4, 2e-4, 2.5e-4), (50, 100, 200)),
)


def tasks(s: Width) -> list[Task]:
    """A stack a batch size and a few seeds, with all rates of that size."""
    found = []
    for size in sorted({size for _, size in s.pairs}):
        rates = sorted(rate for rate, of in s.pairs if of == size)
        found += [
            {"batch_size": size, "rates": rates, "seeds": some}
            for some in seedwise.chunks(s.seeds, s.seeds_a_task)
        ]
    return found


def rows(s: Width, task: Task) -> int:
    return len(task["seeds"]) * len(task["rates"])


def run(s: Width, task: Task, watch: Watch) -> list[Row]:
    """Train a stack to the rung, measure, quench, measure."""
    split = data.prepared(
        s.dataset,
        s.train_size,
        s.validation_size,
        s.split_seed,
        pool=s.pool,
        skip=s.skip,
    )
    x, y = split.train[0].flatten(1), split.train[1]
    pairs = [(rate, seed) for rate in task["rates"] for seed in task["seeds"]]
    reached = _train_to_rung(s, task["batch_size"], pairs, x, y, watch)
    found: list[Row] = []
    for at, (rate, seed) in enumerate(pairs):
        snapshot = reached.get(at)
        row: Row = {
            "learning_rate": rate,
            "batch_size": task["batch_size"],
            "ratio": float(f"{rate / task['batch_size']:.3g}"),
            "seed": seed,
            "status": "unreached" if snapshot is None else "finished",
        }
        if snapshot is not None:
            stack, row["epochs"], updates = snapshot
            row["flow"] = rate * updates
            row |= _prefixed("first", _measure(s, stack, split))
            steps = training.quench(stack, x, y, s.rate, s.target, s.most_steps)
            row["quench_flow"] = s.rate * int(steps[0])
            if int(steps[0]) < 0:
                row["status"] = "not quenched"
            else:
                row |= _prefixed("quenched", _measure(s, stack, split))
        found.append(row)
        watch.progress(0.5 + 0.5 * (at + 1) / len(pairs))
    return found


def _train_to_rung(
    s: Width,
    batch_size: int,
    pairs: Sequence[tuple[float, int]],
    x: Tensor,
    y: Tensor,
    watch: Watch,
) -> dict[int, tuple[stacks.Stack, float, int]]:
    """Each replica as it first got to the rung, with its epochs and updates."""
    seeds = [seed for _, seed in pairs]
    stack = stacks.Stack.drawn((x.shape[1], *s.hidden, 10), seeds)
    orders = training.Orders(seeds, len(y))
    rates = torch.tensor([rate for rate, _ in pairs])
    start = stack.mean_loss(x, y)
    left = torch.arange(len(pairs))
    reached: dict[int, tuple[stacks.Stack, float, int]] = {}
    each = max(1, len(y) // batch_size // s.checks)
    updates = 0
    for epoch in range(s.most_epochs):
        batches = list(training.minibatches(orders, batch_size))
        for at in range(0, len(batches) - each + 1, each):
            some = iter([index[left] for index in batches[at : at + each]])
            updates += training.train_steps(stack, x, y, rates[left], some)
            loss = stack.mean_loss(x, y)
            arrived = loss <= s.rung
            is_over = arrived | ~loss.isfinite() | (loss > 1e3 * start[left])
            for place in arrived.nonzero().flatten().tolist():
                one = stack.kept(torch.tensor([place]))
                passed = epoch + (at + each) / len(batches)
                reached[int(left[place])] = one, round(passed, 3), updates
            if is_over.any():
                left = left[~is_over]
                if not len(left):
                    return reached
                stack = stack.kept(~is_over)
        share = 1 - len(left) / len(pairs)
        watch.progress(0.5 * max(share, (epoch + 1) / s.most_epochs))
    return reached


def _measure(s: Width, stack: stacks.Stack, split: data.Split) -> dict[str, Any]:
    """Loss, accuracy, gradient noise and curvature of one replica."""
    x, y = split.train[0].flatten(1), split.train[1]
    held_out, answers = split.validation[0].flatten(1), split.validation[1]
    model = stack.module(0)
    some = x[: s.measure_size], y[: s.measure_size]
    noise = measures.gradient_noise(fm.GradientProbe(model), model, some)
    found = {
        "loss": stack.mean_loss(x, y).item(),
        "accuracy": stack.accuracy(x, y).item(),
        "val_loss": stack.mean_loss(held_out, answers).item(),
        "val_accuracy": stack.accuracy(held_out, answers).item(),
        "covariance_trace": float(noise.covariance_trace),
        **measures.curvature(model, some, products=s.products),
    }
    for step in STEPS:
        found[f"frobenius_{step:g}"] = measures.finite_difference_norm(
            model, some, step, products=max(3, s.products // 4)
        )
    return found


def _prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in values.items()}


def judge(s: Width, found: Sequence[Row], expected: int) -> Verdict:
    """Slopes seed by seed, quenched; those of the noisy iterate beside them."""
    good = [r for r in found if r["status"] == "finished"]
    claims = [
        Claim(
            "quenched: -log10 ‖H‖_F per decade of η/S",
            _per_decade(good, _log_width("quenched_frobenius")),
            low=0,
        ),
        Claim(
            "-log10 λ_max",
            _per_decade(good, _log_width("quenched_lambda_max")),
            low=0,
        ),
        Claim(
            "validation accuracy",
            _per_decade(good, lambda r: r["quenched_val_accuracy"]),
            low=0,
        ),
        Claim(
            "effect of S at one ratio over that of the ratio, on ‖H‖_F",
            _relative(good),
            low=-s.equivalence,
            high=s.equivalence,
        ),
    ]
    noisy = {
        "‖H‖_F": _per_decade(good, _log_width("first_frobenius")),
        "accuracy": _per_decade(good, lambda r: r["first_val_accuracy"]),
    }
    remark = "Not quenched: " + ", ".join(
        f"{name} {mean_and_spread(values, 2)}" for name, values in noisy.items()
    )
    return decide(
        claims,
        found=len(good),
        expected=expected,
        table=_table(good, found),
        short="per decade of η/S, quenched: -log10 ‖H‖_F "
        f"{mean_and_spread(claims[0].values, 2)}, -log10 λ_max "
        f"{mean_and_spread(claims[1].values, 2)}, accuracy "
        f"{mean_and_spread(claims[2].values, 2)}; not quenched: accuracy "
        f"{mean_and_spread(noisy['accuracy'], 2)}; n {len(claims[0].values)} seeds",
        remark=remark + " per decade (± standard deviation over seeds).",
    )


def _log_width(name: str) -> seedwise.Key:
    def width(row: Row) -> float | None:
        value = row[name]
        return -math.log10(value) if value is not None and value > 0 else None

    return width


def _decades(row: Row) -> float:
    return math.log10(row["ratio"])


def _decades_of_size(row: Row) -> float:
    return math.log10(row["batch_size"])


def _per_decade(found: Sequence[Row], value: seedwise.Key) -> list[float]:
    return [
        slope for slope, *_ in seedwise.slopes(found, value, _decades, _decades_of_size)
    ]


def _relative(found: Sequence[Row]) -> list[float]:
    """The slope with S over that with the ratio, seed by seed."""
    both = seedwise.slopes(
        found, _log_width("quenched_frobenius"), _decades, _decades_of_size
    )
    return [of_size / of_ratio for of_ratio, of_size in both]


_COLUMNS = (
    ("λ_max", "first_lambda_max"),
    ("‖H‖_F", "first_frobenius"),
    ("val. acc.", "first_val_accuracy"),
    ("λ_max", "quenched_lambda_max"),
    ("‖H‖_F", "quenched_frobenius"),
    ("by differences .1", "quenched_frobenius_0.1"),
    (".01", "quenched_frobenius_0.01"),
    ("tr H", "quenched_trace"),
    ("tr C", "quenched_covariance_trace"),
    ("val. acc.", "quenched_val_accuracy"),
    ("epochs", "epochs"),
    ("flow", "flow"),
    ("quench", "quench_flow"),
)


def _table(good: Sequence[Row], found: Sequence[Row]) -> str:
    head = ["η/S", "S", *(name for name, _ in _COLUMNS)]
    lines = []
    for (ratio, size), same in seedwise.cells(good, "ratio", "batch_size").items():
        values = [mean_and_spread([r[k] for r in same]) for _, k in _COLUMNS]
        lines.append([f"{ratio:.3g}", str(size), *values])
    text = "Mean ± standard deviation over seeds: three columns at the rung, the next "
    text += "seven quenched,\nthen epochs to the rung, η · updates to it, and rate · "
    text += "steps of the quench\n" + aligned(head, lines)
    lost = [r for r in found if r["status"] != "finished"]
    for (ratio, size), same in seedwise.cells(lost, "ratio", "batch_size").items():
        which = ", ".join(sorted({r["status"] for r in same}))
        text += f"\n{len(same)} of η/S {ratio:.3g}, S {size}: {which}"
    return text


def draw(s: Width, found: Sequence[Row]) -> Figure:
    """Width and accuracy against the ratio, quenched and not."""
    good = [r for r in found if r["status"] == "finished"]
    fig, axes = plots.figure(3)
    sizes = sorted({r["batch_size"] for r in good})
    panels = (
        ("frobenius", "‖H‖$_F$ (lower: wider)", True),
        ("lambda_max", "λ$_{max}$ (lower: wider)", True),
        ("val_accuracy", "validation accuracy", False),
    )
    for ax, (name, label, is_log) in zip(axes[0], panels, strict=True):
        for colour, marker, size in zip(
            plots.colours(len(sizes)), plots.MARKERS, sizes, strict=False
        ):
            for moment, style in (("quenched", "-"), ("first", ":")):
                groups = seedwise.cells(
                    [r for r in good if r["batch_size"] == size], "ratio"
                )
                plots.with_spread(
                    ax,
                    [ratio for (ratio,) in groups],
                    [[r[f"{moment}_{name}"] for r in g] for g in groups.values()],
                    label=f"S = {size}, "
                    + ("quenched" if moment == "quenched" else "at the rung"),
                    points=moment == "quenched",
                    color=colour,
                    marker=marker,
                    linestyle=style,
                )
        ax.set_xscale("log")
        if is_log:
            plots.log_axis(ax)
        plots.few_ticks(ax, sorted({r["ratio"] for r in good})[:: 1 + len(sizes) // 4])
        ax.set_xlabel("learning rate / batch size, η/S")
        ax.set_ylabel(label)
    axes[0, 0].legend()
    plots.caption(
        fig,
        "The width of the minimum that SGD finds, and its validation accuracy, rise "
        "with η/S and depend on S little beyond that",
        f"{s.dataset}, {s.train_size} samples, ReLU MLP of {len(s.hidden)} layers of "
        f"{s.hidden[0]}; at train loss {s.rung:g}, and quenched to {s.target:g}. "
        "Lines: means; bars: one standard deviation over "
        f"{len({r['seed'] for r in good})} seeds; dots: runs.",
    )
    return fig


def nulls(found: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """What was set permuted within each seed; accuracies alone permuted."""
    return {
        "learning rates and batch sizes permuted within each seed": seedwise.shuffled(
            found, seed, "learning_rate", "batch_size", "ratio"
        ),
        "accuracies permuted within each seed": seedwise.shuffled(
            found, seed, "quenched_val_accuracy"
        ),
    }


EXPERIMENT = Experiment(
    id="f1",
    paper="Jastrzębski et al. 2017",
    claim="The width of the minimum and validation accuracy rise with η/S, and S "
    "hardly matters beyond that.",
    folder="three_factors",
    settings=settings,
    tasks=tasks,
    run=run,
    rows=rows,
    judge=judge,
    draw=draw,
    nulls=nulls,
    datasets=("fashion-mnist", "digits"),
    paper_number="a figure: ‖H‖ falls and accuracy rises, η 5e-3 … 5e-2, S 50 … 1000",
)
