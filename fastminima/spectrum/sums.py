"""Sums over all eigenvalues: log-determinant, effective dimension, stability of SGD."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from ..theory import noise_factor
from ._problem import Problem
from ._spectral_sum import Function, sum_over_spectrum
from .results import Estimate

__all__ = [
    "effective_dimension",
    "log_determinant",
    "spectral_sum",
    "stability_ratio",
]


def spectral_sum(
    H: Any,
    function: Function,
    products: int = 200,
    seed: int = 0,
    *,
    rtol: float | None = None,
    steps: int | None = None,
) -> Estimate:
    """The sum of a function of all eigenvalues, tr f(H).

    Lanczos from a random vector gives nodes and weights of the eigenvalues that it
    sees; the mean of f over them, times P, is what one probe says. Outlying
    eigenvalues, where they make much of the variance, are treated exactly in a Krylov
    space, and probes are drawn in its complement. Exact, from P products, if `products`
    >= P.

    Quadrature with so many steps is off where f is not smooth between eigenvalues (a
    threshold amid many, a pole nearby): `truncation` of the result, what the second
    half of the steps has changed or more, widens its interval.

    Args:
        H: Anything symmetric with `.shape` and `@`.
        function: f of a float64 tensor of eigenvalues, elementwise, finite on the
            spectrum.
        products: How many matrix-vector products to spend at most, at least 12; those
            by which an operator looks at itself come on top.
        seed: Of the random vectors; global generators are not touched.
        rtol: Stop sooner, once the interval that holds the value with 95 % reaches no
            further than this share of it, and there are four probes.
        steps: Of Lanczos for each probe; as many as make truncation small beside the
            standard error if None, but a quarter of the products at most.

    Raises:
        ValueError: An argument out of its range, a function that is not finite at what
            is about an eigenvalue, or a matrix that is not symmetric.

    Example:
        >>> import torch
        >>> H = torch.diag(torch.tensor([-2.0, 0.5, 4.0]))
        >>> spectral_sum(H, lambda values: (values > 1).double())
        Estimate(1 exactly; 3 products)

    Source: Ubaru, Chen, Saad (2017), SIAM J. Matrix Anal. Appl. 38(4), for the
    quadrature; Chen and Hallman (2023), arXiv:2205.01736, for the Krylov space.
    """
    return sum_over_spectrum(Problem(H, seed), function, products, rtol, steps)


def log_determinant(
    H: Any,
    damping: float = 0.0,
    above: float | None = None,
    products: int = 200,
    seed: int = 0,
    *,
    rtol: float | None = None,
    steps: int | None = None,
) -> Estimate:
    """The sum of log(eigenvalue + damping): log det (H + damping I), natural.

    Of a Hessian at a minimum it says how wide the bowl is: its volume under the density
    exp(-L / n) is sqrt((2 pi n)^q / det H) over q directions. Eigenvalues near zero
    count most, so say what they are: with `damping` each direction has that curvature
    at least (a Gaussian prior), with `above` those of less are left out. Volumes with
    the number q of what is counted are a `spectral_sum`.

    Args:
        H: Anything symmetric with `.shape` and `@`.
        damping: Added to every eigenvalue, not negative.
        above: Count only eigenvalues of H (without damping) above this.
        products: How many products to spend at most, as for `spectral_sum`.
        seed: Of the random vectors; global generators are not touched.
        rtol: Stop sooner, as for `spectral_sum`.
        steps: Of Lanczos for each probe, as for `spectral_sum`.

    Raises:
        ValueError: H + damping I is met not to be positive definite, to rounding, in
            what is counted; and as `spectral_sum`. An eigenvalue that is negative and
            so near zero that no probe shows it is not met.

    Example:
        >>> import torch
        >>> H = torch.diag(torch.tensor([0.0, 1.0, 4.0]))
        >>> round(log_determinant(H, above=0.5).value, 6)  # log 4
        1.386294
        >>> round(log_determinant(H, damping=0.5).value, 6)  # log(0.5 * 1.5 * 4.5)
        1.216395

    Source: Jastrzebski et al. (2017), arXiv:1711.04623, for bowls; see `spectral_sum`.
    """
    _check_range(damping, above)
    problem = Problem(H, seed)

    def logarithm(values: Float64[Tensor, " values"]) -> Tensor:
        is_counted = _counted(values, above)
        _refuse_negative(problem, values, is_counted, damping, above)
        return torch.where(is_counted, values + damping, 1.0).log()

    return sum_over_spectrum(problem, logarithm, products, rtol, steps)


def effective_dimension(
    H: Any,
    damping: float,
    above: float | None = None,
    products: int = 200,
    seed: int = 0,
    *,
    rtol: float | None = None,
    steps: int | None = None,
) -> Estimate:
    """How many directions the data determine: the sum of lambda / (lambda + damping).

    A direction counts 1 where its curvature is much larger than that of the prior
    (weight decay, where H is of the mean loss), and 0 where it is much smaller. A pure
    number, at most P for a matrix without negative eigenvalues. Those between -damping
    and 0 count as they are, below 0, unless `above=0` leaves them out.

    Args:
        H: Anything symmetric with `.shape` and `@`; a Gauss-Newton matrix has no
            negative eigenvalues.
        damping: Positive, in units of an eigenvalue.
        above: Count only eigenvalues of H above this.
        products: How many products to spend at most, as for `spectral_sum`.
        seed: Of the random vectors; global generators are not touched.
        rtol: Stop sooner, as for `spectral_sum`.
        steps: Of Lanczos for each probe, as for `spectral_sum`.

    Raises:
        ValueError: A damping that is not positive, an eigenvalue that is counted at or
            below -damping; and as `spectral_sum`.

    Example:
        >>> import torch
        >>> H = torch.diag(torch.tensor([9.0, 1.0, 0.0]))
        >>> round(effective_dimension(H, damping=1.0).value, 6)
        1.4

    Source: MacKay (1992), Neural Computation 4(3), "Bayesian interpolation"; Maddox,
    Benton, Wilson (2020), arXiv:2003.02139.
    """
    _check_range(damping, above)
    if damping == 0:
        raise ValueError(
            "damping must be positive, got 0: without it every direction counts 1."
        )
    problem = Problem(H, seed)

    def share(values: Float64[Tensor, " values"]) -> Tensor:
        is_counted = _counted(values, above)
        _refuse_negative(problem, values, is_counted, damping, above)
        return torch.where(is_counted, values / (values + damping), 0.0)

    return sum_over_spectrum(problem, share, products, rtol, steps)


def stability_ratio(
    H: Any,
    learning_rate: float,
    batch_size: int,
    dataset_size: int | None = None,
    products: int = 200,
    seed: int = 0,
    *,
    rtol: float | None = None,
    steps: int | None = None,
) -> Estimate:
    """K of `theory.stability_ratio`, of a matrix instead of its eigenvalues.

    K = (1/S - 1/N) sum_i eta lambda_i / (2 - eta lambda_i) over the positive
    eigenvalues: at 1 SGD diverges on a squared loss by its own noise. Infinite, and no
    estimate, as soon as some vector x has eta x'Hx >= 2 |x|^2, for then eta lambda >= 2
    for the largest: plain gradient descent diverges too.

    Args:
        H: Anything symmetric with `.shape` and `@`.
        learning_rate: eta, not negative.
        batch_size: S.
        dataset_size: N, where batches are drawn without replacement.
        products: How many products to spend at most, as for `spectral_sum`.
        seed: Of the random vectors; global generators are not touched.
        rtol: Stop sooner, as for `spectral_sum`.
        steps: Of Lanczos for each probe, as for `spectral_sum`.

    Raises:
        ValueError: A learning rate that is negative or not finite, a batch larger than
            the data set; and as `spectral_sum`.

    Example:
        >>> import torch
        >>> H = torch.eye(20)
        >>> round(stability_ratio(H, learning_rate=0.5, batch_size=10).value, 6)
        0.666667
        >>> stability_ratio(H, learning_rate=2.0, batch_size=10).value
        inf

    Source: see `theory.stability_ratio`.
    """
    if not 0 <= learning_rate < math.inf:
        raise ValueError(
            f"learning_rate must be finite and not negative, got {learning_rate}."
        )
    factor = noise_factor(batch_size, dataset_size)
    problem = Problem(H, seed)

    def feedback(values: Float64[Tensor, " values"]) -> Tensor:
        rates = learning_rate * values.clamp_min(0)
        if bool((rates >= 2).any()):
            raise _Diverges
        return rates / (2 - rates) * factor

    try:
        return sum_over_spectrum(problem, feedback, products, rtol, steps)
    except _Diverges:
        return Estimate(math.inf, 0.0, problem.products)


class _Diverges(Exception):
    """An eigenvalue is at or beyond 2 / learning rate."""


def _check_range(damping: float, above: float | None) -> None:
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be finite and not negative, got {damping}.")
    if above is not None and not -damping <= above < math.inf:
        raise ValueError(
            f"above must be finite and at least -damping, {-damping}, got {above}."
        )


def _counted(values: Float64[Tensor, " values"], above: float | None) -> Tensor:
    if above is None:
        return torch.ones_like(values, dtype=torch.bool)
    return values > above


def _refuse_negative(
    problem: Problem,
    values: Float64[Tensor, " values"],
    is_counted: Tensor,
    damping: float,
    above: float | None,
) -> None:
    """ValueError for what is not positive, or is not to be told from zero."""
    least = problem.smallest * float(values.abs().max())
    lowest = float(torch.where(is_counted, values, math.inf).min())
    if lowest + damping > least:
        return
    limit, threshold = max(-lowest, 0.0) + least, max(least, above or 0.0)
    raise ValueError(
        f"{problem.name} has an eigenvalue of about {lowest:.3g}, which with a damping "
        f"of {damping:g} is not positive: rounding leaves {least:.1g}. Pass a damping "
        f"above {limit:.2g}, or above={threshold:.2g} or more to count larger ones "
        "only; or take fm.GaussNewton, which has no negative ones."
    )
