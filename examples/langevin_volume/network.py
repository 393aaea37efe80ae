"""How far a network can be moved before its loss rises: true labels against random.

Two networks are trained to the same train loss, one on true labels and one on random
ones. The flatness radius is the length of a step in a random direction at which the
train loss has risen by a fixed amount. And SGD's noise is not isotropic: C, the
covariance of per-sample gradients, has v'Cv far above tr C / P along the top
eigenvector v of the Hessian.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

import fastminima as fm
from examples.common import data, plots
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "RadiusSettings", "crossing"]

# "again" has other random labels than "random": their difference is that of nothing.
LABELS = ("true", "random", "again")
# By how much the radius with true labels has to be the larger one.
FACTOR = 1.5
# How far above the mean over all directions, tr C / P, that along v has to be.
ANISOTROPY = 10.0


@dataclass(frozen=True)
class RadiusSettings(Settings):
    """A network trained to one loss on labels of three kinds.

    Attributes:
        train_size: samples.
        width: of its two hidden layers.
        rate, batch: of SGD.
        loss: at which SGD ends, at the end of an epoch.
        matched_loss: at which full-batch descent from there ends.
        descent_rate: of that descent.
        most_epochs: of SGD; a network not trained by then is a failed run.
        directions: random ones, in which the radius is measured.
        rise: of the train loss, that ends the radius.
    """

    train_size: int = 512
    width: int = 128
    rate: float = 0.1
    batch: int = 32
    loss: float = 0.1
    matched_loss: float = 0.05
    descent_rate: float = 0.05
    most_epochs: int = 2000
    directions: int = 10
    rise: float = 0.5


def settings(preset: str, dataset: str) -> RadiusSettings:
    """MLPs; what networks the original has at this place is unknown to us."""
    made = RadiusSettings(preset, dataset, tuple(range(8)))
    if preset == "quick":
        return replace(made, seeds=tuple(range(5)), directions=3)
    if preset == "paper":
        return replace(
            made, seeds=tuple(range(10)), train_size=10_000, width=512, directions=50
        )
    return made


def tasks(settings: RadiusSettings) -> list[Task]:
    # Random labels take the longest.
    pairs = itertools.product(LABELS[::-1], settings.seeds)
    return [{"labels": labels, "seeds": [seed]} for labels, seed in pairs]


def run(settings: RadiusSettings, task: Task, watch: Watch) -> list[Row]:
    return [_run(settings, task["labels"], seed, watch) for seed in task["seeds"]]


def crossing(value: Callable[[float], float], level: float) -> float:
    """The least r at which an increasing value(r) is above `level`, to 1 %.

    Looked for on a grid of factors of 1.25 from .01 on, then by halving.
    """
    high = 0.01
    while value(high) <= level:
        high *= 1.25
        if high > 1e4:
            return math.nan
    low = high / 1.25 if high > 0.01 else 0.0
    while high - low > 0.01 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if value(middle) > level else (middle, high)
    return (low + high) / 2


def _run(settings: RadiusSettings, labels: str, seed: int, watch: Watch) -> Row:
    x, y = _samples(settings, labels, seed)
    random = torch.Generator().manual_seed(seed)
    model = _network(settings, x.shape[1], random)
    epochs = _train(settings, model, x, y, random)
    watch.progress(0.5)
    end = _flat(model)
    loss = nn.functional.cross_entropy(model(x), y).item()
    by_loss, by_accuracy = [], []
    for _ in range(settings.directions):
        away = torch.randn(len(end), generator=random)
        away /= away.norm()

        def outputs(r: float, away: Tensor = away) -> Tensor:
            nn.utils.vector_to_parameters(end + r * away, model.parameters())
            with torch.no_grad():
                return model(x)

        def risen(r: float, at: Callable[[float], Tensor] = outputs) -> float:
            return nn.functional.cross_entropy(at(r), y).item() - loss

        def wrong(r: float, at: Callable[[float], Tensor] = outputs) -> float:
            return (at(r).argmax(1) != y).float().mean().item()

        by_loss.append(crossing(risen, settings.rise))
        by_accuracy.append(crossing(wrong, 0.5))
    nn.utils.vector_to_parameters(end.clone(), model.parameters())
    return {
        "labels": labels,
        "seed": seed,
        "radius": float(np.exp(np.mean(np.log(by_loss)))),
        "radii": [float(f"{v:.4g}") for v in by_loss],
        "radius_of_accuracy": float(np.exp(np.mean(np.log(by_accuracy)))),
        "norm": end.norm().item(),
        "loss": loss,
        "accuracy": (model(x).argmax(1) == y).float().mean().item(),
        "epochs": epochs,
        **_noise(model, x, y),
    }


def _noise(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The gradient noise along the Hessian's top eigenvector, as a share of all."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    hessian = fm.Hessian(model, lambda m, b: losses(m, b).mean(), (x, y))
    top = fm.top_eigenpairs(hessian)
    covariance = fm.GradientCovariance(model, losses, (x, y))
    v = top.vectors[0]
    trace = fm.GradientProbe(model).backward(losses(model, (x, y))).covariance_trace
    model.zero_grad()
    return {
        "sharpness": top.values[0].item(),
        "noise_share": ((v @ (covariance @ v)) / trace).item(),
        "parameters": len(v),
    }


def _samples(settings: RadiusSettings, labels: str, seed: int) -> tuple[Tensor, Tensor]:
    """Other samples for each seed; the same for all kinds of labels."""
    loaded = data.load(settings.dataset)
    x, y = data.split(loaded, settings.train_size, 0, seed=1000 + seed).train
    if x.shape[-1] > 20:
        x = nn.functional.avg_pool2d(x, 2)
    if labels != "true":
        shift = LABELS.index(labels) * 1_000_000
        random = torch.Generator().manual_seed(shift + seed)
        y = torch.randint(10, y.shape, generator=random)
    return x.flatten(1), y


def _network(
    settings: RadiusSettings, inputs: int, random: torch.Generator
) -> nn.Module:
    sizes = (inputs, settings.width, settings.width, 10)
    model = nn.Sequential()
    for fan_in, out in itertools.pairwise(sizes):
        layer = nn.Linear(fan_in, out)
        with torch.no_grad():
            layer.weight.normal_(0, math.sqrt(2 / fan_in), generator=random)
            layer.bias.zero_()
        model.extend([layer, nn.ReLU()])
    return model[:-1]


def _train(
    settings: RadiusSettings,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    random: torch.Generator,
) -> int:
    """SGD, then full-batch descent to just below the matched loss; epochs of SGD.

    Raises:
        RuntimeError: if SGD does not come to its loss, or the descent to its own.
    """
    ask = nn.functional.cross_entropy
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.rate)
    epochs, left = 0, math.inf
    while left >= settings.loss:
        if epochs == settings.most_epochs:
            raise RuntimeError(f"Train loss {left:.3g} after {epochs} epochs.")
        for index in torch.randperm(len(x), generator=random).split(settings.batch):
            optimizer.zero_grad()
            ask(model(x[index]), y[index]).backward()
            optimizer.step()
        epochs += 1
        with torch.no_grad():
            left = ask(model(x), y).item()
    descent = torch.optim.SGD(model.parameters(), lr=settings.descent_rate)
    for _ in range(20_000):
        descent.zero_grad()
        loss = ask(model(x), y)
        if loss <= settings.matched_loss:
            return epochs
        loss.backward()
        descent.step()
    raise RuntimeError(f"The descent ended at loss {loss.item():.3g}.")  # pyright: ignore[reportPossiblyUnboundVariable]


def _flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def judge(settings: RadiusSettings, rows: Sequence[Row], expected: int) -> Verdict:
    limit = math.log(FACTOR)
    above = [math.log((r["noise_share"] or math.nan) * r["parameters"]) for r in rows]
    claims = [
        Claim("log radius, true over random labels", _logs(rows, "true"), limit),
        Claim("log radius, random over random", _logs(rows, "again"), -limit, limit),
        Claim("log of v'Cv P / tr C", above, math.log(ANISOTROPY)),
    ]
    shown = {
        k: mean_and_spread([r["radius"] for r in rows if r["labels"] == k])
        for k in LABELS
    }
    shares = mean_and_spread([r["noise_share"] for r in rows], 2)
    return decide(
        claims,
        found=len(rows),
        expected=expected,
        table=_table(rows),
        short=(
            f"radius {shown['true']} true, {shown['random']} random labels; v'Cv/tr C "
            f"{shares}; n {len(_logs(rows, 'true'))}"
        ),
    )


def _logs(rows: Sequence[Row], labels: str) -> list[float]:
    """Log ratio of the radius to that with random labels, of each seed."""
    # A radius that was not found is None in the records.
    found = {(r["labels"], r["seed"]): r["radius"] or math.nan for r in rows}
    return [
        math.log(radius / found["random", seed])
        for (kind, seed), radius in found.items()
        if kind == labels and ("random", seed) in found
    ]


def _table(rows: Sequence[Row]) -> str:
    columns = {
        "radius (loss)": "radius",
        "radius (accuracy .5)": "radius_of_accuracy",
        "norm": "norm",
        "λ_max": "sharpness",
        "v'Cv / tr C": "noise_share",
        "train loss": "loss",
        "epochs": "epochs",
    }
    lines = [
        "| labels | " + " | ".join(columns) + " | 1 / P |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for labels in LABELS:
        own = [r for r in rows if r["labels"] == labels]
        if own:
            cells = [mean_and_spread([r[k] for r in own]) for k in columns.values()]
            cells.append(f"{1 / own[0]['parameters']:.2g}")
            lines.append(f"| {labels} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(settings: RadiusSettings, rows: Sequence[Row]) -> plots.Figure:
    fig, axes = plots.figure(2)
    names = ("true", "random", "random,\nanother draw")
    panels = (
        ("radius", f"distance at which the loss is {settings.rise:g} higher"),
        ("noise_share", "v'Cv / tr C"),
    )
    for ax, (key, label) in zip(axes[0], panels, strict=True):
        values = [[r[key] for r in rows if r["labels"] == k] for k in LABELS]
        plots.with_spread(
            ax,
            range(len(LABELS)),
            values,
            color=plots.INK,
            marker="o",
            linestyle="none",
        )
        ax.set_xticks(range(len(LABELS)), names)
        ax.set_xlim(-0.5, 2.5)
        ax.set_xlabel("labels trained on")
        ax.set_ylabel(label)
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].set_title("flatness radius, mean of random directions")
    axes[0, 1].set_yscale("log")
    axes[0, 1].set_title("noise along the Hessian's top eigenvector")
    if rows:
        mark = 1 / rows[0]["parameters"]
        plots.mark_line(axes[0, 1], mark, "1 / P, isotropic noise")
    n = len({r["seed"] for r in rows})
    plots.caption(
        fig,
        "At one train loss a minimum on true labels is flatter than on random ones; "
        "gradient noise is not isotropic",
        f"ReLU MLP with two layers of {settings.width}, {settings.train_size} samples "
        f"of {settings.dataset}, train loss {settings.matched_loss:g}; {n} seeds, "
        f"{settings.directions} directions each. Bars: standard deviation over seeds.",
    )
    return fig


def nulls(rows: Sequence[Row], seed: int) -> Mapping[str, list[Row]]:
    swap = {"true": "random", "random": "true", "again": "again"}
    unlike = {"again": "true", "true": "again"}
    isotropic = [{**r, "noise_share": 1 / r["parameters"]} for r in rows]
    return {
        "labels exchanged": [{**r, "labels": swap[r["labels"]]} for r in rows],
        "random against random": [
            {**r, "labels": unlike.get(r["labels"], "random")} for r in rows
        ],
        "noise the same in all directions": isotropic,
    }


EXPERIMENT = Experiment(
    id="flatness-labels",
    paper="Zhang et al. 2017",
    claim=(
        "A minimum reached on true labels is flatter, in random directions, than one "
        "on random labels at the same train loss, and SGD's noise is not isotropic."
    ),
    folder="langevin_volume",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    datasets=("fashion-mnist", "digits"),
    minutes={"quick": 0.15},
    nulls=nulls,
)
