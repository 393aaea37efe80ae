"""What the backward passes of one step of the optimizer brought, for its one row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..statistics import GradientStatistics
from .recorder import Monitor
from .rows import Row

__all__ = ["StepParts"]


class StepParts:
    """Losses, sizes and names of the samples of a step, in the order of its passes.

    Their statistics are added up elsewhere (`capture.accumulation`).
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._sizes: list[int | None] = []
        self._ids: list[Any] = []
        self._weights: list[float] = []

    def __len__(self) -> int:
        return len(self._losses)

    def add(
        self,
        loss: Tensor,
        size: int | None,
        weight: float,
        ids: Sequence[Any] | Tensor | None = None,
    ) -> None:
        """Take in a pass.

        Args:
            loss: the vector of its samples' losses; or their mean, a scalar.
            size: its samples; None where nobody said.
            weight: what its mean is multiplied with in the step's gradient, one over
                the passes of a step.
            ids: what identifies its samples.
        """
        self._losses.append(loss)
        self._sizes.append(size)
        self._weights.append(weight)
        if ids is None:
            self._ids += [None] * (size or 0)
        else:
            self._ids += ids.tolist() if isinstance(ids, Tensor) else ids

    def clear(self) -> None:
        """Begin another step."""
        for held in (self._losses, self._sizes, self._weights, self._ids):
            held.clear()

    def rescale(self, factor: float) -> None:
        """Losses so many times as large."""
        self._losses = [one * factor for one in self._losses]

    def log(
        self,
        monitor: Monitor,
        step: int,
        stats: GradientStatistics | None,
        **options: Any,
    ) -> Row | None:
        """Write the row of the step with the statistics of all its samples.

        `options` are those of `Monitor.log`.
        """
        sizes = [] if stats is None else [size for size in self._sizes if size]
        return monitor.log(
            step,
            stats,
            loss=self._loss(),
            ids=self._ids,
            microbatches=sizes,
            gradient_scale=math.fsum(self._weights),
            **options,
        )

    def _loss(self) -> Tensor:
        """The losses of all samples, or their mean: each sample counts alike."""
        if len(self._losses) == 1:
            return self._losses[0]
        if all(one.dim() for one in self._losses):
            return torch.cat(self._losses)
        means = [one.mean() for one in self._losses]
        sizes = [size or 0 for size in self._sizes]
        if not all(sizes):  # nobody said how many samples there were
            return torch.stack(means).mean()
        total = sum(sizes)
        terms = [mean * (n / total) for mean, n in zip(means, sizes, strict=True)]
        return torch.stack(terms).sum()
