"""Langevin dynamics: SGD with Gaussian noise of a chosen temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.langevin import langevin_step_
from ..ops.random import Noise
from ._checks import as_int, check_range

__all__ = ["Langevin"]


class Langevin(torch.optim.Optimizer):
    r"""SGD plus Gaussian noise: samples the density exp(-L / temperature).

    A step adds to the parameters noise of standard deviation
    `sqrt(2 * lr * temperature)`: the stochastic differential equation of the paper
    with isotropic noise, at `temperature` n = eta sigma^2 / 2S. As `lr` goes to 0 the
    parameters are distributed as exp(-L / temperature), whatever the learning rate.

    With momentum m the noise enters with the gradient,

        v <- m v + sqrt(lr) g - xi,   theta <- theta - sqrt(lr) v,
        xi ~ N(0, 2 (1 - m) temperature),

    and the density is the same. For on a quadratic L = c x^2 / 2 that recursion is the
    autoregression x_{t+1} = (1 + m - lr c) x_t - m x_{t-1} + sqrt(lr) xi, whose
    stationary variance is, with s^2 the variance of sqrt(lr) xi,

        (1 + m) s^2 / ((1 - m) lr c (2 (1 + m) - lr c)).

    It is temperature / c, as exp(-L / temperature) asks, to first order in lr exactly
    if s^2 = 2 lr (1 - m) temperature, and then at a finite learning rate equals

        temperature / c / (1 - lr c / (2 (1 + m))).

    So a finite learning rate makes the variance too large by lr c / 2 of itself without
    momentum, and by half of that for m near 1.

    **Schedules.** `torch.optim.SGD` has u = v / sqrt(lr) for its velocity, and at a
    constant learning rate both move alike. But in equilibrium u has the variance
    2 temperature / (lr (1 + m)): kept through a step from lr to 10 lr it is ten times
    too hot. The variance of v, 2 temperature / (1 + m), does not depend on lr, so that
    a changed learning rate leaves the velocities at their temperature (as if u were
    multiplied by sqrt(lr_old / lr_new)). A change of the temperature or of m does not:
    velocities then relax within some 1 / (1 - m) steps, those of lr = 0 included.

    **Noise.** A number is a function of the seed, of how many steps this optimizer has
    taken, of the parameter's place among all parameters of the groups in their order,
    and of the element; by Philox4x32-10 and Box and Muller. It does not depend on the
    device, dtype (but for rounding) or number of threads, nor on which other parameters
    have gradients. Replicas of a model need one `seed`.

    A parameter without a gradient is left alone, as by SGD: it gets no noise either.

    Args:
        params: parameters, or dictionaries of groups with their own `lr`,
            `temperature` or `momentum`.
        lr: learning rate, a number or a tensor.
        temperature: in units of the loss; 0 is SGD without noise.
        momentum: m, at least 0 and below 1.
        seed: of the noise, an integer of which 64 bits count; None draws one from
            PyTorch's default generator, once. `state_dict()` holds it and the number of
            steps, so that a resumed run continues exactly.

    Raises:
        ValueError: for a value out of range, complex or distributed parameters, or
            sparse gradients; from `step()` too, for options that were changed since.
        RuntimeError: if a step is captured in a CUDA graph, whose replays would repeat
            its noise.

    Example:
        >>> import torch, fastminima as fm
        >>> x = torch.full((10_000,), 3.0, requires_grad=True)
        >>> sampler = fm.optim.Langevin([x], lr=0.1, temperature=0.5, seed=0)
        >>> for _ in range(100):
        ...     sampler.zero_grad()
        ...     x.square().sum().div(2).backward()
        ...     sampler.step()
        >>> bool((x.var() / 0.5 - 1).abs() < 0.1)
        True

    Source: Jastrzebski et al. (2017), arXiv:1711.04623, section 2 (the density);
    the variance of a second-order autoregression: Box and Jenkins, Time Series
    Analysis, section 3.2; Salmon et al. (2011), doi:10.1145/2063384.2063405 (the
    numbers).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        temperature: float,
        momentum: float = 0.0,
        *,
        seed: int | None = None,
    ) -> None:
        self.seed = _drawn_seed() if seed is None else as_int("seed", seed)
        self.steps_taken = 0
        defaults = {"lr": lr, "temperature": temperature, "momentum": momentum}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it has them."""
        _checked_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            _check_parameters(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure`, if given, computes the loss that is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _refuse_capture(self.param_groups)
        _refuse_sparse(self.param_groups)
        options = [_checked_options(group) for group in self.param_groups]
        index = 0
        for group, numbers in zip(self.param_groups, options, strict=True):
            alike: dict[Any, list[tuple[int, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype), []).append((index, p))
                index += 1
            for some in alike.values():
                self._step(*numbers, *zip(*some, strict=True))
        self.steps_taken += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The usual state, with "seed" and "steps_taken"."""
        counters = {"seed": self.seed, "steps_taken": self.steps_taken}
        return {**super().state_dict(), **counters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, and go on with the noise of the saved run.

        Raises:
            ValueError: for a state without a seed, or without the steps taken.
        """
        missing = {"seed", "steps_taken"} - state_dict.keys()
        if missing:
            raise ValueError(
                f"The state has no {sorted(missing)}, without which the noise cannot "
                "continue. Load one that Langevin.state_dict() has made, or add them."
            )
        super().load_state_dict(state_dict)
        self.seed, self.steps_taken = state_dict["seed"], state_dict["steps_taken"]

    def __getstate__(self) -> dict[str, Any]:
        counters = {"seed": self.seed, "steps_taken": self.steps_taken}
        return {**super().__getstate__(), **counters}

    def _step(
        self,
        lr: float,
        temperature: float,
        momentum: float,
        indices: Sequence[int],
        params: Sequence[Tensor],
    ) -> None:
        """One step of parameters that share a device and a dtype."""
        deviation = math.sqrt(2 * (1 - momentum) * temperature)
        langevin_step_(
            params,
            [p.grad for p in params],
            [self._velocity(p) for p in params] if momentum else None,
            lr,
            momentum,
            Noise(self.seed, self.steps_taken, indices, deviation),
        )

    def _velocity(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(param)
        return state["velocity"]


def _drawn_seed() -> int:
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())


def _check_parameters(params: list[Tensor]) -> None:
    for p in params:
        if p.is_complex():
            raise ValueError(
                f"Langevin takes real parameters, got one of {p.dtype} and shape "
                f"{tuple(p.shape)}. Use torch.view_as_real."
            )
        if is_traceable_wrapper_subclass(p):
            raise ValueError(
                f"Langevin takes plain tensors, got a {type(p).__name__} of shape "
                f"{tuple(p.shape)}: an element's noise needs its place in the whole."
            )


def _refuse_capture(groups: list[dict[str, Any]]) -> None:
    is_on_gpu = any(p.is_cuda for group in groups for p in group["params"])
    if is_on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "A CUDA graph of Langevin's step would repeat its noise at every replay: "
            "steps are counted on the host. Call step() outside the graph."
        )


def _checked_options(group: dict[str, Any]) -> tuple[float, float, float]:
    """Learning rate, temperature and momentum of a group, which may change any time."""
    lr, temperature, momentum = (
        float(group[name]) for name in ("lr", "temperature", "momentum")
    )
    check_range("lr", lr, 0)
    check_range("temperature", temperature, 0)
    check_range("momentum", momentum, 0, below=1)
    return lr, temperature, momentum


def _refuse_sparse(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(
                    f"Langevin takes dense gradients, got a {p.grad.layout} one of "
                    f"shape {tuple(p.shape)}. Use Embedding(..., sparse=False)."
                )
