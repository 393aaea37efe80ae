"""Products of matrices: C = A B, or one for each of many pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .leaves import Leaf
from .rule import Rule, Some

__all__ = ["Product"]

# Where the two factors are among the inputs, and what keeps them.
_FACTORS = {
    "AddmmBackward0": (1, "_saved_mat1", "_saved_mat2"),
    "MmBackward0": (0, "_saved_self", "_saved_mat2"),
    "BmmBackward0": (0, "_saved_self", "_saved_mat2"),
}


class Product(Rule):
    """A B, and what is added to it.

    The tangent is dA B + A dB, the change by A is (change) Bᵀ + G dBᵀ, by B it is
    Aᵀ (change) + dAᵀ G, with G the gradient of the product.
    """

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._first, a, b = _FACTORS[node.name()]
        self._is_first = node.next_functions[self._first][0] is not None
        self._is_second = node.next_functions[self._first + 1][0] is not None
        self._a: Tensor = getattr(node, a).detach() if self._is_second else None
        self._b: Tensor = getattr(node, b).detach() if self._is_first else None
        self._gradient = gradients[0]
        # One factor constant: nothing is multiplied with two things that change.
        self.is_linear = not (self._is_first and self._is_second)

    @staticmethod
    def covers(node: Any) -> bool:
        """Whether it is a product and no more."""
        if node.name() == "AddmmBackward0":
            return node._saved_alpha == 1 and node._saved_beta == 1
        return True

    def tangents(self, inputs: Some) -> Some:
        da, db = inputs[self._first : self._first + 2]
        bias = inputs[0] if self._first else None
        pairs = []
        if db is not None:
            pairs.append((self._a, db))
        if da is not None:
            pairs.append((da, self._b))
        if not pairs:
            shape = self.node._input_metadata[0].shape
            return [None if bias is None else bias.expand(shape).clone()]
        out = _product(*pairs[0], bias)
        for a, b in pairs[1:]:
            _add_product(out, a, b)
        return [out]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        change = changes[0]
        da, db = inputs[self._first : self._first + 2]
        found: list[Tensor | None] = [None] * len(self.node.next_functions)
        if self._first and self.node.next_functions[0][0] is not None:
            found[0] = self._bias(change, leaves[0])
        if self._is_first:
            pairs = [(change, self._b), (self._gradient, db)]
            found[self._first] = self._factor(
                [(g, b.mT) for g, b in pairs if g is not None and b is not None],
                leaves[self._first],
            )
        if self._is_second:
            pairs = [(self._a, change), (da, self._gradient)]
            found[self._first + 1] = self._factor(
                [(a.mT, g) for a, g in pairs if a is not None and g is not None],
                leaves[self._first + 1],
            )
        return found

    def _bias(self, change: Tensor | None, leaf: Leaf | None) -> Tensor | None:
        if change is None:
            return None
        if leaf is not None:
            leaf.add_sum(change)
            return None
        node, output = self.node.next_functions[0]
        return change.sum_to_size(tuple(node._input_metadata[output].shape))

    def _factor(
        self, pairs: list[tuple[Tensor, Tensor]], leaf: Leaf | None
    ) -> Tensor | None:
        if not pairs:
            return None
        if leaf is not None and pairs[0][0].dim() == 2:
            for a, b in pairs:
                leaf.add_product(a, b)
            return None
        out = _product(*pairs[0], None)
        for a, b in pairs[1:]:
            _add_product(out, a, b)
        return out


def _product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        return torch.addmm(bias, a, b)
    return torch.mm(a, b) if a.dim() == 2 else torch.bmm(a, b)


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dim() == 2:
        out.addmm_(a, b)
    else:
        out.baddbmm_(a, b)
