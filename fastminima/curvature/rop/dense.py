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
        # Each factor is kept for the sake of the other, by PyTorch too.
        self._a: Tensor | None = getattr(node, a) if self._is_second else None
        self._b: Tensor | None = getattr(node, b) if self._is_first else None
        self._gradient = gradients[0]
        # One factor constant: nothing is multiplied with two things that change.
        self.is_linear = not (self._is_first and self._is_second)

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        da, db = inputs[self._first : self._first + 2]
        bias = inputs[0] if self._first else None
        pairs = _whole((self._a, db), (da, self._b))
        if pairs:
            return [_sum(pairs, bias)]
        if bias is None:
            return [None]
        return [bias.expand(self.node._input_metadata[0].shape)]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        change = changes[0]
        da, db = inputs[self._first : self._first + 2]
        found: list[Tensor | None] = [None] * len(self.node.next_functions)
        if self._first and self.node.next_functions[0][0] is not None:
            found[0] = self._bias(change, leaves[0])
        if self._is_first:
            pairs = _whole((change, self._b), (self._gradient, db))
            found[self._first] = _collect(
                [(g, b.mT) for g, b in pairs], leaves[self._first]
            )
        if self._is_second:
            pairs = _whole((self._a, change), (da, self._gradient))
            found[self._first + 1] = _collect(
                [(a.mT, g) for a, g in pairs], leaves[self._first + 1]
            )
        return found

    def _bias(self, change: Tensor | None, leaf: Leaf | None) -> Tensor | None:
        if change is None:
            return None
        if leaf is not None:
            leaf.add_sum(change)
            return None
        return self._fitted([change])[0]


Pair = tuple[Tensor, Tensor]


def _whole(*pairs: tuple[Tensor | None, Tensor | None]) -> list[Pair]:
    """The pairs of which nothing is missing."""
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _collect(pairs: list[Pair], leaf: Leaf | None) -> Tensor | None:
    """The sum of products, or None if there is nothing or a leaf has taken it."""
    if leaf is not None and not leaf.is_wanted:
        return None
    if leaf is not None and pairs and pairs[0][0].dim() == 2:
        for a, b in pairs:
            leaf.add_product(a, b)
        return None
    return _sum(pairs) if pairs else None


def _sum(pairs: list[Pair], bias: Tensor | None = None) -> Tensor:
    """The sum of products of matrices, or of stacks of them."""
    (a, b), *more = pairs
    if a.dim() == 2:
        out = torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    else:
        out = torch.bmm(a, b)
    for a, b in more:
        if a.dim() == 2:
            out.addmm_(a, b)
        else:
            out.baddbmm_(a, b)
    return out
