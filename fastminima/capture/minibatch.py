"""Gradient variance from the spread of several mini-batch gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._dtypes import accumulation_dtype
from .._parameters import tracked_parameters
from .graph.sharding import total_of

__all__ = ["MinibatchVariance"]


class MinibatchVariance:
    """Gradient variance of single samples, from gradients of whole mini-batches.

    Needs no per-sample gradient, so it serves any network, batch normalisation
    included. Call `update` after each backward pass at the *same* parameters, with
    `.grad` holding that batch's mean gradient alone. Holds two vectors of parameter
    size. With K batches of S_k samples drawn independently, and their weighted mean,

        tr Sigma = sum_k S_k |G_k - mean|^2 / (K - 1)
        |E g|^2 = |mean|^2 - tr Sigma / sum_k S_k

    are unbiased.

    Example:
        >>> import torch, fastminima as fm
        >>> model = torch.nn.Linear(3, 1)
        >>> variance = fm.MinibatchVariance(model)
        >>> for _ in range(4):
        ...     model.zero_grad()
        ...     model(torch.randn(8, 3)).mean().backward()
        ...     variance.update(batch_size=8)
        >>> variance.covariance_trace.dim()
        0
    """

    def __init__(self, model: nn.Module | Mapping[str, nn.Parameter]) -> None:
        self._parameters = tracked_parameters(model)
        self.reset()

    def reset(self) -> None:
        """Forget all batches, as after a step of the optimizer."""
        self._batches = 0
        self._samples = 0
        self._mean: dict[str, Tensor] = {}
        self._spread: Tensor | None = None  # sum_k S_k |G_k - mean|^2

    @torch.no_grad()
    def update(self, batch_size: int) -> None:
        """Take in the gradients that one backward pass over a batch left in `.grad`.

        Raises:
            ValueError: for a batch size below one, or when no parameter has a gradient.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        grads = {n: p.grad for n, p in self._parameters.items() if p.grad is not None}
        if not grads:
            raise ValueError(
                "No tracked parameter has a gradient; call update() after "
                "loss.backward() and before zero_grad()."
            )
        before, self._samples = self._samples, self._samples + batch_size
        self._batches += 1
        for name in dict.fromkeys([*self._mean, *grads]):
            grad = grads.get(name)
            mean = self._mean.get(name)
            if grad is not None:
                grad = grad.to_dense() if grad.is_sparse else grad
                grad = grad.to(accumulation_dtype(grad.dtype))
            if mean is None:
                assert grad is not None
                mean = self._mean[name] = torch.zeros_like(grad)
            # West (1979): one-pass weighted mean and sum of squares.
            change = (0 if grad is None else grad) - mean
            mean += change * (batch_size / self._samples)
            spread = total_of(change.double().square())
            spread *= batch_size * before / self._samples
            self._spread = spread if self._spread is None else self._spread + spread

    def __repr__(self) -> str:
        shown = f"{self._batches} batches, {self._samples} samples"
        if self._batches > 1:
            shown += f"; covariance_trace {self.covariance_trace:.4g}, "
            shown += f"signal {self.signal:.4g}, noise_scale {self.noise_scale:.4g}"
        return f"MinibatchVariance({shown})"

    def to_dict(self) -> dict[str, float]:
        """Numbers for a log line; those that need two batches only where there are."""
        row: dict[str, float] = {"batches": self._batches, "samples": self._samples}
        if self._batches > 1:
            for name in ("covariance_trace", "signal", "noise_scale"):
                row[name] = getattr(self, name).item()
        return row

    def state_dict(self) -> dict[str, Any]:
        """What was taken in so far: counts, and one vector of parameter size."""
        return {
            "batches": self._batches,
            "samples": self._samples,
            "mean": {name: mean.clone() for name, mean in self._mean.items()},
            "spread": None if self._spread is None else self._spread.clone(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: for one of another model.
        """
        mean: dict[str, Tensor] = {}
        for name, saved in state_dict["mean"].items():
            mine = self._parameters.get(name)
            if mine is None or mine.shape != saved.shape:
                met = "no such parameter" if mine is None else f"{tuple(mine.shape)}"
                raise ValueError(
                    f"The state has a mean gradient for {name!r} of shape "
                    f"{tuple(saved.shape)}, and this model has {met}. Load a state of "
                    "the same model."
                )
            dtype = accumulation_dtype(mine.dtype)
            mean[name] = saved.to(mine.device, dtype, copy=True)
        spread = state_dict["spread"]
        if spread is not None and mean:
            spread = spread.to(next(iter(mean.values())).device, copy=True)
        self._mean, self._spread = mean, spread
        self._batches, self._samples = state_dict["batches"], state_dict["samples"]

    @property
    def covariance_trace(self) -> Tensor:
        """Trace of Sigma, the covariance of one sample's gradient, 0-d; unbiased.

        Raises:
            ValueError: with fewer than two batches.
        """
        if self._batches < 2 or self._spread is None:
            raise ValueError(
                f"A variance needs at least 2 mini-batches, got {self._batches}. Call "
                "update() after more backward passes at the same parameters."
            )
        return (self._spread / (self._batches - 1)).to(self._dtype)

    @property
    def signal(self) -> Tensor:
        """|E g|^2, 0-d, unbiased; it may come out negative."""
        total = torch.stack(
            [total_of(m.double().square()) for m in self._mean.values()]
        )
        noise = self.covariance_trace.double() / self._samples
        return (total.sum() - noise).to(self._dtype)

    @property
    def noise_scale(self) -> Tensor:
        """Trace of Sigma over |E g|^2, in samples.

        Source: McCandlish et al. (2018), arXiv:1812.06162, "simple noise scale".
        """
        return self.covariance_trace / self.signal

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self._mean.values())).dtype
