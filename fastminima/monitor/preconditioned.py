"""The noise scale in the norm of an adaptive optimizer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .._flat import FlatLayout
from ..curvature import preconditioner
from ..statistics import GradientStatistics
from .factors import unwrapped

__all__ = ["preconditioned_moments"]


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
    optimizer = unwrapped(optimizer)
    if not optimizer.state:
        return None
    variance, mean = stats.variance, stats.mean_grad
    assert mean is not None
    layout = FlatLayout(model)
    sizes = [p.numel() for p in layout.parameters]
    divisors: Mapping[str, Tensor] = dict(
        zip(layout.names, preconditioner(model, optimizer).split(sizes), strict=True)
    )
    trace = power = stats.mean_grad_sq_norm.new_zeros((), dtype=torch.float64)
    for name, part in variance.items():
        weights = divisors[name].double().reciprocal()
        trace = trace + part.flatten().double() @ weights
        power = power + mean[name].flatten().double().square() @ weights
    return torch.stack([trace, power])
