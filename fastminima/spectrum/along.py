"""Curvature along the steps that training takes: one product each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..curvature import Hessian, Noise
from ..curvature._finite import NotFiniteError
from ._problem import Problem
from .results import Estimate

__all__ = ["batch_sharpness", "directional_sharpness"]


def directional_sharpness(
    H: Any, direction: Float[Tensor, " params"] | None = None
) -> float:
    """u^T H u / |u|^2, the curvature along a direction.

    Along the gradient, which is the default, a step of gradient descent on a quadratic
    loss lowers it as long as this is below 2 / learning rate. It lies between the
    extreme eigenvalues, and may be far below the largest one.

    Args:
        H: Anything symmetric with `.shape` and `@`.
        direction: u, of any length but zero; `H.gradient` if None.

    Raises:
        ValueError: No direction, or one that is zero, not finite or of another size; a
            product that is not finite.

    Example:
        >>> import torch
        >>> H = torch.diag(torch.tensor([1.0, 3.0]))
        >>> round(directional_sharpness(H, torch.tensor([1.0, 1.0])), 6)
        2.0

    Source: Pan and Li (2023), arXiv:2306.00204.
    """
    problem = Problem(H, seed=0)
    if direction is None:
        direction = getattr(H, "gradient", None)
        if not isinstance(direction, Tensor):
            raise ValueError("H has no .gradient: pass the direction.")
    u = direction.detach().to(problem.device, torch.float64).reshape(-1)
    largest = float(u.abs().max()) if u.numel() else 0.0
    if u.shape[0] != problem.size or not (largest > 0 and math.isfinite(largest)):
        raise ValueError(
            f"The direction must have {problem.size} finite numbers that are not all "
            f"zero, got {u.shape[0]}, the largest {largest}."
        )
    u = u / largest
    unit = (u / torch.linalg.vector_norm(u)).to(problem.dtype)
    image = problem.multiply(unit).double()
    found = float(torch.dot(unit.double(), image))
    if not math.isfinite(found):
        raise NotFiniteError(
            "The product with the direction is not finite. Check the parameters and "
            "the batch."
        )
    return found / float(unit.double().square().sum())


def batch_sharpness(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    count: Callable[[Any], int] | None = None,
    *,
    process_group: Any = None,
) -> Estimate:
    """The mean of g^T H g / |g|^2 over batches, each of its own gradient and Hessian.

    It is this that settles at 2 / learning rate where SGD stays at the edge of
    stability, while the largest eigenvalue of the full loss stays below. The standard
    error is that of a mean of independent batches; batches without a gradient are left
    out.

    Args:
        model: The model.
        loss: `loss(model, batch)`, a scalar: the mean over the batch.
        batches: Two or more batches of the size that training takes.
        count: Number of samples of a batch, as for `Hessian`.
        process_group: The ranks whose batches are meant, as for `Hessian`: all must
            have as many, each a share of the whole one.

    Returns:
        The mean, in the units of an eigenvalue, and its standard error.

    Raises:
        ValueError: Fewer than two batches with a gradient; and as `Hessian`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> def loss(model, x):
        ...     return model(x).square().mean()
        >>> batch_sharpness(model, loss, [torch.ones(2, 1), 2 * torch.ones(2, 1)])
        Estimate(5 +- 3, with 95 % in [-33.1186, 43.1186]; 3 products)

    Source: Andreyev and Beneventano (2024), "Edge of stochastic stability",
    arXiv:2412.20553.
    """
    found: list[float] = []
    products = 0
    noise: Noise | None = None
    for batch in batches:
        operator = Hessian(model, loss, batch, count, process_group=process_group)
        if noise is not None:  # the loss was seen to have one Hessian
            operator.trust(noise)
        gradient = operator.gradient
        if not bool(gradient.any()):
            continue
        found.append(directional_sharpness(operator, gradient))
        products += 1 + operator.extra_products
        noise = operator.noise
    if len(found) < 2:
        raise ValueError(
            f"{len(found)} batches had a gradient; a mean and its error need two. Pass "
            "more batches, of a loss that is not at its minimum."
        )
    error = statistics.stdev(found) / math.sqrt(len(found))
    return Estimate(statistics.fmean(found), error, products, len(found) - 1)
