"""Closed forms for where SGD ends: bowls, stationary variances, edge of stability.

Formulas, not measurements: they take a Hessian's eigenvalues and the three factors, and
say what stochastic gradient descent does near a minimum if the model holds: SGD without
momentum, one quadratic bowl. Each is checked against simulation in tests/theory;
docs/theory.md says when each holds.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "bowl_occupancy",
    "critical_learning_rate",
    "crossover_temperature",
    "edge_of_stability",
    "noise_factor",
    "stability_ratio",
    "stationary_variances",
]


def bowl_occupancy(
    losses: Float[Tensor, " bowls"],
    log_determinants: Float[Tensor, " bowls"],
    temperature: float,
) -> Float[Tensor, " bowls"]:
    """Probability of each minimum under the density exp(-L / temperature).

    Every minimum counts as the quadratic bowl L + z'Hz / 2, and its mass is
    proportional to exp(-L / n) / sqrt(det H): flat bowls win when it is hot, deep ones
    when it is cold.

    Args:
        losses: at the minima.
        log_determinants: log det H there, over the same directions in each.
        temperature: n, above 0; `fm.three_factors(...).temperature`.

    Raises:
        ValueError: for a temperature that is not positive.

    Example:
        >>> import torch
        >>> from fastminima.theory import bowl_occupancy
        >>> flat_and_sharp = torch.tensor([1.0, 16.0]).log()
        >>> bowl_occupancy(torch.tensor([0.05, 0.0]), flat_and_sharp, 0.05)
        tensor([0.5954, 0.4046])

    Source: Jastrzebski et al. (2017), arXiv:1711.04623, theorem on the probability of
    ending in a minimum (Laplace's approximation of its basin).
    """
    if not temperature > 0:
        raise ValueError(f"A temperature must be positive, got {temperature}.")
    return torch.softmax(-losses / temperature - log_determinants / 2, dim=0)


def crossover_temperature(
    loss_difference: float, log_determinant_difference: float
) -> float:
    """Temperature above which a flatter but higher minimum is the more probable one.

    (L_flat - L_sharp) / log sqrt(det H_sharp / det H_flat).

    Args:
        loss_difference: L_flat - L_sharp, not negative.
        log_determinant_difference: log det H_sharp - log det H_flat, positive.

    Raises:
        ValueError: for differences of the other sign.

    Example:
        >>> import math
        >>> from fastminima.theory import crossover_temperature
        >>> round(crossover_temperature(0.05, math.log(16)), 4)
        0.0361

    Source: Jastrzebski et al. (2017), arXiv:1711.04623.
    """
    if loss_difference < 0 or not log_determinant_difference > 0:
        raise ValueError(
            "The first minimum must be higher and flatter than the second, got a loss "
            f"difference of {loss_difference} and a log-determinant difference of "
            f"{log_determinant_difference}. Exchange the two, or one always wins."
        )
    return 2 * loss_difference / log_determinant_difference


def stability_ratio(
    eigenvalues: Float[Tensor, " modes"],
    learning_rate: float,
    batch_size: int,
    dataset_size: int | None = None,
) -> float:
    """The ratio K of the gradient noise that a minimum's own fluctuations make.

    K = (1/S - 1/N) sum_i eta lambda_i / (2 - eta lambda_i). Near a minimum of the
    squared loss the noise grows with the distance from it; 1 / (1 - K) is by how much
    this feedback raises the stationary variance, and at K = 1 there is none: SGD
    diverges. Infinite when eta lambda >= 2 for some mode, where plain gradient descent
    diverges. For small learning rates K is (eta / S) tr H / 2. A pure number. NaN for
    a spectrum that has one.

    Args:
        eigenvalues: of the Hessian; those not positive are left out. Of the largest
            ones only, K is a lower bound.
        learning_rate: eta, not negative.
        batch_size: S.
        dataset_size: N, where batches are drawn without replacement.

    Raises:
        ValueError: for a negative or infinite learning rate, or a batch larger than
            the data set.

    Example:
        >>> import torch
        >>> from fastminima.theory import stability_ratio
        >>> stability_ratio(torch.ones(20), learning_rate=0.5, batch_size=10)
        0.666...

    Source: the Gaussian case of the linear stability of SGD, Wu, Ma and E (2018),
    "How SGD selects the global minima in over-parameterized learning"; the sum follows
    from E[x x'Z x x'] = tr(HZ) H + 2 HZH with the last term, of relative order
    1 / modes, left out.
    """
    if not 0 <= learning_rate < math.inf:
        raise ValueError(
            f"learning_rate must be finite and not negative, got {learning_rate}."
        )
    if bool(eigenvalues.isnan().any()):
        return math.nan
    rates = learning_rate * eigenvalues[eigenvalues > 0].double()
    if bool((rates >= 2).any()):
        return math.inf
    return noise_factor(batch_size, dataset_size) * (rates / (2 - rates)).sum().item()


def critical_learning_rate(
    eigenvalues: Float[Tensor, " modes"],
    batch_size: int,
    dataset_size: int | None = None,
) -> float:
    """Learning rate at which SGD on a squared loss starts to diverge, K = 1.

    For small batches about 2 S / tr H; for the full batch 2 / lambda_max. Of the
    largest eigenvalues only, it is an upper bound.

    Raises:
        ValueError: if no eigenvalue is positive, or a batch is larger than the data
            set.

    Example:
        >>> import torch
        >>> from fastminima.theory import critical_learning_rate
        >>> round(critical_learning_rate(torch.ones(400), batch_size=1), 4)
        0.005
        >>> critical_learning_rate(torch.ones(400), batch_size=50, dataset_size=50)
        2.0

    Source: see `stability_ratio`.
    """
    largest = eigenvalues.max().item() if len(eigenvalues) else 0.0
    if not largest > 0:
        raise ValueError(
            f"The largest of {len(eigenvalues)} eigenvalues is {largest}. An edge of "
            "stability needs a positive one."
        )
    low, high = 0.0, 2 / largest
    if noise_factor(batch_size, dataset_size) == 0:
        return high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        below = stability_ratio(eigenvalues, middle, batch_size, dataset_size) < 1
        low, high = (middle, high) if below else (low, middle)
    return low


def edge_of_stability(
    learning_rate: float, momentum: float = 0.0, dampening: float = 0.0
) -> float:
    """The largest curvature at which full-batch gradient descent does not diverge.

    (2 + 2 momentum) / ((1 - dampening) learning_rate), for steps as `torch.optim.SGD`
    takes them: 2 / learning_rate without momentum. Adam averages its gradients, so it
    is that of momentum and dampening beta1: 38 / learning_rate for 0.9, a bound on the
    preconditioned Hessian (`preconditioner`).

    Raises:
        ValueError: for a learning rate that is not positive, or a momentum or dampening
            outside [0, 1).

    Example:
        >>> from fastminima.theory import edge_of_stability
        >>> edge_of_stability(0.1)
        20.0
        >>> round(edge_of_stability(1.0, momentum=0.9, dampening=0.9), 6)  # Adam
        38.0

    Source: Cohen et al. (2021), arXiv:2103.00065, appendix B; Cohen et al. (2022),
    arXiv:2207.14484, for Adam.
    """
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate must be positive, got {learning_rate}.")
    for name, value in (("momentum", momentum), ("dampening", dampening)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {value}.")
    return (2 + 2 * momentum) / ((1 - dampening) * learning_rate)


def stationary_variances(
    eigenvalues: Float[Tensor, " modes"],
    learning_rate: float,
    batch_size: int,
    residual_variance: float = 1.0,
    dataset_size: int | None = None,
) -> Float[Tensor, " modes"]:
    """Variance of the parameters along each Hessian eigenvector, at stationarity.

    The gradient noise of a squared loss with residuals of variance sigma^2 has
    covariance sigma^2 H at the minimum, so SGD is the Ornstein-Uhlenbeck process

        E z_i^2 = eta sigma^2 (1/S - 1/N) / ((2 - eta lambda_i) (1 - K)),

    eta sigma^2 / 2S for small learning rates, the same in every direction: the loss
    above the minimum is then (eta sigma^2 / 4S) tr H. K is `stability_ratio`. In units
    of the parameters squared.

    NaN where a direction has no stationary state, the others being what they are
    without it: lambda_i = 0 has neither force nor noise and stays where it started,
    lambda_i < 0 is left exponentially (and takes SGD away from this minimum, so the
    others hold for a while only). It takes some 1 / (eta lambda_i) steps to get there:
    directions with small positive lambda_i are not there yet.

    Args:
        eigenvalues: of the Hessian, all of them: K is a sum over them.
        learning_rate: eta.
        batch_size: S.
        residual_variance: sigma^2, in units of the loss: of y - f under the loss
            (y - f)^2 / 2. Not the variance of the gradient.
        dataset_size: N, where batches are drawn without replacement.

    Raises:
        ValueError: at or beyond the edge of stability, K >= 1 (which includes
            eta lambda_i >= 2 for any i), where no direction has a stationary state.

    Example:
        >>> import torch
        >>> from fastminima.theory import stationary_variances
        >>> stationary_variances(torch.tensor([1.0, 0.1]), 0.1, 10)
        tensor([0.0053, 0.0051])
        >>> stationary_variances(torch.tensor([1.0, 0.0, -0.5]), 0.1, 10)
        tensor([0.0053,    nan,    nan])

    Source: Jastrzebski et al. (2018), ICANN, "Width of Minima Reached by SGD is
    Influenced by Learning Rate to Batch Size Ratio" (C = H, continuous time).
    """
    ratio = stability_ratio(eigenvalues, learning_rate, batch_size, dataset_size)
    if ratio >= 1:
        raise ValueError(
            f"K = {ratio:.3g} at learning rate {learning_rate}: SGD diverges. Take one "
            "below critical_learning_rate(...)."
        )
    if residual_variance < 0:
        raise ValueError(
            f"residual_variance must not be negative, got {residual_variance}."
        )
    rates = learning_rate * eigenvalues
    noise = learning_rate * residual_variance * noise_factor(batch_size, dataset_size)
    variances = noise / (2 - rates) / (1 - ratio)
    return variances.masked_fill(~(rates > 0), math.nan)


def noise_factor(batch_size: int, dataset_size: int | None) -> float:
    """1/S - 1/N: the covariance of a mini-batch's mean over that of one sample.

    Zero for the full batch; 1/S where batches come from a stream.

    Raises:
        ValueError: for a batch that is empty, or larger than the data set.

    Example:
        >>> from fastminima.theory import noise_factor
        >>> noise_factor(25, 100)
        0.03

    Source: Cochran (1977), "Sampling Techniques", theorem 2.2; exact for a covariance
    with N - 1 in its denominator.
    """
    if batch_size < 1 or (dataset_size is not None and dataset_size < batch_size):
        raise ValueError(
            f"Batches need 1 <= batch_size <= dataset_size, got {batch_size} of "
            f"{dataset_size}."
        )
    return 1 / batch_size - (0.0 if dataset_size is None else 1 / dataset_size)
