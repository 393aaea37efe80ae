"""What the reruns with small networks share: their samples, seeds and status."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from examples.common import data
from examples.common.plain import STATUSES
from examples.common.stacks import Loss, Stack, cross_entropy

__all__ = [
    "CLASSES",
    "DIVERGED",
    "TRAINED",
    "UNTRAINED",
    "Samples",
    "listed",
    "samples",
    "standing",
    "status_of",
]

CLASSES = 10
TRAINED, DIVERGED, UNTRAINED = STATUSES
# A training accuracy below this multiple of chance is that of an untrained network.
LEAST = 1.5
# A loss above this multiple of the one it began with has diverged.
MOST = 1e3

# Training and validation samples: x [samples, features] and y [samples] of each.
Samples = tuple[Tensor, Tensor, Tensor, Tensor]


def samples(
    dataset: str, train: int, validation: int, *, seed: int, skip: int, pool: int
) -> Samples:
    """Flat images and labels, normalised; the same tensors at each call.

    Fashion-MNIST and MNIST are averaged over squares of `pool` pixels, and the first
    `skip` samples of the order of seed 777 are left out; the digits of scikit-learn
    are too few and too small for either.
    """
    if dataset == "digits":
        pool, skip = 1, 0
    found = data.prepared(dataset, train, validation, seed, pool=pool, skip=skip)
    (x, y), (x_val, y_val) = found.train, found.validation
    return x.flatten(1), y, x_val.flatten(1), y_val


def standing(
    stack: Stack, sample: Samples, loss: Loss = cross_entropy
) -> dict[str, list[float]]:
    """Each replica's loss and accuracies as it stands."""
    x, y, x_val, y_val = sample
    scores = stack.scores(x)
    losses = loss(scores, y.expand(len(stack), -1)).mean(dim=1)
    right = (scores.argmax(dim=2) == y).float().mean(dim=1)
    return {
        "train_loss": losses.tolist(),
        "train_accuracy": right.tolist(),
        "validation_accuracy": stack.accuracy(x_val, y_val).tolist(),
    }


def status_of(start: float, loss: float, accuracy: float) -> str:
    """Whether a network has trained, from its train loss before and now."""
    if not math.isfinite(loss) or loss > MOST * start:
        return DIVERGED
    if loss >= start or accuracy < LEAST / CLASSES:
        return UNTRAINED
    return TRAINED


def listed(values: Sequence[float], digits: int = 5) -> list[float | None]:
    """Numbers as a row keeps them: few digits, None for what is not finite."""
    return [
        float(f"{float(v):.{digits}g}") if math.isfinite(float(v)) else None
        for v in values
    ]
