"""Cycles of eta / S for stacks and modules, by the schedule and sampler of fastminima.

The sizes and rates are those of `fm.optim.CyclicRatio`, the batches those of
`fm.optim.BatchSizeSampler`: one sampler a replica, each with its own order of the
samples, all with the sizes of the first, which the schedule drives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fastminima as fm
from examples.common.stacks import Loss, Stack, cross_entropy, sgd_step

__all__ = ["Arm", "Cycle", "constant", "train_epoch"]


@dataclass(frozen=True)
class Arm:
    """One way to train: eta / S moves between two values, or does not.

    Attributes:
        name: in tables and figures.
        vary: "lr" or "batch_size": what moves.
        learning_rate: with `vary="batch_size"` that of all batches.
        batch_size: with `vary="lr"` that of all batches.
        low, high: ends of the cycle, eta / S.
        shape: "square" or "triangle".
        first: "low" or "high": where the cycle begins.
        order: added to the seeds that the orders of samples are drawn from.
    """

    name: str
    vary: str
    learning_rate: float
    batch_size: int
    low: float
    high: float
    shape: str = "square"
    first: str = "high"
    order: int = 0


def constant(name: str, learning_rate: float, batch_size: int, order: int) -> Arm:
    """An arm in which nothing moves."""
    ratio = learning_rate / batch_size
    return Arm(name, "lr", learning_rate, batch_size, ratio, ratio, order=order)


class Cycle:
    """The batches of a stack of replicas, and the rate of each, epoch by epoch.

    Args:
        arm: what moves, and how.
        seeds: of the replicas.
        samples: in the training set.
        stage: half a cycle, in epochs.
    """

    def __init__(
        self, arm: Arm, seeds: Sequence[int], samples: int, stage: int
    ) -> None:
        # A parameter without gradient, for the rates to belong to: the stack's are not
        # those of any optimizer.
        self.optimizer = torch.optim.SGD(
            [torch.zeros(1, requires_grad=True)], lr=arm.learning_rate
        )
        self.samplers = [
            fm.optim.BatchSizeSampler(
                samples, arm.batch_size, seed=1000 * arm.order + seed, last="carry"
            )
            for seed in seeds
        ]
        first, *others = self.samplers
        self.schedule = fm.optim.CyclicRatio(
            self.optimizer,
            first,
            arm.low,
            arm.high,
            period=2 * stage * samples,
            vary=arm.vary,  # pyright: ignore[reportArgumentType]
            shape=arm.shape,  # pyright: ignore[reportArgumentType]
            first=arm.first,  # pyright: ignore[reportArgumentType]
        )
        for other in others:
            other.schedule = first.schedule

    @property
    def rate(self) -> float:
        """Learning rate of the next batch."""
        return float(self.optimizer.param_groups[0]["lr"])

    def epoch(self) -> Iterator[tuple[Tensor, float]]:
        """Indices [replicas, batch] and learning rate of each batch of an epoch."""
        each = [sampler.consumed(sampler) for sampler in self.samplers]
        for batches in zip(*each, strict=True):
            yield torch.tensor(batches), self.rate
            self.optimizer.step()
            self.schedule.step()


def train_epoch(
    stack: Stack, x: Tensor, y: Tensor, cycle: Cycle, loss: Loss = cross_entropy
) -> None:
    """An epoch of SGD with the batches and rates of a cycle."""
    for index, rate in cycle.epoch():
        grads = stack.grads(loss(stack(x[index]), y[index]))
        sgd_step(stack.params, grads, torch.full((len(stack),), rate))
