"""The noise scale in the norm of an adaptive optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..curvature import divisors
from ..statistics import GradientStatistics
from .factors import unwrapped

__all__ = ["preconditioned_moments", "summed_moments"]

Pair = tuple[Tensor, Tensor]


def preconditioned_moments(
    stats: GradientStatistics, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Tensor | None:
    """`[2]`: tr P Sigma and |mean gradient|^2 in the norm of P; None before any step.

    P is the diagonal that the optimizer multiplies gradients by, as it was after the
    step before: it does not depend on this batch, so both are as unbiased as without
    it. For Adam 1 / (sqrt(v) + eps) with its corrections, see `fm.preconditioner`. That
    takes the variance of each parameter, so the probe measures second moments and keeps
    the mean.

    Raises:
        ValueError: for an optimizer whose preconditioner is not known.
    """

    def terms(variance: Tensor, mean: Tensor, divisor: Tensor) -> Pair:
        weights = divisor.reciprocal()
        return variance @ weights, mean.square() @ weights

    return summed_moments(stats, model, optimizer, divisors, terms)


def summed_moments(
    stats: GradientStatistics,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    of: Callable[[torch.optim.Optimizer, Mapping[str, Tensor]], Mapping[str, Tensor]],
    terms: Callable[[Tensor, Tensor, Tensor], Pair],
) -> Tensor | None:
    """`[2]`: two sums over the parameters that a loss reached.

    None before the optimizer has stepped each of them, as after a layer is unfrozen.

    Args:
        stats: with variance and mean.
        model: that the optimizer trains.
        optimizer: whose state is read.
        of: a tensor for each of some parameters, from that state.
        terms: of a parameter's variance, mean and that tensor, flat and in float64:
            what it adds to both sums.

    Raises:
        ValueError: for a parameter that the optimizer does not train.
    """
    optimizer = unwrapped(optimizer)
    mean = stats.mean_grad or {}
    parameters = {name: p for name, p in model.named_parameters() if name in mean}
    if not _has_stepped(optimizer, parameters.values()):
        return None
    variance, parts = stats.variance, of(optimizer, parameters)
    first = second = stats.mean_grad_sq_norm.new_zeros((), dtype=torch.float64)
    for name, part in variance.items():
        given = (part, mean[name], parts[name])
        one, other = terms(*(t.flatten().double() for t in given))
        first, second = first + one, second + other
    return torch.stack([first, second])


def _has_stepped(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]
) -> bool:
    """Whether it has a state of those parameters that are its own."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return bool(optimizer.state) and all(
        optimizer.state.get(p) for p in parameters if id(p) in own
    )
