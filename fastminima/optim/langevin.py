"""Langevin dynamics: SGD with Gaussian noise of a chosen temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

__all__ = ["Langevin"]


class Langevin(torch.optim.Optimizer):
    r"""SGD plus Gaussian noise: samples the density exp(-L / temperature).

    A step adds to the parameters noise of standard deviation
    `sqrt(2 * lr * temperature)`: the stochastic differential equation of the paper
    with isotropic noise, at `temperature` n = eta sigma^2 / 2S. As `lr` goes to 0 the
    parameters are distributed as exp(-L / temperature), whatever the learning rate.

    With momentum m the update is that of `torch.optim.SGD`, noise entering with the
    gradient,

        v <- m v + g - xi / lr,   theta <- theta - lr v,
        xi ~ N(0, 2 lr (1 - m) temperature),

    and the density is the same. For on a quadratic L = c x^2 / 2 that recursion is the
    autoregression x_{t+1} = (1 + m - lr c) x_t - m x_{t-1} + xi, whose stationary
    variance is, with s^2 the variance of xi,

        (1 + m) s^2 / ((1 - m) lr c (2 (1 + m) - lr c)).

    It is temperature / c, as exp(-L / temperature) asks, to first order in lr exactly
    if s^2 = 2 lr (1 - m) temperature, and then at a finite learning rate equals

        temperature / c / (1 - lr c / (2 (1 + m))).

    So a finite learning rate makes the variance too large by lr c / 2 of itself without
    momentum, and by half of that for m near 1.

    A parameter without a gradient is left alone, as by SGD: it gets no noise either.

    Args:
        params: parameters, or dictionaries of groups with their own `lr`,
            `temperature` or `momentum`.
        lr: learning rate, a number or a tensor.
        temperature: in units of the loss; 0 is plain SGD.
        momentum: m, at least 0 and below 1.
        generator: source of the noise, on the device of the parameters; None is
            PyTorch's default generator. Its state is part of `state_dict()`, so that a
            resumed run continues exactly; with None, save `torch.get_rng_state()`.

    Raises:
        ValueError: for a value out of range, complex parameters, sparse gradients, or
            a generator on another device.

    Example:
        >>> import torch, fastminima as fm
        >>> x = torch.full((10_000,), 3.0, requires_grad=True)
        >>> noise = torch.Generator().manual_seed(0)
        >>> sampler = fm.optim.Langevin([x], lr=0.1, temperature=0.5, generator=noise)
        >>> for _ in range(100):
        ...     sampler.zero_grad()
        ...     x.square().sum().div(2).backward()
        ...     sampler.step()
        >>> bool((x.var() / 0.5 - 1).abs() < 0.1)
        True

    Source: Jastrzebski et al. (2017), arXiv:1711.04623, section 2 (the density);
    the variance of a second-order autoregression: Box and Jenkins, Time Series
    Analysis, section 3.2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        temperature: float,
        momentum: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        self.generator = generator
        defaults = {"lr": lr, "temperature": temperature, "momentum": momentum}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it has them."""
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            self._check_parameters(self.param_groups[-1]["params"])
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
        _refuse_sparse(self.param_groups)
        for group in self.param_groups:
            active = [p for p in group["params"] if p.grad is not None]
            for _, same in groupby(active, key=lambda p: (p.device, p.dtype)):
                self._step(group, list(same))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The usual state, and that of the generator as "generator"."""
        state = super().state_dict()
        if self.generator is not None:
            state["generator"] = self.generator.get_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, the generator's included.

        Raises:
            ValueError: if only one of the two optimizers has a generator.
        """
        has_state = "generator" in state_dict
        if has_state != (self.generator is not None):
            saved, here = ("with", "none") if has_state else ("without", "one")
            raise ValueError(
                f"The state was saved {saved} a generator, and this optimizer has "
                f"{here}: the noise would not continue. Make both with generator=, or "
                "both without."
            )
        super().load_state_dict(state_dict)
        if self.generator is not None:
            self.generator.set_state(state_dict["generator"].cpu())

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "generator": self.generator}

    def _step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """One step of parameters that share a device and a dtype."""
        lr, momentum = float(group["lr"]), group["momentum"]
        std = math.sqrt(2 * lr * (1 - momentum) * group["temperature"])
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        noise = self._noise(params) if std > 0 else None
        if momentum == 0:
            torch._foreach_add_(params, grads, alpha=-lr)
            if noise is not None:
                torch._foreach_add_(params, noise, alpha=std)
            return
        velocities = [self._velocity(p) for p in params]
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, grads)
        if noise is not None:
            torch._foreach_add_(velocities, noise, alpha=std / lr)
        torch._foreach_add_(params, velocities, alpha=-lr)

    def _noise(self, params: list[Tensor]) -> list[Tensor]:
        """Standard normal numbers in the shapes of `params`, drawn in one call."""
        flat = torch.randn(
            sum(p.numel() for p in params),
            generator=self.generator,
            device=params[0].device,
            dtype=params[0].dtype,
        )
        pieces = flat.split([p.numel() for p in params])
        return [piece.view(p.shape) for piece, p in zip(pieces, params, strict=True)]

    def _velocity(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        return state["momentum_buffer"]

    def _check_parameters(self, params: list[Tensor]) -> None:
        for p in params:
            if p.is_complex():
                raise ValueError(
                    f"Langevin takes real parameters, got one of {p.dtype} and shape "
                    f"{tuple(p.shape)}. Use torch.view_as_real."
                )
            if self.generator is not None and not _is_on(self.generator, p):
                raise ValueError(
                    f"The generator is on {self.generator.device} and a parameter on "
                    f"{p.device}. Make the generator with device={str(p.device)!r}."
                )


def _check_options(group: dict[str, Any]) -> None:
    for name, upper in (("lr", math.inf), ("temperature", math.inf), ("momentum", 1)):
        if not 0 <= group[name] < upper:
            raise ValueError(
                f"{name} must be at least 0 and below {upper}, got {group[name]}."
            )


def _refuse_sparse(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(
                    f"Langevin takes dense gradients, got a {p.grad.layout} one of "
                    f"shape {tuple(p.shape)}. Use Embedding(..., sparse=False)."
                )


def _is_on(generator: torch.Generator, p: Tensor) -> bool:
    """Whether a generator draws on a parameter's device; `cuda` is the present one."""
    device = generator.device
    if device.type != p.device.type:
        return False
    return device.index in (None, p.device.index)
