"""Which gradients of single samples give the noise of SGD under batch normalisation?

Batch normalisation makes the loss of a sample depend on the others in its batch, so a
gradient of one sample is not defined, and two stand in for it: "rows", each sample's
part of the ordinary backward pass, and "frozen", the gradient for batch statistics
held constant. The noise of a mini-batch gradient is defined as ever, and observed as
the spread of gradients of many batches. Here tr C of either form is compared with it.

What a sample does to the others shows when it is left out of its batch. That needs a
backward pass a sample (the jackknife), which no training can afford, and is here to
say where the difference comes from.

The same networks with constant statistics (evaluation mode), where samples do not mix,
are the control: there tr C / S must be the variance that is observed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastminima as fm
from examples.common import data, networks, plain, plots, seedwise
from examples.common.phases import Phases
from examples.common.tables import aligned
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "BatchNormNoise", "compare_batchnorm"]

# Frozen statistics are looked at in one batch of so many: they need a second pass.
FROZEN_EVERY = 3
# What counts as another variance than the one observed.
MARGIN = 1.1
# Backward passes spent on leaving samples out, for each network and size.
LEFT_OUT = 64


@dataclass(frozen=True)
class BatchNormNoise(Settings):
    """Networks, how they are trained before, and what is then drawn.

    Attributes:
        networks: see `networks.NETWORKS`.
        rate, batch_size, epochs: of the training.
        sizes: samples S in the batches whose gradients are compared.
        batches: of each size.
        pool: images are averaged over squares of this side.
    """

    train_size: int
    networks: tuple[str, ...]
    rate: float
    batch_size: int
    epochs: int
    sizes: tuple[int, ...]
    batches: int
    pool: int


def settings(preset: str, dataset: str) -> BatchNormNoise:
    """Of a preset; paper has the paper's networks, with Fashion-MNIST for want of more.

    VGG-11 has no dropout there, whose noise no gradient of a sample holds.
    """
    small = ("vgg5",) if preset == "quick" else ("vgg5", "resnet8")
    is_paper = preset == "paper"
    return BatchNormNoise(
        preset,
        dataset,
        seeds=(10, 11, 12, 13, 14),
        train_size=1000 if dataset == "digits" else 45_000 if is_paper else 2000,
        networks=("vgg11", "resnet56") if is_paper else small,
        rate=0.05,
        batch_size=32,
        epochs=2,
        sizes=(8, 32, 128) if is_paper else (8, 32),
        batches=300 if is_paper else 60,
        pool=2 if dataset == "fashion-mnist" and not is_paper else 1,
    )


def tasks(s: BatchNormNoise) -> list[Task]:
    return [
        {"network": name, "seeds": [seed]}
        for name in reversed(s.networks)
        for seed in s.seeds
    ]


def rows(s: BatchNormNoise, task: Task) -> int:
    return len(task["seeds"]) * len(s.sizes)


def run(s: BatchNormNoise, task: Task, watch: Watch) -> list[Row]:
    """Train a network, then compare at its end for each batch size."""
    validation = 300 if s.dataset == "digits" else 1000
    split = data.prepared(s.dataset, s.train_size, validation, pool=s.pool)
    (seed,) = task["seeds"]
    options = {"dropout": 0.0} if task["network"].startswith("vgg") else {}
    device = plain.chosen_device()
    model = networks.make(task["network"], seed, split.train[0], **options).to(device)  # pyright: ignore[reportArgumentType]

    def trained(watch: Watch) -> tuple[dict[str, Tensor], str, float]:
        _, history = plain.train(
            model,
            split,
            rate=s.rate,
            batch_size=s.batch_size,
            epochs=s.epochs,
            seed=seed,
            watch=watch,
            measure_every=s.epochs,
            device=device,
        )
        return model.state_dict(), history.status, history.points[-1]["train_loss"]

    phases = Phases(watch, 1 + len(s.sizes))
    state, status, loss = phases.do("training", trained)
    model.load_state_dict(state)
    x, y = (t.to(device) for t in split.train)
    generator = torch.Generator().manual_seed(104_729 + seed)
    found = []
    for size in s.sizes:
        drawn = torch.randint(len(y), (s.batches, size), generator=generator)
        row = {
            "network": task["network"],
            "seed": seed,
            "batch_size": size,
            "status": status,
            "train_loss": loss,
        }
        if status == plain.FINISHED:
            index = drawn.to(device)
            row |= phases.do(
                str(size),
                lambda _, index=index: compare_batchnorm(model, x, y, index),
            )
        found.append(row)
    return found


def compare_batchnorm(
    model: nn.Module, x: Tensor, y: Tensor, batches: Tensor
) -> dict[str, float]:
    """tr C as observed and of each form of single samples' gradients.

    All are of one sample: the variance of a gradient of S samples is tr C / S. The
    batches are drawn independently, and tr C of a form is the mean over batches of the
    variance within. Changes nothing.

    Args:
        model: with batch normalisation, without dropout.
        x, y: images and labels.
        batches: indices [batches, S].

    Returns:
        observed: S times the variance of mini-batch gradients, by
            `fm.MinibatchVariance`; rows, frozen: of `fm.GradientProbe`; and for
            statistics held at their running values, where samples do not mix,
            evaluated and evaluated_observed. left_out: the jackknife's, of some of the
            batches. noise_scale: observed tr C / |E g|^2.
    """
    mixing, alone = copy.deepcopy(model).train(), copy.deepcopy(model).eval()
    by_rows = fm.GradientProbe(mixing, batchnorm="rows")
    frozen = fm.GradientProbe(mixing, batchnorm="frozen")
    single = fm.GradientProbe(alone)
    observed, control = fm.MinibatchVariance(mixing), fm.MinibatchVariance(alone)
    traces: dict[str, list[float]] = {
        name: [] for name in ("rows", "frozen", "evaluated", "left_out")
    }

    def note(
        name: str,
        probe: fm.GradientProbe,
        network: nn.Module,
        batch: tuple[Tensor, Tensor],
        variance: fm.MinibatchVariance | None = None,
    ) -> None:
        losses = nn.functional.cross_entropy(
            network(batch[0]), batch[1], reduction="none"
        )
        traces[name].append(float(probe.backward(losses).covariance_trace))
        if variance is not None:
            variance.update(len(batch[1]))
        network.zero_grad()

    for at, index in enumerate(batches):
        batch = x[index], y[index]
        note("rows", by_rows, mixing, batch, observed)
        note("evaluated", single, alone, batch, control)
        if at % FROZEN_EVERY == 0:
            note("frozen", frozen, mixing, batch)
        if at < max(1, LEFT_OUT // len(index)):
            traces["left_out"].append(_jackknife(mixing, *batch))
    return {
        "observed": float(observed.covariance_trace),
        "evaluated_observed": float(control.covariance_trace),
        "noise_scale": float(observed.noise_scale),
        **{name: sum(values) / len(values) for name, values in traces.items()},
    }


def _jackknife(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """tr C from the gradients of a batch without each of its samples in turn.

    S times (S - 1) / S sum_i |G_i - mean|^2, Efron and Stein (1981).
    """
    spread = fm.MinibatchVariance(model)
    for i in range(len(y)):
        kept = torch.arange(len(y), device=y.device) != i
        nn.functional.cross_entropy(model(x[kept]), y[kept]).backward()
        spread.update(1)
        model.zero_grad()
    # covariance_trace is sum_i |G_i - mean|^2 / (S - 1).
    return (len(y) - 1) ** 2 * float(spread.covariance_trace)


def judge(s: BatchNormNoise, found: Sequence[Row], expected: int) -> Verdict:
    """Ratios of tr C to the observed one, the geometric mean of each seed's."""
    good = [r for r in found if r["status"] == "finished"]
    words = "tr C over the observed one"
    claims = [
        Claim(f"{words}, rows", _by_seed(good, "rows"), low=MARGIN, digits=3),
        Claim(f"{words}, frozen", _by_seed(good, "frozen"), low=MARGIN, digits=3),
        Claim(
            f"{words}, no mixing (control)",
            _by_seed(good, "evaluated", "evaluated_observed"),
            1 / MARGIN,
            MARGIN,
            digits=3,
        ),
    ]
    return decide(claims, found=len(good), expected=expected, table=_table(good))


def _by_seed(
    found: Sequence[Row], form: str, observed: str = "observed"
) -> list[float]:
    """Geometric mean of a ratio over networks and sizes, of each seed."""
    return [
        math.exp(sum(math.log(r[form] / r[observed]) for r in same) / len(same))
        for same in seedwise.cells(found, "seed").values()
    ]


def _table(good: Sequence[Row]) -> str:
    head = ["network", "S", "observed", "rows", "frozen", "running", "left out"]
    lines = [[*head, "control", "B", "train loss"]]
    for (name, size), same in seedwise.cells(good, "network", "batch_size").items():
        ratios = [
            [r[form] / r[observed] for r in same]
            for form, observed in (
                ("rows", "observed"),
                ("frozen", "observed"),
                ("evaluated", "observed"),
                ("left_out", "observed"),
                ("evaluated", "evaluated_observed"),
            )
        ]
        values = [
            [r["observed"] for r in same],
            *ratios,
            [r["noise_scale"] for r in same],
            [r["train_loss"] for r in same],
        ]
        lines.append([name, str(size), *(mean_and_spread(v) for v in values)])
    title = (
        "Mean ± standard deviation over seeds: tr C observed; tr C of each form over "
        "it;\nthe control, where samples do not mix; noise scale B = tr C / |E g|^2 in "
        "samples\n"
    )
    return title + aligned(lines[0], lines[1:])


def draw(s: BatchNormNoise, found: Sequence[Row]) -> Figure:
    """The ratios against the batch size, a panel a network."""
    good = [r for r in found if r["status"] == "finished"]
    shown = [
        ("rows", "observed", "rows"),
        ("frozen", "observed", "frozen"),
        ("evaluated", "observed", "running statistics"),
        ("left_out", "observed", "samples left out"),
        ("evaluated", "evaluated_observed", "control: no mixing"),
    ]
    panels = seedwise.cells(good, "network")
    fig, axes = plots.figure(max(1, len(panels)), sharey=True)
    for ax, ((name,), of_network) in zip(axes[0], panels.items(), strict=False):
        groups = seedwise.cells(of_network, "batch_size")
        sizes = [size for (size,) in groups]
        looks = zip(shown, plots.colours(len(shown)), plots.MARKERS, strict=False)
        for (form, observed, words), colour, marker in looks:
            plots.with_spread(
                ax,
                sizes,
                [[r[form] / r[observed] for r in g] for g in groups.values()],
                label=words,
                color=colour,
                marker=marker,
            )
        ax.set_xscale("log")
        plots.few_ticks(ax, sizes)
        plots.mark_line(ax, 1.0, "observed")
        ax.set_title(name)
        ax.set_xlabel("batch size S")
    axes[0, 0].set_ylabel("tr C over the observed one")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    plots.caption(
        fig,
        EXPERIMENT.claim,
        f"{s.dataset}, {s.train_size} samples, after {s.epochs} epochs; observed: "
        f"spread of {s.batches} mini-batch gradients. Bars: one standard deviation "
        f"over {len({r['seed'] for r in good})} seeds.",
    )
    return fig


def nulls(found: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """One form told to be right, and samples told to mix in the control."""
    return {
        "rows give what is observed": [
            {**r, "rows": r["observed"] * r["evaluated"] / r["evaluated_observed"]}
            for r in found
        ],
        "frozen gives what is observed": [
            {**r, "frozen": r["observed"] * r["evaluated"] / r["evaluated_observed"]}
            for r in found
        ],
        "the control is off as well": [
            {**r, "evaluated_observed": r["observed"]} for r in found
        ],
    }


EXPERIMENT = Experiment(
    id="batchnorm-noise",
    paper="ours, for Jastrzębski et al. 2017",
    claim=(
        "Under batch normalisation tr C by rows, or with frozen statistics, overstates "
        "SGD's noise."
    ),
    folder="three_factors",
    settings=settings,
    tasks=tasks,
    run=run,
    rows=rows,
    judge=judge,
    draw=draw,
    nulls=nulls,
    datasets=("fashion-mnist", "digits"),
    exploratory=(
        "the claim and its bound were written after two seeds, 0 and 1, of the same "
        "networks; the seeds here are others."
    ),
)
