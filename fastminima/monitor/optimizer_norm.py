"""The noise scale in the norm in which an optimizer's steps are the steepest."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..quantities import takes_signs
from ..statistics import GradientStatistics
from .factors import unwrapped
from .packing import Packed
from .preconditioned import preconditioned_moments
from .rows import Row, noise_columns
from .signs import sign_columns, sign_moments
from .smoothing import SmoothedNoiseScale

__all__ = ["OptimizerNorm", "Steps"]

Steps = Literal["preconditioned", "sign"]
_PATIENCE = 10  # rows without a state: a GradScaler leaves out the first few steps


class OptimizerNorm:
    """Makes the columns "gradient/preconditioned_..." or "gradient/sign_..." of rows.

    Args:
        model: that the optimizer trains.
        steps: what they are; None for "sign" where the optimizer's name says so and it
            keeps no squares, and else "preconditioned".
        smoothing: weight of the past in the running averages.

    Raises:
        ValueError: for another word.
    """

    def __init__(self, model: nn.Module, steps: Steps | None, smoothing: float) -> None:
        if steps not in (None, "preconditioned", "sign"):
            raise ValueError(
                f"Unknown steps {steps!r}; choose from 'preconditioned', 'sign'."
            )
        self._model, self._steps = model, steps
        self._smoothed = SmoothedNoiseScale(smoothing)
        self._without = 0  # rows so far

    def ask_for(
        self,
        packed: Packed,
        stats: GradientStatistics,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Add to a copy what the columns need; nothing before the first step.

        Raises:
            ValueError: for an optimizer of which it is not known.
        """
        if stats.all_count < 2:
            return
        steps = self._steps or _steps_of(optimizer)
        find = sign_moments if steps == "sign" else preconditioned_moments
        found = find(stats, self._model, optimizer)
        if found is not None:
            packed.add(steps, found)
            return
        self._without += 1
        if self._without == _PATIENCE:
            warnings.warn(
                f"{type(unwrapped(optimizer)).__name__} keeps no state after "
                f"{_PATIENCE} rows, so they have no noise scale in its norm. If it "
                "takes steps, train with momentum or leave precondition= out.",
                stacklevel=5,
            )

    def row(self, numbers: Mapping[str, Sequence[float]], count: int) -> Row:
        """The columns, of what was copied and the samples behind the mean."""
        if "sign" in numbers:
            total, gain = numbers["sign"]
            return sign_columns(total, gain, self._smoothed)
        if "preconditioned" not in numbers:
            return {}
        group = "gradient/preconditioned_"
        trace, power = numbers["preconditioned"]
        found = noise_columns(group, trace, power, count)
        return found | self._smoothed.columns(group, trace, found[f"{group}signal"])

    def state_dict(self) -> dict[str, Any]:
        """The running averages."""
        return self._smoothed.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from running averages."""
        self._smoothed.load_state_dict(state)


def _steps_of(optimizer: torch.optim.Optimizer) -> Steps:
    optimizer = unwrapped(optimizer)
    states = optimizer.state.values()
    has_squares = any("exp_avg_sq" in state for state in states)
    return "sign" if takes_signs(optimizer) and not has_squares else "preconditioned"
