"""The noise scale in the norm of an adaptive optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._flat import FlatLayout
from ..curvature import preconditioner
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

    return summed_moments(stats, model, optimizer, preconditioner, terms)


def summed_moments(
    stats: GradientStatistics,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    of: Callable[[nn.Module, torch.optim.Optimizer], Tensor],
    terms: Callable[[Tensor, Tensor, Tensor], Pair],
) -> Tensor | None:
    """`[2]`: two sums over all parameters; None before any step of the optimizer.

    Args:
        stats: with variance and mean.
        model: that the optimizer trains.
        optimizer: whose state is read.
        of: a vector of the parameters, from that state.
        terms: of a parameter's variance, mean and part of the vector, flat and in
            float64: what it adds to both sums.
    """
    optimizer = unwrapped(optimizer)
    if not optimizer.state:
        return None
    variance, mean = stats.variance, stats.mean_grad
    assert mean is not None
    layout = FlatLayout(model)
    sizes = [p.numel() for p in layout.parameters]
    parts = dict(zip(layout.names, of(model, optimizer).split(sizes), strict=True))
    first = second = stats.mean_grad_sq_norm.new_zeros((), dtype=torch.float64)
    for name, part in variance.items():
        given = (part, mean[name], parts[name])
        one, other = terms(*(t.flatten().double() for t in given))
        first, second = first + one, second + other
    return torch.stack([first, second])
