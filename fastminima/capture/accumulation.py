"""The backward passes that make up one step of training, counted and added up."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..statistics import GradientStatistics

__all__ = ["Accumulation"]

_LOST = (
    "The parameters have changed after {met} of the {size} backward passes of a step "
    "(accumulate={size}): that step has no statistics. Where a step has fewer passes, "
    "as at the end of an epoch, call probe.end_step() before optimizer.step()."
)


class Accumulation:
    """Which step a pass belongs to, and the statistics of the step so far.

    A step whose passes were not all collected has no statistics: those of some of its
    samples would pass for those of the step.

    Args:
        size: passes of a step; None where the user says when it ends.
        every: one step in so many is looked at, the first one included.
        keep_mean: whether the statistics of a step keep the mean gradient.

    Attributes:
        steps: that are over, looked at or not.
    """

    def __init__(self, size: int | None, every: int, *, keep_mean: bool) -> None:
        self._size, self._every, self._keep_mean = size, every, keep_mean
        self.steps = 0
        self._announced = 0  # passes of the present step
        self._total: GradientStatistics | None = None
        self._collected = 0  # how many of them are in it
        self._versions: list[tuple[int, int]] = []  # of parameters, at its first pass
        self._names: tuple[str, ...] = ()
        self._has_warned = False

    @property
    def is_single(self) -> bool:
        """Whether each pass is a step."""
        return self._size == 1

    def restart(self, steps: int) -> None:
        """Begin a step, after so many of them."""
        self.end()
        self.steps = steps

    def rests(self, parameters: Mapping[str, Tensor]) -> bool:
        """Whether `every` leaves out the pass that is about to run; counts it."""
        if self.is_single:
            self.steps += 1
            return (self.steps - 1) % self._every != 0
        versions = [(id(p), p._version) for p in parameters.values()]
        if self._announced:
            is_over = self._announced == self._size  # its last pass was not collected
            if is_over or versions != self._versions:
                self._lose(is_over=is_over)
        self._versions, self._names = versions, tuple(parameters)
        self._announced += 1
        return self.steps % self._every != 0

    def add(self, stats: GradientStatistics | None) -> GradientStatistics | None:
        """Take in those of a pass; those of the step if it was the last one."""
        if self.is_single:
            return stats
        self._collected += 1
        if stats is not None:
            self._total = stats if self._total is None else self._total + stats
        return self.end() if self._announced == self._size else None

    def end(self) -> GradientStatistics | None:
        """The step is over: its statistics.

        None where `every` leaves it out, where a pass of it was not collected, and
        where there was no pass at all.
        """
        if not self._announced:
            return None
        total = self._total if self._collected == self._announced else None
        self.steps += 1
        self._announced = self._collected = 0
        self._total = None
        return None if total is None else self._finished(total)

    def _finished(self, total: GradientStatistics) -> GradientStatistics:
        """In the order of the model, and without what was not asked for."""

        def ordered(found: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
            if found is None:
                return None
            return {name: found[name] for name in self._names if name in found}

        return replace(
            total,
            sq_norms_by_parameter=ordered(total.sq_norms_by_parameter),
            mean_grad_sq_norms_by_parameter=ordered(
                total.mean_grad_sq_norms_by_parameter
            ),
            second_moments=ordered(total.second_moments),
            mean_grad=ordered(total.mean_grad) if self._keep_mean else None,
        )

    def _lose(self, *, is_over: bool) -> None:
        """Begin another step, without the statistics of the present one."""
        if not (is_over or self._has_warned):
            self._has_warned = True
            met, size = self._announced, self._size
            warnings.warn(_LOST.format(met=met, size=size), stacklevel=5)
        self.end()
