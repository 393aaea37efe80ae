"""What is measured of one network: curvature and gradient noise, by fastminima."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import fastminima as fm

__all__ = ["cross_entropy_loss", "curvature", "gradient_noise", "squared_error"]

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


def gradient_noise(
    probe: fm.GradientProbe, model: nn.Module, batch: Batch
) -> fm.GradientStatistics:
    """Statistics of the gradients of single samples' cross-entropies."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    statistics = probe.backward(losses)
    model.zero_grad()
    return statistics
