"""Runs of F2 and F3: pairs of networks, and the loss along the line between them.

Each arm is trained to the end of the same number of epochs and, from the first time
that its loss is at most a rung, *quenched* to one lower loss, so that its ends can be
compared at equal epochs and at matched loss. A line joins an arm's network to that of
the reference arm, from another start: from the same start both are in one basin, where
there is no barrier and the width along the line means nothing.

Curvature along the line is the second derivative of the loss at each end, along the
unit vector that joins them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastminima as fm
from examples.common import (
    data,
    interpolation,
    measures,
    networks,
    plain,
    seedwise,
    stacks,
    training,
)
from examples.common.augment import shift_and_flip
from examples.common.phases import Phases
from examples.engine.experiment import Row, Settings, Task, Watch

__all__ = [
    "ALPHAS",
    "Lines",
    "alphas",
    "log_ratio",
    "moments",
    "run",
    "settings",
    "tasks",
    "train_arms",
]

# Where the loss is evaluated, from one network (0) to the other (1) and beyond.
ALPHAS = tuple(round(-1 + 0.125 * i, 3) for i in range(25))
# The reference arm's other start, in units of seeds.
OTHER_START = 5_000


@dataclass(frozen=True)
class Lines(Settings):
    """The arms and how they are compared.

    Attributes:
        network: "mlp", trained as a stack, or one of `networks.NETWORKS`.
        arms: (learning rate, batch size); the first is the one others are joined to.
        epochs: of every arm.
        rung, target, rate: of the quench; without steps of it (`most_steps`) networks
            are compared at equal epochs only.
        measure_size: training samples that networks too large for a stack are measured
            on.
        products: Hessian products for ||H||_F of each end.
    """

    train_size: int
    validation_size: int
    split_seed: int
    pool: int
    skip: int
    hidden: tuple[int, ...]
    network: str
    arms: tuple[tuple[float, int], ...]
    epochs: int
    rung: float
    target: float
    rate: float
    most_epochs: int = 400
    most_steps: int = 3000
    measure_size: int = 5000
    products: int = 12
    seeds_a_task: int = 2


def settings(
    preset: str,
    dataset: str,
    arms: tuple[tuple[float, int], ...],
    network: str,
    its_arms: tuple[tuple[float, int], ...],
) -> Lines:
    """MLPs on Fashion-MNIST of 14 x 14 pixels, or on digits; `network` for the paper.

    What the paper does not say and was chosen: epochs, weight decay, rung and target.
    """
    is_digits, is_quick = dataset == "digits", preset == "quick"
    if preset == "paper":
        return Lines(
            preset=preset,
            dataset=dataset,
            seeds=(0, 1, 2, 3, 4),
            train_size=1440 if is_digits else 45_000,
            validation_size=357 if is_digits else 5_000,
            split_seed=777,
            pool=1,
            skip=0,
            hidden=(),
            network=network,
            arms=its_arms,
            epochs=200,
            rung=0.2,
            target=0.1,
            rate=0.01,
            most_epochs=400,
            seeds_a_task=1,
        )
    return Lines(
        preset=preset,
        dataset=dataset,
        seeds=tuple(range(3)) if is_quick else tuple(range(100, 108)),
        train_size=512 if is_quick else 1440 if is_digits else 2048,
        validation_size=350 if is_quick or is_digits else 10_000,
        split_seed=2026,
        pool=1 if is_digits else 2,
        skip=0 if is_digits else 6048,
        hidden=(50, 50),
        network="mlp",
        arms=arms,
        epochs=8 if is_quick else 30,
        rung=0.1 if is_digits else 0.25,
        target=0.05 if is_digits else 0.15,
        rate=0.1 if is_digits else 0.05,
        products=6 if is_quick else 12,
        seeds_a_task=2,
    )


def tasks(s: Lines) -> list[Task]:
    """All arms of a few seeds."""
    return [{"seeds": seeds} for seeds in seedwise.chunks(s.seeds, s.seeds_a_task)]


def rows(s: Lines, task: Task) -> int:
    """One for each arm but the first, and seed."""
    return len(task["seeds"]) * (len(s.arms) - 1)


def run(s: Lines, task: Task, watch: Watch) -> list[Row]:
    """Train every arm, join each to the reference of its seed, measure on the way."""
    split = data.prepared(
        s.dataset,
        s.train_size,
        s.validation_size,
        s.split_seed,
        pool=s.pool,
        skip=s.skip,
    )
    if s.network != "mlp":
        return _run_network(s, task, split, watch)
    x, y = split.train[0].flatten(1), split.train[1]
    seeds = task["seeds"]
    ends: dict[tuple[str, int], stacks.Stack | None] = {}
    for at, (rate, size) in enumerate(s.arms):
        starts = [seed if at else OTHER_START + seed for seed in seeds]
        for moment, stack in train_arms(s, rate, size, starts, x, y).items():
            ends[moment, at] = stack
        watch.progress(0.7 * (at + 1) / len(s.arms))
    found: list[Row] = []
    for place, seed in enumerate(seeds):
        for at, (rate, size) in enumerate(s.arms[1:], start=1):
            row: Row = {
                "arm": at,
                "learning_rate": rate,
                "batch_size": size,
                "seed": seed,
                "status": "finished",
            }
            for moment in ("end", "quenched"):
                first, second = ends[moment, 0], ends[moment, at]
                if first is None or second is None:
                    row["status"] = f"not {moment}"
                    continue
                models = first.module(place), second.module(place)
                found_here = _compare(models, split, s)
                row |= {f"{moment}_{k}": v for k, v in found_here.items()}
            found.append(row)
        watch.progress(0.7 + 0.3 * (place + 1) / len(seeds))
    return found


def train_arms(
    s: Lines, rate: float, size: int, seeds: Sequence[int], x: Tensor, y: Tensor
) -> dict[str, stacks.Stack | None]:
    """An arm's replicas after all epochs, and quenched from the rung.

    None in place of those where one is not finite, or never gets to the rung.
    """
    stack = stacks.Stack.drawn((x.shape[1], *s.hidden, 10), seeds)
    orders = training.Orders(seeds, len(y))
    rates = torch.full((len(seeds),), rate)
    snapshots: dict[int, stacks.Stack] = {}
    end: stacks.Stack | None = None
    each = max(1, len(y) // size // 2)
    for epoch in range(s.most_epochs):
        batches = list(training.minibatches(orders, size))
        for at in range(0, len(batches) - each + 1, each):
            training.train_steps(stack, x, y, rates, iter(batches[at : at + each]))
            loss = stack.mean_loss(x, y)
            for place in (loss <= s.rung).nonzero().flatten().tolist():
                if place not in snapshots:
                    snapshots[place] = stack.kept(torch.tensor([place]))
        if epoch + 1 == s.epochs:
            end = stack.kept(torch.arange(len(seeds)))
        if not stack.mean_loss(x, y).isfinite().all():
            return {"end": None, "quenched": None}
        if end is not None and len(snapshots) == len(seeds):
            break
    if len(snapshots) < len(seeds):
        return {"end": end, "quenched": None}
    params = [
        torch.cat([snapshots[i].params[j] for i in range(len(seeds))])
        for j in range(len(stack.params))
    ]
    quenched = stacks.Stack(stack.sizes, params)
    steps = training.quench(quenched, x, y, s.rate, s.target, s.most_steps)
    return {"end": end, "quenched": quenched if bool((steps >= 0).all()) else None}


def _compare(
    models: tuple[nn.Sequential, nn.Sequential], split: data.Split, s: Lines
) -> dict[str, Any]:
    """Loss and accuracy along the line, and the width of both ends."""
    x, y = split.train[0].flatten(1), split.train[1]
    held_out, answers = split.validation[0].flatten(1), split.validation[1]
    points = [nn.utils.parameters_to_vector(m.parameters()).detach() for m in models]
    between = stacks.make_mlp((x.shape[1], *s.hidden, 10), 0)
    losses, accuracies = [], []
    for alpha in ALPHAS:
        place = (1 - alpha) * points[0] + alpha * points[1]
        nn.utils.vector_to_parameters(place, between.parameters())
        with torch.no_grad():
            losses.append(measures.cross_entropy_loss(between, (x, y)).item())
            right = between(held_out).argmax(dim=1) == answers
        accuracies.append(right.float().mean().item())
    found: dict[str, Any] = {
        "losses": [float(f"{v:.4g}") for v in losses],
        "accuracies": [round(v, 4) for v in accuracies],
    }
    direction = points[1] - points[0]
    direction = direction / direction.norm()
    for name, model in zip(("first", "second"), models, strict=True):
        hessian = fm.Hessian(model, measures.cross_entropy_loss, (x, y))
        found[f"{name}_along"] = float(direction @ (hessian @ direction))
        width = measures.curvature(model, (x, y), products=s.products)
        found[f"{name}_lambda_max"] = width["lambda_max"]
        found[f"{name}_frobenius"] = width["frobenius"]
        with torch.no_grad():
            found[f"{name}_loss"] = measures.cross_entropy_loss(model, (x, y)).item()
    return found


# Samples a step of the quench of a network.
LARGE = 5_000
ALPHAS_OF_NETWORKS = tuple(round(-1 + 0.25 * i, 2) for i in range(13))


def _run_network(s: Lines, task: Task, split: data.Split, watch: Watch) -> list[Row]:
    """`run` for a network that is too large for a stack, one phase a training."""
    device = plain.chosen_device()
    phases = Phases(watch, len(task["seeds"]) * len(s.arms) * len(moments(s)))
    found: list[Row] = []
    for seed in task["seeds"]:
        states = {}
        for at, (rate, size) in enumerate(s.arms):
            start = seed if at else OTHER_START + seed
            states[at] = _ends(s, phases, split, rate, size, start, f"{seed}-{at}")
        for at, (rate, size) in enumerate(s.arms[1:], start=1):
            row: Row = {
                "arm": at,
                "learning_rate": rate,
                "batch_size": size,
                "seed": seed,
                "status": "finished",
            }
            for moment in moments(s):
                pair = states[0][moment], states[at][moment]
                if None in pair:
                    row["status"] = f"not {moment}"
                    continue
                models = [networks.make(s.network, 0, split.train[0]) for _ in pair]
                for model, state in zip(models, pair, strict=True):
                    model.load_state_dict(state)
                    model.to(device).eval()
                compared = _compare_networks(models[0], models[1], split, device, s)
                row |= {f"{moment}_{k}": v for k, v in compared.items()}
            found.append(row)
    return found


def _ends(
    s: Lines,
    phases: Phases,
    split: data.Split,
    rate: float,
    size: int,
    seed: int,
    name: str,
) -> dict[str, dict[str, Tensor] | None]:
    """Weights of an arm after all epochs, and quenched from the rung; None if lost."""
    common = {"seed": seed, "weight_decay": 1e-4, "measured_samples": s.measure_size}

    def trained(start: dict[str, Tensor] | None, watch: Watch, **options: Any) -> Any:
        model = networks.make(s.network, seed, split.train[0])
        if start is not None:
            model.load_state_dict(start)
        model, history = plain.train(model, split, watch=watch, **{**common, **options})
        state = {k: v.cpu() for k, v in model.state_dict().items()}
        return state, history.status, history.points[-1]["train_loss"]

    usual = {"rate": rate, "batch_size": size, "augment": shift_and_flip}
    end, status, _ = phases.do(
        f"end-{name}",
        lambda w: trained(None, w, epochs=s.epochs, measure_every=s.epochs, **usual),
    )
    found = {"end": end if status == plain.FINISHED else None}
    if not s.most_steps:
        return found
    at_rung, _, loss = phases.do(
        f"rung-{name}",
        lambda w: trained(
            None,
            w,
            epochs=s.most_epochs,
            until=lambda point: point["train_loss"] <= s.rung,
            measure_every=0.25,
            **usual,
        ),
    )
    quenched, _, last = phases.do(
        f"quench-{name}",
        lambda w: trained(
            at_rung,
            w,
            rate=s.rate,
            batch_size=min(LARGE, len(split.train[1])),
            epochs=s.most_steps,
            until=lambda point: point["train_loss"] <= s.target,
        ),
    )
    found["quenched"] = quenched if loss <= s.rung and last <= s.target else None
    return found


def _compare_networks(
    first: nn.Module,
    second: nn.Module,
    split: data.Split,
    device: torch.device,
    s: Lines,
) -> dict[str, Any]:
    """Along the line, batch statistics re-estimated and not; width of both ends."""
    batch = tuple(t[: s.measure_size].to(device) for t in split.train)
    held_out = tuple(t.to(device) for t in split.validation)
    sets = {"train": batch, "validation": held_out}
    found: dict[str, Any] = {}
    for statistics in ("re-estimated", "interpolated"):
        line = interpolation.along_line(
            first,
            second,
            ALPHAS_OF_NETWORKS,
            sets,  # pyright: ignore[reportArgumentType]
            images=batch[0],
            statistics=statistics,
        )
        ending = "" if statistics == "re-estimated" else "_interpolated"
        found[f"losses{ending}"] = [float(f"{v:.4g}") for v in line["train"].losses]
        accuracies = line["validation"].accuracies
        found[f"accuracies{ending}"] = [round(v, 4) for v in accuracies]
    along = interpolation.curvature_along(first, second, batch, images=batch[0])  # pyright: ignore[reportArgumentType]
    for end, model, value in zip(
        ("first", "second"), (first, second), along, strict=True
    ):
        width = measures.curvature(model, batch, products=s.products)  # pyright: ignore[reportArgumentType]
        found[f"{end}_along"] = value
        found[f"{end}_lambda_max"] = width["lambda_max"]
        found[f"{end}_frobenius"] = width["frobenius"]
        found[f"{end}_loss"] = plain.evaluate(model, *batch)[0]  # pyright: ignore[reportArgumentType]
    return found


def moments(s: Lines) -> tuple[str, ...]:
    """When networks are compared."""
    return ("end", "quenched") if s.most_steps else ("end",)


def alphas(s: Lines) -> tuple[float, ...]:
    """Where the loss along a line was evaluated."""
    return ALPHAS if s.network == "mlp" else ALPHAS_OF_NETWORKS


def log_ratio(found: Sequence[Row], arm: int, moment: str, measure: str) -> list[float]:
    """Log of a measure at the arm's end over that at the reference's, by seed."""
    values = []
    for same in seedwise.by_seed(r for r in found if r["arm"] == arm).values():
        pair = [same[0].get(f"{moment}_{end}_{measure}") for end in ("second", "first")]
        known = [v for v in pair if v is not None and v > 0]
        if len(known) == 2:
            values.append(math.log(known[0] / known[1]))
    return values
