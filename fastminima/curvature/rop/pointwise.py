"""Activations and products, element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._graph import differentiate
from .leaves import Leaf
from .rule import Rule, Some, edges_of

__all__ = ["ACTIVATIONS", "Activation", "Relu", "Times"]

# Functions of one number, whose nodes have one input.
ACTIVATIONS = frozenset(
    f"{word}Backward0"
    for word in "Gelu Silu Mish Sigmoid Tanh Softplus Elu LeakyRelu LogSigmoid Exp Log "
    "Sqrt Rsqrt Reciprocal Sin Cos Pow Square Log1P Expm1 Erf".split()
)


class Activation(Rule):
    """y = φ(x): dy = φ' dx, and the change is φ' (change of d) + d φ'' dx.

    φ' and d φ'' are made once, by the node itself.
    """

    is_fresh = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        gradient = gradients[0]
        assert gradient is not None
        one = torch.ones_like(gradient)
        self._slope: Tensor = node(one).detach()
        with torch.enable_grad():
            found = node(gradient.detach())
        self._bend: Tensor | None = None
        if found.requires_grad:
            (self._bend,) = differentiate(
                (found,), edges_of(node), (one,), create_graph=False
            )
        self.is_linear = self._bend is None

    def tangents(self, inputs: Some) -> Some:
        tangent = inputs[0]
        return [None if tangent is None else self._slope * tangent]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        change, tangent = changes[0], inputs[0]
        found = None if change is None else self._slope * change
        if self._bend is not None and tangent is not None:
            if found is None:
                return [self._bend * tangent]
            found.addcmul_(self._bend, tangent)
        return [found]


class Relu(Rule):
    """What is kept is decided by the result, which is there anyway."""

    is_linear = True
    is_fresh = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._result: Tensor = node._saved_result.detach()

    def tangents(self, inputs: Some) -> Some:
        return [self._kept(inputs[0])]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        return [self._kept(changes[0])]

    def _kept(self, t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return torch.ops.aten.threshold_backward(t, self._result, 0)


class Times(Rule):
    """a b, where one may be spread over the other."""

    is_fresh = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        ends = [n for n, _ in node.next_functions]
        self._shape = tuple(node._input_metadata[0].shape)
        self._shapes = [
            None if n is None else tuple(n._input_metadata[i].shape)
            for n, i in node.next_functions
        ]
        # Each factor is kept for the sake of the other.
        self._a = node._saved_self.detach() if ends[1] is not None else None
        self._b = node._saved_other.detach() if ends[0] is not None else None
        self._gradient = gradients[0]
        self.is_linear = self._a is None or self._b is None

    def tangents(self, inputs: Some) -> Some:
        da, db = inputs
        out = None
        if da is not None and self._b is not None:
            out = da * self._b
        if db is not None and self._a is not None:
            out = self._a * db if out is None else out.addcmul(self._a, db)
        return [out]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        found = list(self.backward(changes))
        if self.is_linear or self._gradient is None:
            return found
        da, db = inputs
        for i, other in enumerate((db, da)):
            shape = self._shapes[i]
            if other is not None and shape is not None:
                extra = (self._gradient * other).sum_to_size(shape)
                mine = found[i]
                found[i] = extra if mine is None else mine + extra
        return found
