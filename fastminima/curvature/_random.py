"""The random generators that are set back for every pass."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["RandomState", "drew_elsewhere", "loader_generators"]


class RandomState:
    """The state at one moment of the generators known, to be returned to.

    The global ones of PyTorch (of the CPU and of the model's device), Python and NumPy,
    and `generators` besides.
    """

    def __init__(
        self, device: torch.device, generators: Sequence[torch.Generator] = ()
    ) -> None:
        self._device = device if device.type == "cuda" else None
        self._cpu = torch.get_rng_state()
        if self._device is not None:
            self._cuda = torch.cuda.get_rng_state(self._device)
        self._python = random.getstate()
        # The legacy generator is the one that closures draw from without naming it.
        self._numpy = np.random.get_state()  # noqa: NPY002
        self._others = [(g, g.get_state()) for g in generators]

    def restore(self) -> None:
        """Set the generators back."""
        torch.set_rng_state(self._cpu)
        if self._device is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        for generator, state in self._others:
            generator.set_state(state)


def loader_generators(data: Any) -> list[torch.Generator]:
    """The generators that a DataLoader and its samplers have of their own."""
    batch_sampler = getattr(data, "batch_sampler", None)
    owners = [data, getattr(data, "sampler", None), batch_sampler]
    owners.append(getattr(batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    own = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return list(own.values())


def drew_elsewhere(held: Any) -> list[str]:
    """Names of attributes that hold a generator, which nobody sets back."""
    kinds = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
    try:
        attributes = vars(held)
    except TypeError:
        return []
    return [name for name, value in attributes.items() if isinstance(value, kinds)]
