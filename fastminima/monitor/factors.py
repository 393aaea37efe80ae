"""What an optimizer's options say of a step: rates, decay, the three factors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..quantities import takes_signs, three_factors
from ..quantities.factors import has_options_of_others, is_known_as_sgd
from ..theory import edge_of_stability
from .rows import Row

__all__ = ["Factors", "Step", "stability_limit", "unwrapped"]

_BARE = 1e-6  # that `clip_grad_norm_` adds to the norm


@dataclass(frozen=True)
class Step:
    """Numbers of one step, as `three_factors` reads them.

    Attributes:
        count: samples behind the mean gradient.
        parameter_count: tracked scalars.
        covariance_trace: tr Sigma; None where it is not known.
        mean_grad_sq_norm: |mean gradient|^2.
        batch_size: samples of a step of the optimizer.
        preconditioned_trace: tr P Sigma, P what the optimizer multiplies gradients by.
        gradient_scale: the optimizer's gradient over the mean one, before clipping.
    """

    count: int
    parameter_count: int
    covariance_trace: Any
    mean_grad_sq_norm: Any
    batch_size: int
    preconditioned_trace: float | None = None
    gradient_scale: float = 1.0


class Factors:
    """Makes the "factors/" group of rows.

    Args:
        dataset_size: number of training samples, where they are drawn without
            replacement.
        max_norm: what the loop gives `clip_grad_norm_`; None where it does not clip.
        is_quiet: whether nothing is said where there are no factors, as there are none
            yet.
    """

    def __init__(
        self,
        dataset_size: int | None,
        max_norm: float | None,
        *,
        is_quiet: bool = False,
    ) -> None:
        self._dataset_size, self._max_norm = dataset_size, max_norm
        self._has_announced = is_quiet

    def row(self, optimizer: torch.optim.Optimizer, step: Step) -> Row:
        """All three factors, or what is known of them."""
        optimizer = unwrapped(optimizer)
        options = _options(optimizer)
        clip = self._clip(step)
        row: Row = {**options, "factors/batch_size": step.batch_size}
        if clip is not None and math.isnan(clip):  # what is clipped is not finite
            return row
        if clip is not None:
            row["factors/clip"] = clip
        if step.covariance_trace is None:
            return row
        found = self._of_paper(optimizer, step)
        if found is None:
            return row
        row["factors/learning_rate"] = found.learning_rate
        scale = step.gradient_scale * (1.0 if clip is None else clip)
        found = replace(found, learning_rate=found.learning_rate * scale)
        row["factors/ratio"] = found.ratio
        row["factors/temperature"] = found.temperature
        return row

    def _of_paper(self, optimizer: torch.optim.Optimizer, step: Step) -> Any:
        """The three factors; None, announced once, where there are none."""
        try:
            if step.preconditioned_trace is not None:
                factors = three_factors(_as_sgd(optimizer), step)
                variance = max(step.preconditioned_trace, 0.0) / step.parameter_count
                factors = replace(factors, gradient_variance=variance)
            else:
                factors = three_factors(optimizer, step)
                self._say_if_unknown(optimizer)
        except ValueError as error:
            if not self._has_announced:
                self._has_announced = True
                more = ""
                if takes_signs(optimizer):
                    more = (
                        " fm.monitor.watch(precondition=True) gives that one, at the "
                        "price of second moments."
                    )
                elif not _has_plain_steps(optimizer):
                    more = (
                        " fm.monitor.watch(precondition=True) gives them in the "
                        "coordinates in which it is SGD, at the price of second "
                        "moments."
                    )
                warnings.warn(
                    f"Rows have no ratio and no temperature: {error}{more}",
                    stacklevel=5,
                )
            return None
        return replace(
            factors, batch_size=step.batch_size, dataset_size=self._dataset_size
        )

    def _say_if_unknown(self, optimizer: torch.optim.Optimizer) -> None:
        """Warn once of an optimizer that may be another than its options say."""
        if self._has_announced or is_known_as_sgd(optimizer):
            return
        self._has_announced = True
        warnings.warn(
            f"{type(optimizer).__name__} is taken for SGD, as its options are: ratio, "
            "temperature and 2 / eta are those of steps that are multiples of averaged "
            "gradients. Pass no optimizer if its steps are not.",
            stacklevel=6,
        )

    def _clip(self, step: Step) -> float | None:
        """What clipping multiplies the optimizer's gradient by; NaN where it fails."""
        if self._max_norm is None:
            return None
        norm = float(step.mean_grad_sq_norm) ** 0.5 * step.gradient_scale
        if not math.isfinite(norm):
            return math.nan
        return min(1.0, self._max_norm / (norm + _BARE))


def unwrapped(optimizer: torch.optim.Optimizer) -> Any:
    """The optimizer within what accelerate and others put around it."""
    found: Any = optimizer
    while isinstance(getattr(found, "optimizer", None), torch.optim.Optimizer):
        found = found.optimizer
    return found


def stability_limit(optimizer: torch.optim.Optimizer) -> float | None:
    """The curvature at which steps without noise diverge, 2 / eta for plain SGD.

    None where there is no single one: several learning rates, adaptive steps (theirs
    is a bound on the preconditioned Hessian), Nesterov's momentum.
    """
    optimizer = unwrapped(optimizer)
    limits: set[float] = set()
    if not _has_plain_steps(optimizer):
        return None
    for group in optimizer.param_groups:
        rate, momentum = float(group["lr"]), float(group.get("momentum", 0.0))
        if rate <= 0 or (momentum and group.get("nesterov")):
            return None
        dampening = float(group.get("dampening", 0.0)) if momentum else 0.0
        limits.add(edge_of_stability(rate, momentum, dampening))
    return limits.pop() if len(limits) == 1 else None


def _has_plain_steps(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is a multiple of an average of gradients, as far as one can see.

    Others have options that say otherwise, or are named after the signs that they take.
    """
    return not (takes_signs(optimizer) or has_options_of_others(optimizer))


def _options(optimizer: torch.optim.Optimizer) -> Row:
    """Learning rate, momentum, weight decay: one number if all groups agree."""
    row = _column(optimizer, "learning_rate", lambda group: group["lr"])
    row |= _column(optimizer, "momentum", _momentum)
    return row | _column(optimizer, "weight_decay", lambda g: g.get("weight_decay"))


def _column(optimizer: torch.optim.Optimizer, name: str, of: Any) -> Row:
    found = [of(group) for group in optimizer.param_groups]
    if any(value is None for value in found):
        return {}
    values = [float(value) for value in found]
    if len(set(values)) == 1:
        return {f"factors/{name}": values[0]}
    return {f"factors/{name}_{i}": value for i, value in enumerate(values)}


def _momentum(group: Mapping[str, Any]) -> float | None:
    """Of the heavy ball, or what an adaptive optimizer averages gradients with."""
    betas = group.get("betas")
    return group.get("momentum") if betas is None else betas[0]


@dataclass(frozen=True)
class _Rates:
    """Stands for SGD in the coordinates in which an adaptive optimizer is one."""

    param_groups: list[dict[str, Any]]


def _as_sgd(optimizer: torch.optim.Optimizer) -> Any:
    """SGD with the same learning rates: averaged gradients have weights that sum to 1.

    Momentum of RMSprop is that of the heavy ball.
    """
    kept = ("lr", "momentum")
    groups = optimizer.param_groups
    return _Rates([{k: g[k] for k in kept if k in g} for g in groups])
