"""Loops over stacks: epochs of mini-batches, and the quench."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .stacks import Loss, Stack, cross_entropy, sgd_step

__all__ = ["Measure", "Orders", "minibatches", "quench", "train_steps"]

# Values [replicas] of scores [replicas, samples, classes] and the replicas' places.
Measure = Callable[[Tensor, Tensor], Tensor]


class Orders:
    """Each replica's own order of the samples, drawn anew every epoch from its seed."""

    def __init__(self, seeds: Sequence[int], samples: int) -> None:
        self.samples = samples
        # Apart from the numbers that the weights are drawn from.
        self.generators = [torch.Generator().manual_seed(7919 + s) for s in seeds]

    def __call__(self) -> Tensor:
        """Permutations [replicas, samples] of the next epoch."""
        return torch.stack(
            [torch.randperm(self.samples, generator=g) for g in self.generators]
        )

    def kept(self, replicas: Tensor) -> None:
        """Go on with some of the replicas."""
        self.generators = [self.generators[i] for i in replicas.tolist()]


def minibatches(orders: Orders, batch_size: int) -> Iterator[Tensor]:
    """Indices [replicas, batch] of one epoch; a last, shorter batch is left out."""
    whole = orders.samples // batch_size * batch_size
    yield from orders()[:, :whole].split(batch_size, dim=1)


def train_steps(
    stack: Stack,
    x: Tensor,
    y: Tensor,
    rates: Tensor,
    batches: Iterator[Tensor],
    loss: Loss = cross_entropy,
) -> int:
    """SGD over some batches of indices [replicas, batch]; returns how many.

    Labels y are [samples], or [replicas, samples] where each replica has its own.
    """
    count = 0
    for index in batches:
        labels = y[index] if y.dim() == 1 else y.gather(1, index)
        sgd_step(stack.params, stack.grads(loss(stack(x[index]), labels)), rates)
        count += 1
    return count


def quench(
    stack: Stack,
    x: Tensor,
    y: Tensor,
    rate: float,
    target: float,
    most: int = 2000,
    loss: Loss = cross_entropy,
    measure: Measure | None = None,
) -> Tensor:
    """Gradient descent on all samples until each replica's loss is at most `target`.

    Takes the iterate's noise away, so that minima are compared and not the moments at
    which noisy iterates passed by. In place; replicas that are there stand still.

    Args:
        stack: the replicas.
        x: [samples, features].
        y: labels, [samples], or [replicas, samples] where each has its own.
        rate: one for all, small: below 2 / lambda_max.
        target: where a replica stops.
        most: steps at most.
        loss: what is descended.
        measure: scores [replicas, samples, classes] and the replicas' places in the
            stack to what is compared with `target`, in place of the mean loss.

    Returns:
        steps of each replica, [replicas]; -1 for those that did not get there in
        `most`.
    """
    y = y.expand(len(stack), -1)
    steps = torch.full((len(stack),), -1)
    left = torch.arange(len(stack))
    at = stack
    for step in range(most + 1):
        scores = at(x[None])
        losses = loss(scores, y[left])
        means = losses.detach().mean(dim=1)
        values = means if measure is None else measure(scores.detach(), left)
        arrived = values <= target
        steps[left[arrived]] = step
        gone = arrived | ~means.isfinite()
        if gone.any():
            _put(stack, at, left)
            left = left[~gone]
            if not len(left):
                return steps
            at = stack.kept(left)
            continue
        sgd_step(at.params, at.grads(losses), torch.full((len(left),), rate))
    _put(stack, at, left)
    return steps


@torch.no_grad()
def _put(stack: Stack, part: Stack, where: Tensor) -> None:
    if part is not stack:
        for whole, some in zip(stack.params, part.params, strict=True):
            whole[where] = some
