"""SVAG: simulates the stochastic differential equation of SGD from two batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["SVAG"]


class SVAG(torch.optim.Optimizer):
    r"""Stochastic variance amplified gradient: SGD's noise at a smaller step.

    One step takes the gradients g1 and g2 of two independent batches at the same
    parameters and moves by

        theta <- theta - (lr / l) g,   g = (1 + s) / 2 g1 + (1 - s) / 2 g2,
        s = sqrt(2 l - 1).

    g has the mean of a gradient and l times its covariance, so that l steps have drift
    and noise of one step of SGD at `lr`: as l grows they tend to the differential
    equation dx = -grad L dt + sqrt(lr Sigma / S) dW over a time of `lr`. If training
    with l = 1, which is SGD on g1, goes as with larger l, the equation describes SGD.

    Call `step()` after each of the two backward passes, with `zero_grad()` before each:
    the first call keeps g1 and moves nothing, the second moves. Or call `step(closure)`
    once; it calls the closure twice, which must draw a new batch each time. A step
    costs two batches and l steps count for one of SGD: epochs are 2 l times as many.

    There is no momentum: a velocity that decays by m a step remembers 1 / (1 - m)
    steps, at a rate of lr / l a time that shrinks with l, so the limit would be another
    equation for each l. BatchNorm sees both batches. Batches drawn without replacement
    from N samples have noise 1/S - 1/N instead of 1/S, and two disjoint ones in a row
    are not quite independent.

    Args:
        params: parameters, or dictionaries of groups with their own `lr`.
        lr: learning rate of the SGD that is simulated.
        l: how many steps make one of SGD, at least 1; the same for all groups. It
            need not be an integer.

    Raises:
        ValueError: for a value out of range, sparse gradients, or a closure between
            the two halves of a step.

    Example:
        >>> import torch, fastminima as fm
        >>> x = torch.tensor([1.0], requires_grad=True)
        >>> svag = fm.optim.SVAG([x], lr=0.1, l=5)  # s = 3: g = 2 g1 - g2
        >>> for gradient in (3.0, 1.0):
        ...     svag.zero_grad()
        ...     (gradient * x).sum().backward()
        ...     svag.step()
        ...     print(round(x.item(), 6))
        1.0
        0.9

    Source: Li, Malladi, Arora (2021), arXiv:2102.12470.
    """

    def __init__(self, params: Iterable[Any], lr: float | Tensor, l: float) -> None:
        super().__init__(params, {"lr": lr, "l": l, "has_first": False})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with an `lr` of its own where it has one."""
        # Not that of `defaults`: a loaded state may have another.
        l = self.param_groups[0]["l"] if self.param_groups else self.defaults["l"]
        group = {**self.defaults, "l": l, **param_group}
        if not 0 <= group["lr"] < math.inf:
            raise ValueError(f"lr must be at least 0 and finite, got {group['lr']}.")
        if not 1 <= group["l"] < math.inf:
            raise ValueError(f"l must be at least 1 and finite, got {group['l']}.")
        if group["l"] != l:
            raise ValueError(
                f"All groups of an SVAG have one l, got {group['l']} and {l}. Make an "
                "optimizer for each."
            )
        if self.param_groups and self.param_groups[0]["has_first"]:
            raise ValueError(
                "A group cannot be added between the two halves of a step. Call step() "
                "after the second backward pass first."
            )
        super().add_param_group({**param_group, "l": l})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take in one of the two gradients; at the second one, move.

        Args:
            closure: clears the gradients, computes the loss of a new batch and its
                gradients, and returns the loss or None. It is called twice. If it
                raises, such as for want of a second batch, the step has not begun.

        Returns:
            The mean of the closure's two losses; None without a closure or a loss.
        """
        if closure is None:
            self._take()
            return None
        if self.param_groups[0]["has_first"]:
            raise ValueError(
                "step(closure) takes both gradients of a step, and the first of this "
                "one was given already. Call step() after the second backward pass."
            )
        losses = []
        try:
            for _ in range(2):
                with torch.enable_grad():
                    losses.append(closure())
                self._take()
        finally:
            self._forget_first()
        first, second = losses
        return None if first is None or second is None else (first + second) / 2

    def _forget_first(self) -> None:
        """Undo the first half of a step that did not come to its second one."""
        for group in self.param_groups:
            if group["has_first"]:
                group["has_first"] = False
                for p in group["params"]:
                    self.state.pop(p, None)

    def _take(self) -> None:
        """Keep the first gradients, or move by them and the second ones."""
        _refuse_sparse(self.param_groups)
        for group in self.param_groups:
            if group["has_first"]:
                self._move(group)
            else:
                self._keep(group)
            group["has_first"] = not group["has_first"]

    def _keep(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            if p.grad is not None:
                self.state[p]["first_grad"] = p.grad.clone()

    def _move(self, group: dict[str, Any]) -> None:
        """A batch that did not reach a parameter has a gradient of zero there."""
        l = float(group["l"])
        s = math.sqrt(2 * l - 1)
        rate = float(group["lr"]) / l
        for p in group["params"]:
            first = self.state.pop(p, {}).get("first_grad")
            parts = [] if first is None else [first * ((1 + s) / 2)]
            if p.grad is not None and s != 1:  # 0 times infinity is not plain SGD
                parts.append(p.grad * ((1 - s) / 2))
            # Added up first: with large l they nearly cancel.
            if parts:
                p.add_(sum(parts[1:], start=parts[0]), alpha=-rate)


def _refuse_sparse(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ValueError(
                    f"SVAG takes dense gradients, got a {p.grad.layout} one of shape "
                    f"{tuple(p.shape)}. Use Embedding(..., sparse=False)."
                )
