"""Softmax and its logarithm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .leaves import Leaf
from .rule import Rule, Some, products, signed

__all__ = ["LogSoftmax", "Softmax"]


class Softmax(Rule):
    """p = softmax(x): dp = p (dx - Σ p dx).

    The gradient by x is p (g - Σ p g), g that by p. With e = g - Σ p g and
    t = p (change of g) + e dp the change of it is t - p Σ t.
    """

    remembers = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._p: Tensor = node._saved_result.detach()
        self._dim = signed(node._saved_dim)
        g = gradients[0]
        assert g is not None
        self._e = g - (self._p * g).sum(self._dim, keepdim=True)
        self._tangent: Tensor | None = None

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        dx = inputs[0]
        if dx is None:
            self._tangent = None
        else:
            self._tangent = torch._softmax_backward_data(
                dx, self._p, self._dim, self._p.dtype
            )
        return [self._tangent]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        change, tangent, self._tangent = changes[0], self._tangent, None
        t = products((self._p, change), (self._e, tangent))
        if t is None:
            return [None]
        return [t.addcmul_(self._p, t.sum(self._dim, keepdim=True), value=-1)]


class LogSoftmax(Rule):
    """l = log softmax(x), p = exp(l): dl = dx - Σ p dx.

    The gradient by x is g - p Σ g, so the change is (change of g) - p Σ (change of g)
    - p (dx - Σ p dx) Σ g.
    """

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._dim = signed(node._saved_dim)
        self._p: Tensor = node._saved_result.detach().exp()
        g = gradients[0]
        assert g is not None
        self._sum = g.sum(self._dim, keepdim=True).neg_()

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        dx = inputs[0]
        if dx is None:
            return [None]
        return [dx - (self._p * dx).sum(self._dim, keepdim=True)]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        (found,) = self.backward(changes)[:1]
        dx = inputs[0]
        if dx is None:
            return [found]
        more = torch._softmax_backward_data(dx, self._p, self._dim, self._p.dtype)
        more.mul_(self._sum)
        return [more if found is None else more.add_(found)]
