"""What is measured of one network: curvature and gradient noise, by fastminima."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastminima as fm

__all__ = [
    "cross_entropy_loss",
    "curvature",
    "finite_difference_norm",
    "gradient_noise",
    "squared_error",
]

Batch = tuple[Tensor, Tensor]
MeanLoss = Callable[[nn.Module, Batch], Tensor]


def cross_entropy_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def squared_error(model: nn.Module, batch: Batch) -> Tensor:
    """Half the mean squared distance from the one-hot labels."""
    scores = model(batch[0])
    target = F.one_hot(batch[1], scores.shape[1]).to(scores.dtype)
    return (scores - target).square().sum(dim=1).mean() / 2


def curvature(
    model: nn.Module,
    batch: Batch,
    loss: MeanLoss = cross_entropy_loss,
    *,
    products: int = 24,
    rtol: float = 1e-2,
) -> dict[str, Any]:
    """lambda_max with its residual, ||H||_F and tr H with their standard errors.

    `lambda_max` is None where it did not converge to `rtol`: a number that is not
    certified does not count. The norms are left out with no products.
    """
    hessian = fm.Hessian(model, loss, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its converged is read
        pairs = fm.top_eigenpairs(hessian, rtol=rtol, max_products=200)
    value = float(pairs.values[0]) if pairs.converged else math.nan
    found = {"lambda_max": value, "lambda_residual": float(pairs.residuals[0])}
    if products:
        norm = fm.frobenius_norm(hessian, products=products)
        trace = fm.trace(hessian, products=products)
        found |= {
            "frobenius": float(norm.value),
            "frobenius_error": float(norm.standard_error),
            "trace": float(trace.value),
            "trace_error": float(trace.standard_error),
        }
    return found


def finite_difference_norm(
    model: nn.Module,
    batch: Batch,
    step: float,
    loss: MeanLoss = cross_entropy_loss,
    *,
    products: int = 24,
    seed: int = 0,
) -> float:
    """||H||_F as the paper has it, from differences of gradients a `step` apart.

    The root mean square over Gaussian directions v of |g(w + e v) - g(w - e v)| / 2e,
    with e = step / |v|. On a ReLU network it counts the kinks between the two points
    as well, so that it depends on the step; leaves the model as it was.
    """
    params = list(model.parameters())
    generator = torch.Generator(params[0].device).manual_seed(seed)
    start = nn.utils.parameters_to_vector(params).detach().clone()

    def gradient(at: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(at, params)
        grads = torch.autograd.grad(loss(model, batch), params)
        return nn.utils.parameters_to_vector(grads)

    squares = []
    for _ in range(products):
        v = torch.randn(
            start.shape, generator=generator, device=start.device, dtype=start.dtype
        )
        e = step / v.norm()
        squares.append(
            ((gradient(start + e * v) - gradient(start - e * v)) / (2 * e))
            .square()
            .sum()
        )
    nn.utils.vector_to_parameters(start, params)
    return float(torch.stack(squares).mean().sqrt())


def gradient_noise(
    probe: fm.GradientProbe, model: nn.Module, batch: Batch
) -> fm.GradientStatistics:
    """Statistics of the gradients of single samples' cross-entropies."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    statistics = probe.backward(losses)
    model.zero_grad()
    return statistics
