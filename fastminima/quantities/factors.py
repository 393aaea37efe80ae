"""Quantities of the paper, derived from an optimizer and gradient statistics."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "ThreeFactors",
    "as_index",
    "has_options_of_others",
    "is_known_as_sgd",
    "noise_scale",
    "takes_signs",
    "three_factors",
]

# Options that only optimizers have which rescale the gradient elementwise.
# Options that only optimizers have whose steps are no multiples of averaged gradients.
_ADAPTIVE_OPTIONS = ("betas", "eps", "alpha", "etas", "history_size")
# Names of optimizers that step by signs: Lion, FusedLion, SignSGD, Signum, signSGD.
_SIGNS = re.compile(r"(Lion|LION|Sign|Signum)(?![a-z])|^sign(?![a-z])")


@runtime_checkable
class _Statistics(Protocol):
    """What is read from a `GradientStatistics`."""

    @property
    def count(self) -> int: ...
    @property
    def parameter_count(self) -> int: ...
    @property
    def covariance_trace(self) -> Tensor: ...
    @property
    def mean_grad_sq_norm(self) -> Tensor: ...


@dataclass(frozen=True, repr=False)
class ThreeFactors:
    """Learning rate, batch size and gradient variance: what decides where SGD ends.

    Attributes:
        learning_rate: eta, of the update theta <- theta - eta v.
        batch_size: S, samples averaged in one gradient.
        gradient_variance: sigma^2, variance of one sample's gradient *per parameter*,
            tr(Sigma) / (number of parameters). May be NaN or infinite, and then so is
            the temperature.
        momentum: m of the heavy ball v <- m v + g (Nesterov's has the same ratio).
        dataset_size: N when batches are drawn without replacement; None for a stream
            or for drawing with replacement.

    Raises:
        ValueError: for a value outside its range.

    Example:
        >>> import fastminima as fm
        >>> factors = fm.ThreeFactors(0.1, 50, gradient_variance=2.0)
        >>> round(factors.ratio, 6), round(factors.temperature, 6)
        (0.002, 0.002)
        >>> round(fm.ThreeFactors(0.1, 50, 2.0, momentum=0.9).ratio, 6)
        0.02

    Source: Jastrzebski et al. (2017), arXiv:1711.04623. Its two theorems differ by a
    factor of two in the temperature; eta sigma^2 / 2S is the one that simulation
    confirms (tests/theory/test_two_bowls.py).
    """

    learning_rate: float
    batch_size: int
    gradient_variance: float
    momentum: float = 0.0
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(
                f"learning_rate must be finite and not negative, got "
                f"{self.learning_rate}."
            )
        if as_index(self.batch_size, "batch_size") < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        if self.gradient_variance < 0:
            raise ValueError(
                f"gradient_variance must not be negative, got {self.gradient_variance}."
            )
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"momentum must be at least 0 and below 1, got {self.momentum}."
            )
        if self.dataset_size is None:
            return
        if as_index(self.dataset_size, "dataset_size") < self.batch_size:
            raise ValueError(
                f"dataset_size {self.dataset_size} is smaller than batch_size "
                f"{self.batch_size}. Give the number of training samples, or None "
                "for a stream."
            )

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in vars(self).items()]
        derived = f"ratio {self.ratio:.4g}, temperature {self.temperature:.4g}"
        return f"ThreeFactors({', '.join(given)}; {derived})"

    def to_dict(self) -> dict[str, float | None]:
        """Numbers for a log line, or a row of a table; ratio and temperature too."""
        return {**vars(self), "ratio": self.ratio, "temperature": self.temperature}

    @property
    def ratio(self) -> float:
        """The noise factor eta / (1 - m) * (1/S - 1/N).

        The paper's eta / S, without momentum and for N much larger than S. Batches
        drawn without replacement have covariance Sigma (1/S - 1/N), which vanishes
        for the full batch; momentum m takes steps that add up to eta / (1 - m).
        """
        unseen = 0.0 if self.dataset_size is None else 1 / self.dataset_size
        rate = self.learning_rate / (1 - self.momentum)
        return rate * (1 / self.batch_size - unseen)

    @property
    def temperature(self) -> float:
        """The temperature n = ratio * sigma^2 / 2, in units of the loss.

        Under isotropic gradient noise SGD samples the density exp(-L / n), as the
        learning rate goes to 0.
        """
        return self.ratio * self.gradient_variance / 2


def three_factors(
    optimizer: torch.optim.Optimizer,
    stats: _Statistics,
    dataset_size: int | None = None,
) -> ThreeFactors:
    """The three factors of the step that `optimizer` takes with these statistics.

    Dampening d scales every gradient that enters the velocity by 1 - d, so that
    `learning_rate` is eta (1 - d). Nesterov's momentum moves each gradient by
    eta (1 + m + m^2 + ...) in all, the same as the heavy ball. Noise that
    `fm.optim.Langevin` adds is not counted.

    Args:
        optimizer: SGD, or one with its options "lr", "momentum" and "dampening".
        stats: of one batch of the size trained with; needs two samples or more.
        dataset_size: N, where batches are drawn without replacement.

    Raises:
        ValueError: if parameter groups differ in learning rate, momentum or
            dampening, or the optimizer's steps are no multiples of gradients (Adam,
            RMSprop, Lion, LBFGS).

    Example:
        >>> import torch, fastminima as fm
        >>> from types import SimpleNamespace
        >>> sgd = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
        >>> stats = SimpleNamespace(count=10, parameter_count=3, covariance_trace=6.0)
        >>> round(fm.three_factors(sgd, stats).temperature, 6)
        0.01
    """
    rate, momentum, dampening = _common_options(optimizer)
    trace = float(stats.covariance_trace)
    # Unbiased, so rounding can take a vanishing variance just below zero.
    trace = 0.0 if trace < 0 else trace
    return ThreeFactors(
        learning_rate=rate * (1 - dampening if momentum else 1),
        batch_size=_behind_mean(stats),
        gradient_variance=trace / stats.parameter_count,
        momentum=momentum,
        dataset_size=dataset_size,
    )


def noise_scale(
    stats: _Statistics | Iterable[_Statistics],
) -> Float[Tensor, ""]:
    """Batch size, in samples, at which gradient noise and signal have equal power.

    tr(Sigma) / |G|^2, each estimated without bias. Their ratio is biased, so give the
    statistics of several steps: numerator and denominator are averaged before they
    are divided. It can come out negative when the batches are too small to see the
    signal.

    Raises:
        ValueError: for statistics of a single sample, or none at all.

    Example:
        >>> import torch, fastminima as fm
        >>> from types import SimpleNamespace
        >>> stats = SimpleNamespace(count=4, covariance_trace=torch.tensor(8.0),
        ...                         mean_grad_sq_norm=torch.tensor(3.0))
        >>> fm.noise_scale([stats, stats])
        tensor(8.)

    Source: McCandlish et al. (2018), arXiv:1812.06162, "simple noise scale" and
    appendix A.1.
    """
    steps = list(stats) if isinstance(stats, Iterable) else [stats]
    if not steps:
        raise ValueError("A noise scale needs the statistics of at least one step.")
    noise = torch.stack([s.covariance_trace for s in steps])
    signal = torch.stack(
        [s.mean_grad_sq_norm - s.covariance_trace / _behind_mean(s) for s in steps]
    )
    return noise.mean() / signal.mean()


def takes_signs(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer steps by signs, as far as its name says: Lion, SignSGD."""
    return any(_SIGNS.search(kind.__name__) for kind in type(optimizer).__mro__)


def has_options_of_others(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is no multiple of an average of gradients, as the options say."""
    groups = optimizer.param_groups
    return any(option in group for group in groups for option in _ADAPTIVE_OPTIONS)


def is_known_as_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is SGD by its name; others may only have its options."""
    kinds = type(optimizer).__mro__
    return any(
        "SGD" in kind.__name__ or kind.__module__.startswith("fastminima.")
        for kind in kinds
    )


def _behind_mean(stats: _Statistics) -> int:
    """Samples behind the mean gradient: more than `count` where some were drawn."""
    return getattr(stats, "all_count", stats.count)


def _common_options(optimizer: torch.optim.Optimizer) -> tuple[float, float, float]:
    """Learning rate, momentum and dampening, the same for every parameter group."""
    if takes_signs(optimizer):
        raise ValueError(
            f"{type(optimizer).__name__} steps by the signs of gradients, so eta / S "
            "does not describe its noise. Use SGD, or look at the noise scale of signs."
        )
    found: list[tuple[float, float, float]] = []
    for group in optimizer.param_groups:
        adaptive = [name for name in _ADAPTIVE_OPTIONS if name in group]
        if adaptive:
            how = "rescales gradients"
            if adaptive[0] == "history_size":
                how = "multiplies gradients by a matrix"
            raise ValueError(
                f"{type(optimizer).__name__} {how} (it has the option "
                f"{adaptive[0]!r}), so eta / S does not describe its noise. Use SGD, "
                "or build fm.ThreeFactors from an effective learning rate."
            )
        rate, momentum, dampening = (
            _option(group, n) for n in ("lr", "momentum", "dampening")
        )
        found.append((rate, momentum, dampening))
    for name, values in zip(
        ("learning rates", "momenta", "dampenings"),
        zip(*found, strict=True),
        strict=True,
    ):
        if len(set(values)) > 1:
            raise ValueError(
                f"The parameter groups have different {name}: {values}. There is no "
                "single ratio; make one fm.ThreeFactors for each group."
            )
    return found[0]


def _option(group: dict[str, Any], name: str) -> float:
    return float(group["lr"] if name == "lr" else group.get(name, 0.0))


def as_index(value: Any, name: str) -> int:
    """`value` as an int, refusing anything that is not a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}.") from None
