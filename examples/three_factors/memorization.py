"""F5: at one level of memorization, does a higher eta/S generalize better?

Part of the training labels is random. A network is stopped at a snapshot, the first
time that it gives a share of the random labels back (its memorization), and then
*quenched*: gradient descent on all samples at one small rate up to one higher share.
Validation accuracy on clean labels is taken before and after, for at the snapshot it
is that of a noisy iterate, which is worse the larger the noise under study is.

What decides was written down first, in protocols/f5.toml, which laptop reads. The paper
prints learning rates {.05, .1, .2} and says that runs with momentum exclude those
above .02, which contradicts it: so momentum has a grid of its own here, of the same
eta/((1-m)S), and is shown and does not decide.
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

from examples.common import data, plots, seedwise, stacks, training
from examples.common.tables import aligned
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "Memorization"]

PROTOCOL = Path(__file__).parent / "protocols" / "f5.toml"


@dataclass(frozen=True)
class Memorization(Settings):
    """The grid and the measurement.

    Attributes:
        noise: shares of training labels that are drawn anew, uniform over the classes.
        arms: (learning rates, momentum).
        level: memorization at the snapshot; target: at the end of the quench.
        rate, most_steps: of the quench.
        checks: evaluations of memorization an epoch.
        protocol: hash of the file that fixed all this beforehand; "" if none did.
    """

    train_size: int
    validation_size: int
    split_seed: int
    pool: int
    skip: int
    hidden: tuple[int, ...]
    noise: tuple[float, ...]
    batch_sizes: tuple[int, ...]
    arms: tuple[tuple[tuple[float, ...], float], ...]
    most_epochs: int
    level: float
    target: float
    rate: float
    most_steps: int
    checks: int = 2
    seeds_a_task: int = 4
    protocol: str = ""


def settings(preset: str, dataset: str) -> Memorization:
    """Of a preset: laptop is the protocol's, quick cut down, paper at its own size."""
    text = PROTOCOL.read_bytes()
    p = tomllib.loads(text.decode())
    runs, its_data, m = p["runs"], p["data"], p["measurement"]
    is_digits = dataset == "digits"
    common: dict[str, Any] = {
        "preset": preset,
        "dataset": dataset,
        "split_seed": its_data["split_seed"],
        "level": m["level"],
        "target": m["target"],
        "rate": m["rate"],
        "most_steps": m["most_steps"],
        "checks": m["checks"],
    }
    if preset == "paper":
        return Memorization(
            **common,
            train_size=1440 if is_digits else 50_000,
            validation_size=357 if is_digits else 10_000,
            pool=1,
            skip=0,
            seeds=(0, 1, 2),
            hidden=(256, 256),
            noise=(0.25, 0.5),
            batch_sizes=(50, 100, 200, 400, 800),
            arms=(((0.05, 0.1, 0.2), 0.0), ((0.005, 0.01, 0.02), 0.9)),
            most_epochs=300,
            seeds_a_task=3,
        )
    is_quick = preset == "quick"
    rates = tuple(runs["learning_rates"])
    with_momentum = tuple(runs["momentum_learning_rates"]), 0.9
    return Memorization(
        **common,
        train_size=400 if is_quick else its_data["train_size"],
        validation_size=350 if is_digits else its_data["validation_size"],
        pool=1 if is_digits else its_data["pool"],
        skip=0 if is_digits else its_data["skip"],
        seeds=(0, 1, 2) if is_quick else tuple(runs["seeds"]),
        hidden=(64, 64) if is_quick else tuple(runs["hidden"]),
        noise=(0.25,) if is_quick else tuple(runs["noise"]),
        batch_sizes=tuple(runs["batch_sizes"]),
        arms=((rates, 0.0),) if is_quick else ((rates, 0.0), with_momentum),
        most_epochs=runs["most_epochs"],
        seeds_a_task=3 if is_quick else 4,
        protocol=hashlib.sha256(text).hexdigest()[:12]
        if preset == "laptop" and dataset == its_data["name"]
        else "",
    )


def tasks(s: Memorization) -> list[Task]:
    """A stack a share of noise, batch size, momentum and a few seeds."""
    return [
        {
            "noise": noise,
            "batch_size": size,
            "rates": list(rates),
            "momentum": momentum,
            "seeds": seeds,
        }
        for size in sorted(s.batch_sizes)
        for rates, momentum in s.arms
        for noise in s.noise
        for seeds in seedwise.chunks(s.seeds, s.seeds_a_task)
    ]


def rows(s: Memorization, task: Task) -> int:
    return len(task["seeds"]) * len(task["rates"])


def run(s: Memorization, task: Task, watch: Watch) -> list[Row]:
    """Train a stack on partly random labels to the snapshot; measure, quench, again."""
    split = data.prepared(
        s.dataset,
        s.train_size,
        s.validation_size,
        s.split_seed,
        pool=s.pool,
        skip=s.skip,
    )
    x = split.train[0].flatten(1)
    held_out, answers = split.validation[0].flatten(1), split.validation[1]
    pairs = [(rate, seed) for rate in task["rates"] for seed in task["seeds"]]
    drawn = [random_labels(split.train[1], task["noise"], seed) for _, seed in pairs]
    y = torch.stack([labels for labels, _ in drawn])
    is_random = torch.stack([mask for _, mask in drawn])
    found: list[Row] = []
    reached = _train(s, task, pairs, x, y, is_random, watch)
    for at, (rate, seed) in enumerate(pairs):
        effective = rate / (1 - task["momentum"]) / task["batch_size"]
        row: Row = {
            "noise": task["noise"],
            "learning_rate": rate,
            "batch_size": task["batch_size"],
            "momentum": task["momentum"],
            "ratio": float(f"{effective:.3g}"),
            "seed": seed,
            "status": "unreached",
        }
        found.append(row)
        if at not in reached:
            continue
        stack, row["epochs"] = reached[at]
        labels, mask = y[at], is_random[at]

        def less_memory(
            scores: Tensor, _: Tensor, labels: Tensor = labels, mask: Tensor = mask
        ) -> Tensor:
            return -memorization(scores, labels[None], mask[None])

        def measure(
            stack: stacks.Stack = stack, labels: Tensor = labels, mask: Tensor = mask
        ) -> dict[str, float]:
            scores = stack.scores(x)
            return {
                "memorization": float(memorization(scores, labels[None], mask[None])),
                "loss": float(stack.mean_loss(x, labels)),
                "val_accuracy": float(stack.accuracy(held_out, answers)),
            }

        row |= {f"first_{k}": v for k, v in measure().items()}
        steps = training.quench(
            stack, x, labels, s.rate, -s.target, s.most_steps, measure=less_memory
        )
        row["quench_flow"] = s.rate * int(steps[0])
        row["status"] = "finished" if int(steps[0]) >= 0 else "not quenched"
        row |= {f"quenched_{k}": v for k, v in measure().items()}
        watch.progress(0.5 + 0.5 * (at + 1) / len(pairs))
    return found


def random_labels(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Labels of which a share is drawn anew, uniform over 10 classes, and which.

    A label drawn anew may equal the true one, as in the paper.
    """
    generator = torch.Generator().manual_seed(104_729 + seed)
    count = round(share * len(labels))
    which = torch.randperm(len(labels), generator=generator)[:count]
    found = labels.clone()
    found[which] = torch.randint(0, 10, (count,), generator=generator)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[which] = True
    return found, mask


def memorization(scores: Tensor, labels: Tensor, is_random: Tensor) -> Tensor:
    """Share of the random labels that are given back, [replicas]."""
    right = (scores.argmax(dim=2) == labels) & is_random
    return right.sum(dim=1) / is_random.sum(dim=1)


def _train(
    s: Memorization,
    task: Task,
    pairs: Sequence[tuple[float, int]],
    x: Tensor,
    y: Tensor,
    is_random: Tensor,
    watch: Watch,
) -> dict[int, tuple[stacks.Stack, float]]:
    """Each replica as it first reached the level, with the epoch."""
    seeds = [seed for _, seed in pairs]
    stack = stacks.Stack.drawn((x.shape[1], *s.hidden, 10), seeds)
    orders = training.Orders(seeds, len(x))
    rates = torch.tensor([rate for rate, _ in pairs])
    velocities = [torch.zeros_like(p) for p in stack.params]
    left = torch.arange(len(pairs))
    reached: dict[int, tuple[stacks.Stack, float]] = {}
    each = max(1, len(x) // task["batch_size"] // s.checks)
    for epoch in range(s.most_epochs):
        batches = list(training.minibatches(orders, task["batch_size"]))
        for at in range(0, len(batches) - each + 1, each):
            for index in batches[at : at + each]:
                chosen = index[left]
                labels = y[left].gather(1, chosen)
                grads = stack.grads(stacks.cross_entropy(stack(x[chosen]), labels))
                stacks.sgd_step(
                    stack.params, grads, rates[left], velocities, task["momentum"]
                )
            scores = stack.scores(x)
            arrived = memorization(scores, y[left], is_random[left]) >= s.level
            is_over = arrived | ~scores.isfinite().all(dim=2).all(dim=1)
            for place in arrived.nonzero().flatten().tolist():
                passed = round(epoch + (at + each) / len(batches), 3)
                reached[int(left[place])] = stack.kept(torch.tensor([place])), passed
            if is_over.any():
                left = left[~is_over]
                if not len(left):
                    return reached
                stack = stack.kept(~is_over)
                velocities = [v[~is_over] for v in velocities]
        share = 1 - len(left) / len(pairs)
        watch.progress(0.5 * max(share, (epoch + 1) / s.most_epochs))
    return reached


def judge(s: Memorization, found: Sequence[Row], expected: int) -> Verdict:
    """Slopes of validation accuracy seed by seed, at one level of memorization."""
    good = [r for r in found if r["status"] == "finished"]
    plain = [r for r in good if r["momentum"] == 0]
    claims = [
        Claim(
            f"validation accuracy per decade of η/S, {noise:.0%} random labels",
            _per_decade([r for r in plain if r["noise"] == noise], "quenched"),
            low=0,
        )
        for noise in s.noise
    ]
    parts = []
    for noise in s.noise:
        same = [r for r in good if r["noise"] == noise]
        before = _per_decade([r for r in same if r["momentum"] == 0], "first")
        parts.append(f"not quenched, {noise:.0%}: {mean_and_spread(before, 2)}")
        for moment in ("quenched", "first"):
            moved = _per_decade([r for r in same if r["momentum"] > 0], moment)
            if moved:
                words = "" if moment == "quenched" else ", not quenched"
                parts.append(
                    f"momentum .9, {noise:.0%}{words}: {mean_and_spread(moved, 2)}"
                )
    return decide(
        claims,
        found=len(good),
        expected=expected,
        table=_table(good),
        short="accuracy per decade of η/S, quenched: "
        + ", ".join(
            f"{mean_and_spread(c.values, 2)} ({noise:.0%} random)"
            for c, noise in zip(claims, s.noise, strict=True)
        )
        + f"; n {len(claims[0].values)} seeds",
        remark="Beside it (± standard deviation over seeds): " + "; ".join(parts) + ".",
    )


def _per_decade(found: Sequence[Row], moment: str) -> list[float]:
    return [
        slope
        for slope, *_ in seedwise.slopes(
            found,
            lambda r: r[f"{moment}_val_accuracy"],
            lambda r: math.log10(r["ratio"]),
            lambda r: math.log10(r["batch_size"]),
        )
    ]


_COLUMNS = (
    ("val. acc.", "first_val_accuracy"),
    ("memorized", "first_memorization"),
    ("val. acc.", "quenched_val_accuracy"),
    ("memorized", "quenched_memorization"),
    ("train loss", "quenched_loss"),
    ("epochs", "epochs"),
    ("quench", "quench_flow"),
)


def _table(good: Sequence[Row]) -> str:
    head = ["random", "momentum", "η/(1-m)S", "S", *(name for name, _ in _COLUMNS)]
    lines = []
    groups = seedwise.cells(good, "noise", "momentum", "ratio", "batch_size")
    for (noise, momentum, ratio, size), same in groups.items():
        values = [mean_and_spread([r[k] for r in same]) for _, k in _COLUMNS]
        lines.append(
            [f"{noise:.0%}", f"{momentum:g}", f"{ratio:.3g}", str(size), *values]
        )
    title = (
        "Mean ± standard deviation over seeds: at the snapshot; quenched; epochs to "
    )
    title += "the snapshot; rate · steps of the quench\n"
    return title + aligned(head, lines)


def draw(s: Memorization, found: Sequence[Row]) -> Figure:
    """Validation accuracy against the ratio at the snapshot and quenched."""
    good = [r for r in found if r["status"] == "finished"]
    shares = sorted({r["noise"] for r in good})
    fig, axes = plots.figure(max(1, len(shares)))
    looks = [(m, size) for m in (0.0, 0.9) for size in s.batch_sizes]
    colours = plots.colours(len(looks))
    for ax, noise in zip(axes[0], shares, strict=False):
        for (momentum, size), colour in zip(looks, colours, strict=True):
            same = [
                r
                for r in good
                if (r["noise"], r["momentum"], r["batch_size"])
                == (noise, momentum, size)
            ]
            groups = seedwise.cells(same, "ratio")
            for moment, style in (("quenched", "-"), ("first", ":")):
                words = "quenched" if moment == "quenched" else "snapshot"
                plots.with_spread(
                    ax,
                    [ratio for (ratio,) in groups],
                    [[r[f"{moment}_val_accuracy"] for r in g] for g in groups.values()],
                    label=f"S = {size}{', momentum .9' * (momentum > 0)}, {words}",
                    points=False,
                    color=colour,
                    linestyle=style,
                    marker="s" if momentum else "o",
                )
        plots.log_axis(ax, "x")
        ax.set_title(f"{noise:.0%} random labels")
        ax.set_xlabel("η / (1 - m) S")
        ax.set_ylabel("validation accuracy, clean labels")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    plots.caption(
        fig,
        "At one level of memorization, a higher η/S generalizes better",
        f"{s.dataset}, {s.train_size} samples, ReLU MLP of {len(s.hidden)} layers of "
        f"{s.hidden[0]}; at memorization {s.level:g}, and quenched to {s.target:g}. "
        f"Bars: one standard deviation over {len({r['seed'] for r in good})} seeds.",
    )
    return fig


def nulls(found: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """The ratio told to be another one of the same kind of run, or no effect at all."""
    return {
        "ratios permuted within each seed": seedwise.shuffled(
            found,
            seed,
            *("ratio", "batch_size", "learning_rate"),
            within=("noise", "momentum"),
        ),
        "accuracies permuted within each seed": seedwise.shuffled(
            found, seed, "quenched_val_accuracy", within=("noise", "momentum")
        ),
    }


EXPERIMENT = Experiment(
    id="f5",
    paper="Jastrzębski et al. 2017",
    claim="At one level of memorization, a higher η/S generalizes better.",
    folder="three_factors",
    settings=settings,
    tasks=tasks,
    run=run,
    rows=rows,
    judge=judge,
    draw=draw,
    nulls=nulls,
    datasets={
        "quick": ("fashion-mnist", "digits"),
        "laptop": ("fashion-mnist", "digits"),
        "paper": ("mnist", "fashion-mnist", "digits"),
    },
    paper_number="a figure: η/S decides the accuracy at equal memorization, 300 epochs",
)
