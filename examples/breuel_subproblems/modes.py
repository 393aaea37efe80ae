"""Modes of the Gram matrix of per-sample gradients decay each at its own rate.

For the squared loss, r the residuals of all N samples and f the network's outputs, a
small step of gradient descent is r <- (1 - eta K) r, K = <df_i, df_j> / N. So the part
of r along the eigenvector of K with eigenvalue kappa shrinks by 1 - eta kappa a step.
K is measured once, at the start, with `fm.GradientProbe(measure="gram")`; SGD then runs
and every mode's rate is compared with what that K predicted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

import fastminima as fm
from examples.common import plots
from examples.engine.experiment import Experiment, Row, Settings, Task, Watch
from examples.engine.outcome import Claim, Verdict, decide, mean_and_spread

__all__ = ["EXPERIMENT", "ModeSettings", "gram", "rates"]

# Judged are the first two; a linear teacher has too few modes of a large residual.
LABELS = ("sin", "random", "linear")
JUDGED = LABELS[:2]
# Modes with less residual at the start are lost in the noise of the mini-batches.
FLOOR = 0.4
# Rates (log10) above it are those of the fast modes: there is a gap in K's spectrum.
GAP = -2.0
# A mode's rate is measured until it has shrunk so far, or to the end of the run.
SHRUNK = 0.5


@dataclass(frozen=True)
class ModeSettings(Settings):
    """A two-layer tanh network on Gaussian inputs.

    Attributes:
        width: of its hidden layer.
        inputs: their number, standard normal.
        samples: N.
        batch: S.
        step: the learning rate in units of 1 over the largest eigenvalue of K.
        epochs: of N / S steps.
        labels: of the kinds in `LABELS`.
    """

    width: int = 1024
    inputs: int = 24
    samples: int = 128
    batch: int = 32
    step: float = 0.2
    epochs: int = 60
    labels: tuple[str, ...] = LABELS


def settings(preset: str, dataset: str) -> ModeSettings:
    """The same network in all presets; more seeds, and at last longer training."""
    made = ModeSettings(preset, dataset, tuple(range(8)))
    if preset == "quick":
        seeds = tuple(range(5))
        return replace(made, seeds=seeds, epochs=24, labels=JUDGED)
    if preset == "paper":
        return replace(made, seeds=tuple(range(40)), epochs=240)
    return made


def tasks(settings: ModeSettings) -> list[Task]:
    return [
        {"labels": k, "seeds": [s]} for s in settings.seeds for k in settings.labels
    ]


def run(settings: ModeSettings, task: Task, watch: Watch) -> list[Row]:
    return [_run(settings, task["labels"], seed, watch) for seed in task["seeds"]]


def gram(model: nn.Module, x: Tensor) -> Tensor:
    """K_ij = <df(x_i), df(x_j)> / N, f the model's only output.

    The gradients are those of f, not of the loss: with residuals r the loss has
    r_i df(x_i), which would put r_i r_j into K.
    """
    probe = fm.GradientProbe(model, measure="gram")
    found = probe.backward(model(x)[:, 0]).gram
    model.zero_grad()
    assert found is not None
    return found / len(x)


def rates(sizes: np.ndarray) -> np.ndarray:
    """Measured decay a step of each mode; sizes [steps + 1, modes] of the residual.

    -log of what is left, over the steps that took: until `SHRUNK` is first passed.
    """
    left = np.abs(sizes) / np.abs(sizes[0])
    passed = left <= SHRUNK
    last = np.where(passed.any(0), passed.argmax(0), len(sizes) - 1)
    return -np.log(left[last, np.arange(left.shape[1])]) / last


def _run(settings: ModeSettings, labels: str, seed: int, watch: Watch) -> Row:
    random = torch.Generator().manual_seed(seed)
    x = _normal(random, settings.samples, settings.inputs)
    y = _targets(labels, x, random)
    model = _network(settings, random)
    start = _flat(model)
    with torch.no_grad():
        residual = model(x)[:, 0] - y
    values, vectors = torch.linalg.eigh(gram(model, x))
    rate = settings.step / values[-1].item()
    ends, paths = [], []
    for order in (0, 1):
        _load(model, start)
        generator = torch.Generator().manual_seed(1_000_003 * (order + 1) + seed)
        paths.append(_train(settings, model, x, y, rate, generator, order == 0))
        ends.append(_flat(model) - start)
        watch.progress((order + 1) / 2)
    if not paths[0].isfinite().all():
        raise RuntimeError(f"SGD diverged at a learning rate of {rate:.3g}.")
    kept = (vectors.T @ residual).abs().numpy() > FLOOR
    measured = rates((paths[0] @ vectors).numpy()[:, kept])
    predicted = -np.log1p(-rate * values.numpy()[kept])
    cosine = torch.cosine_similarity(ends[0], ends[1], dim=0).item()
    line = _line(model, x, y, start, ends[0])
    grows = measured <= 0
    return {
        "labels": labels,
        "seed": seed,
        "modes": int(kept.sum()),
        "growing": int(grows.sum()),
        "predicted": [round(v, 3) for v in np.log10(predicted[~grows]).tolist()],
        "measured": [round(v, 3) for v in np.log10(measured[~grows]).tolist()],
        "cosine": cosine,
        "rise": _largest_rise(line),
        "line": [float(f"{v:.4g}") for v in line],
        "learning_rate": rate,
        "loss_left": line[-1] / line[0],
        "moved": (ends[0].norm() / start.norm()).item(),
    }


def _targets(labels: str, x: Tensor, random: torch.Generator) -> Tensor:
    if labels == "random":
        return _normal(random, len(x))
    direction = _normal(random, x.shape[1])
    along = x @ (direction / direction.norm())
    return along if labels == "linear" else torch.sin(2 * along)


def _network(settings: ModeSettings, random: torch.Generator) -> nn.Module:
    model = nn.Sequential(
        nn.Linear(settings.inputs, settings.width),
        nn.Tanh(),
        nn.Linear(settings.width, 1),
    ).double()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            bound = 1 / math.sqrt(layer.in_features)  # pyright: ignore[reportArgumentType]
            for p in (layer.weight, layer.bias):
                p.uniform_(-bound, bound, generator=random)  # pyright: ignore[reportCallIssue]
    return model


def _train(
    settings: ModeSettings,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    rate: float,
    order: torch.Generator,
    watched: bool,
) -> Tensor:
    """The residuals of all samples at the end; if `watched`, before each step too."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    path = []
    for _ in range(settings.epochs):
        for index in torch.randperm(len(x), generator=order).split(settings.batch):
            if watched:
                with torch.no_grad():
                    path.append(model(x)[:, 0] - y)
            optimizer.zero_grad()
            loss = (model(x[index])[:, 0] - y[index]).square().mean() / 2
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        path.append(model(x)[:, 0] - y)
    return torch.stack(path)


def _line(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, way: Tensor
) -> list[float]:
    """The loss at 21 points on the straight line from start to end."""
    losses = []
    for along in torch.linspace(0, 1, 21).tolist():
        _load(model, start + along * way)
        with torch.no_grad():
            losses.append(((model(x)[:, 0] - y).square().mean() / 2).item())
    return losses


def _largest_rise(line: Sequence[float]) -> float:
    """From a point to the next, as a share of the whole fall; 0 if it only falls."""
    return max(0.0, *np.diff(line).tolist()) / abs(line[0] - line[-1])


def _normal(random: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=random, dtype=torch.float64)


def _flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def _load(model: nn.Module, flat: Tensor) -> None:
    # Copied, for the vector's pieces become the parameters.
    nn.utils.vector_to_parameters(flat.clone(), model.parameters())


def judge(settings: ModeSettings, rows: Sequence[Row], expected: int) -> Verdict:
    claims = []
    for labels in JUDGED:
        own = [r for r in rows if r["labels"] == labels]
        fits = [_fit(r) for r in own]
        permuted = [_fit(r, np.random.default_rng(r["seed"]))[1] for r in own]
        claims += [
            Claim(f"{labels}: log-log slope", [f[0] for f in fits], 0.9, 1.1, digits=3),
            Claim(f"{labels}: correlation", [f[1] for f in fits], 0.95, digits=3),
            Claim(f"{labels}: with rates permuted", permuted, high=0.5),
            Claim(
                f"{labels}: correlation less that with rates permuted within clusters",
                [f[1] - _fit(_mixed(r))[1] for f, r in zip(fits, own, strict=True)],
                low=0.0,
            ),
        ]
    judged = [r for r in rows if r["labels"] in JUDGED]
    claims += [
        Claim(
            "cosine of two orders' displacements",
            [r["cosine"] for r in judged],
            0.95,
            digits=4,
        ),
        Claim(
            "largest rise along the line, share of the fall",
            [r["rise"] for r in judged],
            high=0.01,
        ),
    ]
    slopes = {k: _values(rows, k, 0) for k in LABELS}
    correlations = {k: _values(rows, k, 1) for k in LABELS}
    n = len(slopes[JUDGED[0]])
    short = "slope " + ", ".join(
        f"{mean_and_spread(slopes[k])} ({k})" for k in JUDGED if slopes[k]
    )
    short += "; correlation " + ", ".join(
        f"{mean_and_spread(correlations[k])}" for k in JUDGED if slopes[k]
    )
    return decide(
        claims,
        found=len(rows),
        expected=expected,
        table=_table(rows),
        short=f"{short}; n {n}",
    )


def _values(rows: Sequence[Row], labels: str, which: int) -> list[float]:
    return [_fit(r)[which] for r in rows if r["labels"] == labels]


def _fit(row: Row, random: np.random.Generator | None = None) -> tuple[float, float]:
    """Slope and correlation of log measured on log predicted rates.

    With `random`, the predicted ones permuted: the null.
    """
    predicted, measured = np.array(row["predicted"]), np.array(row["measured"])
    if len(predicted) < 3:
        return math.nan, math.nan
    if random is not None:
        predicted = random.permutation(predicted)
    slope = np.polyfit(predicted, measured, 1)[0]
    return float(slope), float(np.corrcoef(predicted, measured)[0, 1])


def _within(row: Row, is_fast: bool) -> tuple[float, float]:
    """Slope and correlation among the fast or among the slow modes only."""
    kept = (np.array(row["predicted"]) > GAP) == is_fast
    return _fit({k: np.array(row[k])[kept] for k in ("predicted", "measured")})


def _mixed(row: Row, seed: int = 0) -> Row:
    """The row with predicted rates permuted among the fast and among the slow modes."""
    random = np.random.default_rng([seed, row["seed"]])
    predicted = np.array(row["predicted"])
    for kept in (predicted > GAP, predicted <= GAP):
        predicted[kept] = random.permutation(predicted[kept])
    return {**row, "predicted": predicted.tolist()}


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| labels | modes | slope | correlation (least) | among fast; slow: both | "
        "permuted | cosine | monotone | loss left |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for labels in LABELS:
        own = [r for r in rows if r["labels"] == labels]
        if not own:
            continue
        slopes, correlations = (_values(rows, labels, i) for i in (0, 1))
        nulls = [_fit(r, np.random.default_rng(r["seed"]))[1] for r in own]
        cells = [
            labels + ("" if labels in JUDGED else " (not judged)"),
            f"{min(r['modes'] for r in own)}-{max(r['modes'] for r in own)}",
            mean_and_spread(slopes),
            f"{mean_and_spread(correlations)} ({min(correlations):.3f})",
            "; ".join(
                ", ".join(
                    mean_and_spread([_within(r, f)[i] for r in own], 2) for i in (0, 1)
                )
                for f in (True, False)
            ),
            mean_and_spread(nulls, 2),
            mean_and_spread([r["cosine"] for r in own], 4),
            f"{sum(r['rise'] == 0 for r in own)} of {len(own)}",
            mean_and_spread([r["loss_left"] for r in own], 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(settings: ModeSettings, rows: Sequence[Row]) -> plots.Figure:
    fig, axes = plots.figure(3)
    colours = dict(zip(LABELS, plots.colours(len(LABELS)), strict=True))
    markers = dict(zip(LABELS, plots.MARKERS, strict=False))
    for panel, (ax, labels) in enumerate(zip(axes[0], JUDGED, strict=False)):
        own = [r for r in rows if r["labels"] == labels]
        for row in own:
            ax.loglog(
                10 ** np.array(row["predicted"]),
                10 ** np.array(row["measured"]),
                markers[labels],
                ms=2.5,
                alpha=0.4,
                color=colours[labels],
                mec="none",
            )
        ends = np.array([1.5e-3, 0.3])
        ax.loglog(ends, ends, "--", color=plots.PALE, lw=1)
        ax.set_xlabel("predicted rate -log(1 - ηκ), per step")
        ax.set_ylabel("measured rate, per step" if panel == 0 else "")
        slopes, corr = (_values(rows, labels, i) for i in (0, 1))
        ax.set_title(
            f"{labels} labels: slope {mean_and_spread(slopes)},\n"
            f"correlation {mean_and_spread(corr)}"
        )
    ax = axes[0, 2]
    for labels in LABELS:
        lines = [r["line"] for r in rows if r["labels"] == labels]
        if not lines:
            continue
        shares = np.array(lines) / np.array(lines)[:, :1]
        along = np.linspace(0, 1, shares.shape[1])
        spread = shares.std(0, ddof=1) if len(shares) > 1 else 0 * along
        ax.plot(along, shares.mean(0), color=colours[labels], label=labels)
        ax.fill_between(
            along,
            shares.mean(0) - spread,
            shares.mean(0) + spread,
            color=colours[labels],
            alpha=0.2,
            lw=0,
        )
    ax.set_xlabel("place on the line, 0 start, 1 end")
    ax.set_ylabel("train loss / that at the start")
    ax.set_title("straight line from start to end")
    ax.legend(frameon=False)
    n = len({r["seed"] for r in rows})
    plots.caption(
        fig,
        "The Gram matrix of per-sample gradients at the start says how fast each mode "
        "of the residual decays",
        f"tanh network {settings.inputs}-{settings.width}-1, squared loss, N = "
        f"{settings.samples}, S = {settings.batch}, η = {settings.step}/κ₁, "
        f"{settings.epochs} epochs, {n} seeds. A point is one mode of one seed with "
        f"|r(0)| > {FLOOR}; dashed: measured = predicted. Numbers and bands: mean ± "
        "standard deviation over seeds.",
    )
    return fig


def nulls(rows: Sequence[Row], seed: int) -> Mapping[str, list[Row]]:
    random = np.random.default_rng(seed)
    return {
        "eigenvalues permuted": [
            {**r, "predicted": random.permutation(r["predicted"]).tolist()}
            for r in rows
        ],
        "eigenvalues permuted among fast and among slow modes": [
            _mixed(r, seed + 1) for r in rows
        ],
        "two orders end anywhere": [
            {**r, "cosine": float(random.uniform(-1, 1))} for r in rows
        ],
    }


EXPERIMENT = Experiment(
    id="breuel",
    paper="Breuel 2015",
    claim=(
        "The eigenvalues κ of the Gram matrix of per-sample gradients predict how fast "
        "each mode of the residual decays, by 1 - ηκ a step."
    ),
    folder="breuel_subproblems",
    settings=settings,
    tasks=tasks,
    run=run,
    judge=judge,
    draw=draw,
    minutes={"quick": 0.15},
    nulls=nulls,
    exploratory=(
        "The labels: with a linear teacher the correlation fell below .95 on some "
        "seeds, so sin(2xᵀw) and random labels are judged and the linear teacher is "
        "only reported."
    ),
)
