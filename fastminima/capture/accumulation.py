"""The backward passes that make up one step of training, counted and added up."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from ..statistics import GradientStatistics

__all__ = ["Accumulation"]

_MOVED = "The parameters have changed after {passes} of a step: it has no statistics."
_REMEDY = (
    " Where a step has fewer, as at the end of an epoch, call {owner}.end_step() "
    "before optimizer.step()."
)


class Accumulation:
    """Which step a pass belongs to, and the statistics of the step so far.

    A step whose passes were not all collected has no statistics: those of some of its
    samples would pass for those of the step. All its samples count alike, whichever
    pass they came in.

    Args:
        size: passes of a step; None where somebody says when it ends.
        every: one step in so many is looked at, the first one included.
        keep_mean: whether the statistics of a step keep the mean gradient.
        owner: what the user calls the object that has `end_step`, if there is one.

    Attributes:
        steps: that are over, looked at or not.
        passes: of the present step, with the one that is about to run.
    """

    def __init__(
        self,
        size: int | None,
        every: int = 1,
        *,
        keep_mean: bool,
        owner: str | None = "probe",
    ) -> None:
        self._size, self._every, self._keep_mean = size, every, keep_mean
        self._owner = owner
        self.steps = self.passes = 0
        self._total: GradientStatistics | None = None
        self._collected = 0  # how many passes are in it
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
            if self.passes:  # it was not collected
                self.end()
        else:
            self._follow(parameters)
        self.passes += 1
        return self.steps % self._every != 0

    def withdraw(self) -> None:
        """The pass that was about to run has failed, and is none."""
        self.passes -= 1

    def add(self, stats: GradientStatistics | None) -> GradientStatistics | None:
        """Take in those of a pass; those of the step if it was the last one."""
        self._collected += 1
        if stats is not None:
            self._total = stats if self._total is None else self._total + stats
        return self.end() if self.passes == self._size else None

    def end(self) -> GradientStatistics | None:
        """The step is over: its statistics.

        None where `every` leaves it out, where a pass of it was not collected, and
        where there was no pass at all.
        """
        if not self.passes:
            return None
        total = self._total if self._collected == self.passes else None
        self.steps += 1
        self.passes = self._collected = 0
        self._total = None
        return total if total is None or self.is_single else self._finished(total)

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

    def _follow(self, parameters: Mapping[str, Tensor]) -> None:
        """Notice that a step is over, or that nobody said so."""
        versions = [(id(p), p._version) for p in parameters.values()]
        if self.passes == self._size:  # its last pass was not collected
            self.end()
        elif self.passes and versions != self._versions:
            self._lose()
        self._versions, self._names = versions, tuple(parameters)

    def _lose(self) -> None:
        """Begin another step, without the statistics of the present one."""
        if not self._has_warned:
            self._has_warned = True
            some = "a backward pass" if self.passes == 1 else f"{self.passes} passes"
            if self._size is not None:
                some = f"{self.passes} of the {self._size} backward passes"
            remedy = _REMEDY.format(owner=self._owner) if self._owner else ""
            warnings.warn(_MOVED.format(passes=some) + remedy, stacklevel=5)
        self.end()
