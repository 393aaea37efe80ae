"""The noise scale of steps by signs: of Lion, signSGD and their kin."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..curvature import momentum
from ..statistics import GradientStatistics
from .preconditioned import summed_moments
from .rows import Row
from .smoothing import SmoothedNoiseScale

__all__ = ["sign_columns", "sign_moments"]

_GROUP = "gradient/sign_"


def sign_moments(
    stats: GradientStatistics, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Tensor | None:
    """`[2]`: the sum of sigma_i and <mean gradient, s>; None before any step.

    sigma_i is the standard deviation of a sample's gradient of parameter i, s the signs
    of the momentum as it was after the step before. A step of eta s lowers the loss by
    eta <E g, s>, to first order; s does not depend on this batch, so that <mean, s> is
    unbiased, where |mean gradient|_1 would be larger by the noise.

    Raises:
        ValueError: for an optimizer that keeps no momentum.
    """
    sampled = stats.count < stats.all_count
    bias = _root_bias(stats.count - (not sampled))

    def terms(variance: Tensor, mean: Tensor, average: Tensor) -> tuple[Tensor, Tensor]:
        return variance.sqrt().sum() / bias, mean @ average.sign()

    return summed_moments(stats, model, optimizer, momentum, terms)


def _root_bias(freedom: int) -> float:
    """E of the root of an unbiased variance over sigma, for Gaussian samples.

    Source: Holtzman (1950), "The unbiased estimate of the population variance and
    standard deviation", Am. J. Psychol. 63; c4 of quality control.
    """
    ratio = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    return math.exp(ratio) * math.sqrt(2 / freedom)


def sign_columns(total: float, gain: float, smoothed: SmoothedNoiseScale) -> Row:
    """Both, the square of their ratio, and that of running averages with its interval.

    (sum_i sigma_i / <g, s>)^2, in samples: in the mean of so many the noise is as large
    as what a step gains. Below zero where the ratio is.

    Source: Bernstein et al. (2018), arXiv:1802.04434, theorem 1, whose bound has
    |g|_1 on one side and sum_i sigma_i / sqrt(S) on the other; Chen et al. (2023),
    arXiv:2302.06675, for Lion.
    """
    columns = smoothed.columns(_GROUP, total, gain)
    columns[f"{_GROUP}noise_scale"] = total / gain if gain else math.nan
    squares = {name: ratio * abs(ratio) for name, ratio in columns.items()}
    return {f"{_GROUP}deviation": total, f"{_GROUP}signal": gain, **squares}
