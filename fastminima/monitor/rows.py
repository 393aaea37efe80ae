"""From statistics to flat rows: named numbers, in groups as TensorBoard shows them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..quantities import ThreeFactors
from ..spectrum import Eigenpairs
from ..statistics import GradientStatistics

__all__ = ["Row", "factors_row", "gradient_row", "is_finite", "sharpness_row"]

Row = dict[str, float]


def gradient_row(stats: GradientStatistics) -> Row:
    """The "gradient/" group; what needs two samples is left out when there is one."""
    values: dict[str, Tensor] = {"mean_grad_sq_norm": stats.mean_grad_sq_norm}
    if stats.sq_norms is not None:
        norms = stats.sq_norms.sqrt()
        values |= {"norm_max": norms.max(), "norm_median": norms.quantile(0.5)}
        if stats.all_count > 1:
            values |= {
                "covariance_trace": stats.covariance_trace,
                "signal": stats.signal,
                "noise_scale": stats.noise_scale,
            }
    # One transfer for all: each .item() would wait for the device again.
    numbers = torch.stack([t.double() for t in values.values()]).tolist()
    row: Row = {"gradient/count": stats.count}
    named = zip(values, numbers, strict=True)
    return row | {f"gradient/{name}": number for name, number in named}


def factors_row(factors: ThreeFactors) -> Row:
    """The "factors/" group: what makes up the ratio, the ratio and the temperature."""
    return {
        "factors/learning_rate": factors.learning_rate,
        "factors/momentum": factors.momentum,
        "factors/batch_size": factors.batch_size,
        "factors/ratio": factors.ratio,
        "factors/temperature": factors.temperature,
    }


def sharpness_row(pairs: Eigenpairs) -> Row:
    """The "sharpness/" group: eigenvalues from the first one on, with residuals.

    With what bounds them, and how far products are from those of one matrix, where that
    is known.
    """
    row: Row = {}
    found = zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)
    for number, (value, residual) in enumerate(found, start=1):
        row[f"sharpness/eigenvalue_{number}"] = value
        row[f"sharpness/residual_{number}"] = residual
    for name, value in (("upper", pairs.upper), ("noise", pairs.noise)):
        if math.isfinite(value):
            row[f"sharpness/{name}"] = value
    row["sharpness/products"] = pairs.products
    row["sharpness/converged"] = pairs.converged
    return row


def is_finite(row: Row) -> bool:
    """Whether every number of a row is finite."""
    return all(math.isfinite(value) for value in row.values())
