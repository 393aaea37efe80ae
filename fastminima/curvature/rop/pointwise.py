"""Activations and products, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._graph import differentiate
from .leaves import Leaf
from .rule import Rule, Some, edges_of, total

__all__ = ["ACTIVATIONS", "Activation", "Quotient", "Relu", "Times", "bend_of"]

# Functions of one number, whose nodes have one input.
ACTIVATIONS = frozenset(
    f"{word}Backward0"
    for word in (
        *("Gelu", "Silu", "Mish", "Sigmoid", "LogSigmoid", "Tanh", "Softplus", "Elu"),
        *("LeakyRelu", "Exp", "Expm1", "Log", "Log1P", "Sqrt", "Rsqrt", "Pow", "Erf"),
        *("Reciprocal", "Sin", "Cos"),
    )
)


def bend_of(node: Any, gradient: Tensor) -> Tensor | None:
    """D φ'' of a node that is a function of each number; None where φ' is constant."""
    with torch.enable_grad():
        found = node(gradient.detach())
    found = found[0] if isinstance(found, tuple) else found
    if not found.requires_grad:
        return None
    one = torch.ones_like(found)
    return differentiate((found,), edges_of(node), (one,), create_graph=False)[0]


class Activation(Rule):
    """y = φ(x): dy = φ' dx, and the change is φ' (change of d) + d φ'' dx.

    d φ'' is made once; to multiply with φ' is the node's own backward, one kernel.
    """

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        gradient = gradients[0]
        assert gradient is not None
        self._bend = bend_of(node, gradient)
        self.is_linear = self._bend is None

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        return self.backward(inputs)

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        found, tangent = self.backward(changes)[0], inputs[0]
        if self._bend is None or tangent is None:
            return [found]
        if found is None:
            return [self._bend * tangent]
        return [torch.addcmul(found, self._bend, tangent)]


class Relu(Rule):
    """What is kept is decided by the result, which is there anyway."""

    is_linear = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._result: Tensor = node._saved_result.detach()

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        return [self._kept(inputs[0])]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        return [self._kept(changes[0])]

    def _kept(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return torch.ops.aten.threshold_backward(t, self._result, 0)


class Times(Rule):
    """a b, where one may be spread over the other."""

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        ends = [n for n, _ in node.next_functions]
        # Each factor is kept for the sake of the other.
        self._a = node._saved_self.detach() if ends[1] is not None else None
        self._b = node._saved_other.detach() if ends[0] is not None else None
        self._gradient = gradients[0]
        self.is_linear = self._a is None or self._b is None

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        da, db = inputs
        by_a = None if da is None or self._b is None else da * self._b
        by_b = None if db is None or self._a is None else self._a * db
        return [total(by_a, by_b)]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        found = list(self.backward(changes))
        if self.is_linear or self._gradient is None:
            return found
        da, db = inputs
        more = [None if t is None else self._gradient * t for t in (db, da)]
        return list(map(total, found, self._fitted(more)))


class Quotient(Rule):
    """y = a / b: dy = (da - y db) / b; the gradients are G = d / b by a, -y G by b."""

    remembers = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._b: Tensor = node._saved_other.detach()
        self._has = [n is not None for n, _ in node.next_functions]
        gradient = gradients[0]
        assert gradient is not None
        self.is_linear = not self._has[1]
        self._gradient = gradient / self._b
        if self._has[1]:
            self._y: Tensor = node._saved_self.detach() / self._b
        self._tangent: Tensor | None = None

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        da, db = inputs
        by_a = None if da is None else da / self._b
        by_b = None if db is None or not self._has[1] else -self._y * db / self._b
        self._tangent = total(by_a, by_b)
        return [self._tangent]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        change, db = changes[0], inputs[1]
        tangent, self._tangent = self._tangent, None
        if self.is_linear:
            return self.backward(changes)
        by_a = total(
            None if change is None else change / self._b,
            None if db is None else -self._gradient * db / self._b,
        )
        by_b = total(
            None if by_a is None else -self._y * by_a,
            None if tangent is None else -self._gradient * tangent,
        )
        return self._fitted([by_a, by_b])
