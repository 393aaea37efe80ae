"""Losses that are a sum of functions of one number each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .leaves import Leaf
from .pointwise import bend_of
from .rule import Rule, Some, total

__all__ = ["ELEMENTWISE", "ElementwiseLoss"]

ELEMENTWISE = frozenset(
    f"{word}Backward0"
    for word in (
        *("MseLoss", "SmoothL1Loss", "HuberLoss", "SoftMarginLoss"),
        *("BinaryCrossEntropy", "BinaryCrossEntropyWithLogits"),
    )
)


class ElementwiseLoss(Rule):
    """y = Σ φ(x, target), their mean, or each of them, with a constant target.

    The slope φ' and, with d the gradient by y, d φ'' are made once: dy = Σ φ' dx, and
    the change is φ' (change of d) + d φ'' dx.
    """

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        gradient = gradients[0]
        assert gradient is not None
        self._bend = bend_of(node, gradient)
        self.is_linear = self._bend is None

    @classmethod
    def is_for(cls, node: Any) -> bool:
        """Whether the first input is the only one with a gradient."""
        return [end is not None for end, _ in node.next_functions][1:] == [False]

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        dx = inputs[0]
        if dx is None:
            return [None]
        meta = self.node._input_metadata[0]
        one = torch.ones(tuple(meta.shape), dtype=meta.dtype, device=dx.device)
        (slope, *_) = self.backward([one])
        assert slope is not None
        return [(slope * dx).sum_to_size(tuple(meta.shape))]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        (found, *_), dx = self.backward(changes), inputs[0]
        more = None if self._bend is None or dx is None else self._bend * dx
        return [total(found, more)]
