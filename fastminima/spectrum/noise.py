"""Gradient noise beside curvature: the noise scale with it, noise along eigenpairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..curvature._finite import NotFiniteError
from ..curvature._scale import dot, length
from ._problem import Problem
from .product import product_trace
from .results import Eigenpairs, Estimate

__all__ = ["NoiseAlong", "hessian_noise_scale", "noise_along"]

_SHOWN = 4  # eigenvectors that a printed result lists


@dataclass(frozen=True, repr=False)
class NoiseAlong:
    """The variance of one sample's gradient along eigenvectors.

    Attributes:
        eigenvalues: lambda_i, of the pairs given.
        variances: v_i' Sigma v_i, in units of a gradient squared.
        products: How many products with Sigma they took.
    """

    eigenvalues: Float[Tensor, " k"]
    variances: Float[Tensor, " k"]
    products: int

    def __repr__(self) -> str:
        pairs = zip(self.variances.tolist(), self.eigenvalues.tolist(), strict=True)
        shown = [f"{variance:.4g} along {value:.4g}" for variance, value in pairs]
        more = len(shown) - _SHOWN
        listed = ", ".join(shown[:_SHOWN]) + (f", {more} more" if more > 0 else "")
        return f"NoiseAlong({listed}; {self.products} products)"

    def to_dict(self) -> dict[str, Any]:
        """Columns of a table with a row an eigenvector; products are a number."""
        return {
            "eigenvalue": self.eigenvalues.tolist(),
            "variance": self.variances.tolist(),
            "ratio": self.ratios.tolist(),
            "products": self.products,
        }

    @property
    def ratios(self) -> Float[Tensor, " k"]:
        """v_i' Sigma v_i / lambda_i: all the same where Sigma is a multiple of H.

        That multiple is the temperature's sigma^2 of a squared loss. Infinite or NaN
        where lambda_i = 0.
        """
        return self.variances / self.eigenvalues

    def shares(self, trace: Estimate | Tensor | float) -> Float[Tensor, " k"]:
        """Of tr Sigma: how much of all noise is along each.

        Args:
            trace: tr Sigma: `fm.trace(covariance)`, or the `covariance_trace` of a
                `GradientStatistics` of the same samples.

        Raises:
            ValueError: A trace that is not positive and finite.
        """
        total = float(trace)
        if not 0 < total < math.inf:
            raise ValueError(
                f"tr Sigma must be positive and finite, got {total}. Without noise "
                "there are no shares."
            )
        return self.variances / total


def noise_along(covariance: Any, pairs: Eigenpairs) -> NoiseAlong:
    """v_i' Sigma v_i for each eigenvector, by one product each.

    It is the variance that single samples give the gradient in that direction, exactly
    for the vectors as they are: with a residual r they are eigenvectors only to
    r / gap.

    Args:
        covariance: Sigma, such as `fm.GradientCovariance`, over the parameters of the
            matrix that the pairs are of.
        pairs: Of `top_eigenpairs`.

    Raises:
        ValueError: Pairs of another size, or a Sigma that is not symmetric.

    Example:
        >>> import torch, fastminima as fm
        >>> pairs = fm.top_eigenpairs(torch.diag(torch.tensor([1.0, 4.0])), k=1)
        >>> along = noise_along(torch.diag(torch.tensor([3.0, 2.0])), pairs)
        >>> along.ratios, along.shares(5.0)
        (tensor([0.5000]), tensor([0.4000]))

    Source: Jastrzebski et al. (2018), ICANN, where Sigma is taken to be H; Wu, Wang, Su
    (2022), arXiv:2207.02628, for the alignment of the two.
    """
    problem = Problem(covariance, seed=0)
    rows = pairs.vectors.to(problem.device, problem.dtype)
    if rows.shape[1] != problem.size:
        raise ValueError(
            f"The eigenvectors have {rows.shape[1]} entries and the covariance "
            f"{problem.size}. Make both over the same parameters."
        )
    found = torch.stack([dot(row, problem.multiply(row)) for row in rows.unbind()])
    if not bool(torch.isfinite(found).all()):
        raise NotFiniteError(
            "A product with the covariance is not finite. Check the batch and the "
            "parameters."
        )
    variances = (found * problem.unit).to(pairs.values)
    return NoiseAlong(pairs.values, variances, problem.products)


def hessian_noise_scale(
    H: Any,
    covariance: Any,
    gradient: Float[Tensor, " params"] | None = None,
    samples: float | None = None,
    products: int = 100,
    seed: int = 0,
    *,
    rtol: float | None = None,
) -> Estimate:
    """B_noise = tr(H Sigma) / G'HG, in samples: the noise scale with curvature.

    The batch size at which the noise of a step costs as much of the loss as the step's
    curvature does; `noise_scale` is the same with the identity in place of H. G is the
    gradient of all there is. What the data give is the gradient g of n samples, for
    which g'Hg is G'HG + tr(H Sigma) / n in the mean. So that is subtracted, as an
    unbiased estimate of G'HG; with `samples=math.inf`, where the data are all there is,
    nothing is. The ratio itself is biased: over several steps average `product_trace`
    and g'Hg - tr(H Sigma) / n before dividing.

    The standard error is that of the random vectors, by the delta method, for these
    data; another batch gives another g. It is infinite where G'HG cannot be told from
    zero. Negative where the curvature along G is, or the samples are too few to see G.

    Args:
        H: The Hessian; anything symmetric with `.shape` and `@`.
        covariance: Sigma, of one sample's gradient, such as `fm.GradientCovariance`.
        gradient: g; `covariance.gradient` if None.
        samples: n; `covariance.samples` if None.
        products: How many products to spend with each of the two, as for
            `product_trace`; one more with H.
        seed: Of the random vectors; global generators are not touched.
        rtol: Stop sooner, as for `product_trace`; it is tr(H Sigma) that it is of.

    Raises:
        ValueError: No gradient or number of samples, a gradient that is zero, not
            finite or of another size; and as `product_trace`.

    Example:
        >>> import math, torch
        >>> H, Sigma = torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2)
        >>> g = torch.tensor([1.0, 1.0])
        >>> round(hessian_noise_scale(H, Sigma, g, samples=math.inf).value, 6)  # 4 / 4
        1.0
        >>> round(hessian_noise_scale(H, Sigma, g, samples=4).value, 6)  # 4 / (4 - 1)
        1.333333

    Source: McCandlish et al. (2018), arXiv:1812.06162, equation 2.8.
    """
    problem = Problem(H, seed)
    gradient = _gradient_of(covariance, problem, gradient)
    samples = _samples_of(covariance, samples)
    size = float(length(gradient))
    unit = (gradient / size).to(problem.dtype)
    along = float(dot(unit, problem.multiply(unit)) / dot(unit, unit))
    along *= problem.unit * size**2
    if not math.isfinite(along):
        raise NotFiniteError(
            "The product with the gradient is not finite. Check the batch and the "
            "parameters."
        )
    noise = product_trace(H, covariance, products, seed, rtol=rtol)
    return _ratio(noise, along, samples, problem.products)


def _gradient_of(covariance: Any, problem: Problem, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        gradient = getattr(covariance, "gradient", None)
        if not isinstance(gradient, Tensor):
            raise ValueError("The covariance has no .gradient: pass gradient=.")
    found = gradient.detach().to(problem.device, torch.float64).reshape(-1)
    size = float(torch.linalg.vector_norm(found))
    if len(found) != problem.size or not 0 < size < math.inf:
        raise ValueError(
            f"The gradient must have {problem.size} finite numbers that are not all "
            f"zero, got {len(found)} with a norm of {size:g}."
        )
    return found


def _samples_of(covariance: Any, samples: float | None) -> float:
    if samples is None:
        samples = getattr(covariance, "samples", None)
        if samples is None:
            raise ValueError(
                "The covariance does not say of how many samples the gradient is the "
                "mean: pass samples=, math.inf where they are all there are."
            )
    if not samples >= 1:
        raise ValueError(f"samples must be at least 1, got {samples}.")
    return samples


def _ratio(noise: Estimate, along: float, samples: float, products: int) -> Estimate:
    """T / (D - T / n), with the standard error D / (D - T / n)^2 of T."""
    below = along - noise.value / samples
    count = noise.products + products
    low, high = noise.interval()
    if (along - low / samples) * (along - high / samples) <= 0:
        if below == 0:
            raise ValueError(
                f"g'Hg = {along:.3g} is what the noise of {samples} samples makes: the "
                "curvature along the gradient is not seen. Take more samples."
            )
        return Estimate(noise.value / below, math.inf, count, noise.degrees)
    error = abs(along) / below**2 * noise.standard_error
    return Estimate(noise.value / below, error, count, noise.degrees)
