"""One network followed along training, its sharpness looked at now and then.

A small ReLU MLP on the squared loss, of weights small enough that its sharpness begins
well below the edge. Sharpness is always given as a share of the edge, so that a run at
the edge is a run at 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from examples.common import data, measures
from examples.common.stacks import make_mlp
from examples.engine.experiment import Row, Settings, Watch

__all__ = ["Batch", "EdgeSettings", "Look", "follow", "network", "number", "samples"]

Batch = tuple[Tensor, Tensor]
# What is measured after a number of steps, None where it is not certified.
Look = Callable[[], dict[str, float | None]]


@dataclass(frozen=True)
class EdgeSettings(Settings):
    """What is trained, and when it is looked at.

    Attributes:
        samples: N, all of which are measured on.
        pool, skip: of `data.prepared`.
        hidden: units of each hidden layer.
        scale: of the initial weights, over those of He et al.
        steps: of the optimizer; the second half counts.
        looks: evenly spaced over the steps, after the first one.
        first: steps before the first look.
    """

    samples: int = 512
    pool: int = 2
    skip: int = 6048
    hidden: tuple[int, ...] = (32, 32)
    scale: float = 0.4
    steps: int = 4000
    looks: int = 40
    first: int = 0


def samples(settings: EdgeSettings, random_labels: float = 0.0) -> Batch:
    """Images in rows and labels, some share of these drawn anew; not to change."""
    x, y = data.prepared(
        settings.dataset,
        settings.samples,
        1,
        seed=2103,
        pool=settings.pool,
        skip=settings.skip,
    ).train
    draw = torch.Generator().manual_seed(41)
    is_drawn = torch.rand(len(y), generator=draw) < random_labels
    other = torch.randint(int(y.max()) + 1, y.shape, generator=draw)
    return x.flatten(1), torch.where(is_drawn, other, y)


def network(settings: EdgeSettings, batch: Batch, seed: int) -> nn.Sequential:
    """An MLP with a score for each of the classes."""
    x, y = batch
    model = make_mlp((x.shape[1], *settings.hidden, int(y.max()) + 1), seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(settings.scale)
    return model


def follow(
    settings: EdgeSettings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], Batch],
    whole: Batch,
    look: Look,
    watch: Watch,
) -> Row:
    """Train on one batch after the other; `look` before, and every so many steps.

    Returns:
        lists of one length: "step", "loss" of all samples, "rises", the share of the
        steps since the last look after which the loss of their batch was higher than
        that of the batch before, and each number that `look` returns.
    """
    every = settings.steps // settings.looks
    row: Row = {"step": [], "loss": [], "rises": []}
    last, risen, since = float("inf"), 0, 0
    for step in range(every * settings.looks + 1):
        if step == settings.first or (step > settings.first and step % every == 0):
            with torch.no_grad():
                loss = float(measures.squared_error(model, whole))
            found = {"loss": loss, "rises": risen / max(since, 1), **look()}
            row["step"].append(step)
            for name, value in found.items():
                row.setdefault(name, []).append(number(value))
            risen = since = 0
            watch.progress(step / (every * settings.looks))
        optimizer.zero_grad()
        loss = measures.squared_error(model, batches())
        loss.backward()
        optimizer.step()
        value = loss.item()
        risen, since, last = risen + (value > last), since + 1, value
    return row


def number(value: float | None) -> float | None:
    """Four digits; None for what is no number."""
    if value is None or value - value != 0:
        return None
    return float(f"{value:.4g}")
