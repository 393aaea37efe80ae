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
from examples.common import data, measures, seedwise, stacks, training
from examples.engine.experiment import Row, Settings, Task, Watch

__all__ = ["ALPHAS", "Lines", "log_ratio", "run", "settings", "tasks", "train_arms"]

# Where the loss is evaluated, from one network (0) to the other (1) and beyond.
ALPHAS = tuple(round(-1 + 0.125 * i, 3) for i in range(25))
# The reference arm's other start, in units of seeds.
OTHER_START = 5_000


@dataclass(frozen=True)
class Lines(Settings):
    """The arms and how they are compared.

    Attributes:
        arms: (learning rate, batch size); the first is the one others are joined to.
        epochs: of every arm.
        rung, target, rate: of the quench.
        products: Hessian products for ||H||_F of each end.
    """

    train_size: int
    validation_size: int
    split_seed: int
    pool: int
    skip: int
    hidden: tuple[int, ...]
    arms: tuple[tuple[float, int], ...]
    epochs: int
    rung: float
    target: float
    rate: float
    most_epochs: int = 400
    most_steps: int = 3000
    products: int = 12
    seeds_a_task: int = 2


def settings(preset: str, dataset: str, arms: tuple[tuple[float, int], ...]) -> Lines:
    """MLPs on Fashion-MNIST of 14 x 14 pixels, or on digits."""
    is_digits, is_quick = dataset == "digits", preset == "quick"
    return Lines(
        preset=preset,
        dataset=dataset,
        seeds=tuple(range(3)) if is_quick else tuple(range(100, 108)),
        train_size=1024 if is_quick or is_digits else 2048,
        validation_size=350 if is_quick or is_digits else 10_000,
        split_seed=2026,
        pool=1 if is_digits else 2,
        skip=0 if is_digits else 6048,
        hidden=(50, 50),
        arms=arms,
        epochs=10 if is_quick else 30,
        rung=0.1 if is_digits else 0.25,
        target=0.05 if is_digits else 0.15,
        rate=0.1 if is_digits else 0.05,
        products=6 if is_quick else 12,
        seeds_a_task=3 if is_quick else 2,
    )


def tasks(s: Lines) -> list[Task]:
    """All arms of a few seeds."""
    return [
        {"seeds": list(s.seeds[at : at + s.seeds_a_task])}
        for at in range(0, len(s.seeds), s.seeds_a_task)
    ]


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


def log_ratio(found: Sequence[Row], arm: int, moment: str, measure: str) -> list[float]:
    """Log of a measure at the arm's end over that at the reference's, by seed."""
    values = []
    for same in seedwise.by_seed(r for r in found if r["arm"] == arm).values():
        pair = [same[0].get(f"{moment}_{end}_{measure}") for end in ("second", "first")]
        if all(v is not None and v > 0 for v in pair):
            values.append(math.log(pair[0] / pair[1]))
    return values
