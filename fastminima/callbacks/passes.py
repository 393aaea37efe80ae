"""The backward passes of one step of a library's training, to one row's statistics."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from ..capture.accumulation import Accumulation
from ..monitor.parts import StepParts
from ..statistics import GradientStatistics

__all__ = ["Passes", "Waiting"]


class Waiting(NamedTuple):
    """A backward pass that has been prepared and not seen yet.

    Attributes:
        loss: what is differentiated, a scalar.
        scale: what it has been multiplied with before.
        weight: of the mean over its samples in the step's gradient.
    """

    loss: Tensor
    scale: float
    weight: float


class Passes:
    """The passes of a step so far.

    Args:
        keep_mean: whether the statistics of a step keep the mean gradient.
    """

    def __init__(self, *, keep_mean: bool) -> None:
        self._accumulation = Accumulation(None, keep_mean=keep_mean, owner=None)
        self._parts = StepParts()
        self._whole: float | None = None

    def __len__(self) -> int:
        """Passes that came to their end."""
        return len(self._parts)

    def begin(
        self, model: nn.Module, samples: int, given: float, *, is_shared: bool
    ) -> float:
        """A pass is about to run; returns what its loss counts as multiplied with.

        Where its samples share a divisor with all of the step, g_n is to be n's part of
        the step times the samples of the step. How many these are is known at its end:
        until then g_n is as if all batches were as large as the first one.

        Args:
            model: that is trained.
            samples: of the pass.
            given: what their loss has been multiplied with.
            is_shared: whether all samples of the step are divided by the same.
        """
        self._accumulation.rests(dict(model.named_parameters()))
        if not is_shared:
            return given
        whole = samples / given
        if self._whole is None:
            self._whole = whole
        return given * (whole / self._whole)

    def add(self, waiting: Waiting, stats: GradientStatistics) -> None:
        """Take in a pass that has come to its end."""
        loss = waiting.loss.double() / waiting.scale
        self._parts.add(loss, stats.all_count, waiting.weight)
        self._accumulation.add(stats)

    def end(self) -> tuple[GradientStatistics | None, StepParts]:
        """The step is over: statistics of its samples, and what else a row has of it.

        None where a pass did not come to its end.
        """
        stats, parts = self._accumulation.end(), self._parts
        if stats is not None and self._whole is not None:
            factor = stats.all_count / self._whole
            if not math.isclose(factor, 1):
                stats = stats.scaled(factor)
                parts.rescale(factor)
        self._parts, self._whole = StepParts(), None
        return stats, parts
