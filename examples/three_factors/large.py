"""What the paper's presets share: its network on its data, trained in a plain loop.

Chosen here, for the paper does not say: no weight decay, and the curvature that of the
network in evaluation mode, with the constant statistics of its batch normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from examples.common import augment, data, networks, plain
from examples.engine.experiment import Watch

from .cycles import Arm

__all__ = ["schedule_of", "train_large"]


def schedule_of(arm: Arm, stage: int) -> plain.Cycle | None:
    """The cycle of an arm; None where nothing moves."""
    if arm.low == arm.high:
        return None
    return plain.Cycle(arm.low, arm.high, 2 * stage, arm.vary, arm.shape, arm.first)


def train_large(
    network: str,
    split: data.Split,
    seed: int,
    watch: Watch,
    measure: Callable[[nn.Module, tuple[Tensor, Tensor]], dict[str, Any]] | None = None,
    *,
    measured: int = 0,
    **options: Any,
) -> plain.History:
    """Train a network of `networks.NETWORKS` with shifts and flips, on a GPU if any.

    Args:
        network, seed: which, and of its weights and all else.
        split: images and labels.
        watch: as of `Experiment.run`; a killed run goes on where it was.
        measure: of the network and the first `measured` training samples, once an
            epoch.
        measured: how many.
        options: of `plain.train`.
    """
    device = plain.chosen_device()
    x, y = (part[: max(1, measured)].to(device) for part in split.train)

    def measures(model: nn.Module) -> dict[str, Any]:
        with torch.enable_grad():
            return measure(model, (x, y)) if measure else {}

    _, history = plain.train(
        networks.make(network, seed, split.train[0]),
        split,
        seed=seed,
        watch=watch,
        augment=augment.shift_and_flip,
        measure=measures,
        **options,
    )
    return history
