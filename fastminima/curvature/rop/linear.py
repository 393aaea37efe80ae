"""Nodes that only move or add numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .leaves import Leaf
from .rule import Rule, Some, signed

__all__ = ["MOVES", "Moved", "Picked", "Sum"]


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _transposed(node: Any) -> Callable[[Tensor], Tensor]:
    a, b = signed(node._saved_dim0), signed(node._saved_dim1)
    return lambda t: t.transpose(a, b)


def _reshaped(node: Any) -> Callable[[Tensor], Tensor]:
    shape = _shape(node)
    return lambda t: t.reshape(shape)


def _expanded(node: Any) -> Callable[[Tensor], Tensor]:
    shape = _shape(node)
    return lambda t: t.expand(shape)


def _split(node: Any) -> Callable[[Tensor], Sequence[Tensor]]:
    size, dim = node._saved_split_size, signed(node._saved_dim)
    return lambda t: t.split(size, dim)


def _scaled(node: Any) -> Callable[[Tensor], Tensor]:
    factor = node._saved_other
    return lambda t: t * factor


def _embedded(node: Any) -> Callable[[Tensor], Tensor]:
    indices, padding = node._saved_indices, signed(node._saved_padding_idx)
    if padding < 0:
        return lambda t: torch.embedding(t, indices)
    # No gradient goes to that row, as if it did not matter.
    hidden = (indices == padding)[..., None]
    return lambda t: torch.embedding(t, indices).masked_fill_(hidden, 0)


def _permuted(node: Any) -> Callable[[Tensor], Tensor]:
    dims = [signed(dim) for dim in node._saved_dims]
    return lambda t: t.permute(dims)


def _sliced(node: Any) -> Callable[[Tensor], Tensor]:
    words = "_saved_dim", "_saved_start", "_saved_end", "_saved_step"
    dim, start, end, step = (signed(getattr(node, word)) for word in words)
    return lambda t: torch.ops.aten.slice(t, dim, start, end, step)


def _selected(node: Any) -> Callable[[Tensor], Tensor]:
    dim, index = signed(node._saved_dim), signed(node._saved_index)
    return lambda t: t.select(dim, index)


def _indexed(node: Any) -> Callable[[Tensor], Tensor]:
    indices = list(node._saved_indices)
    return lambda t: torch.ops.aten.index(t, indices)


def _likelihood(
    forward: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[[Any], Callable[[Tensor], Tensor]]:
    """Of `nll_loss`: picked, weighted, and a mean or a sum."""

    def of(node: Any) -> Callable[[Tensor], Tensor]:
        options = node._saved_target, node._saved_weight, node._saved_reduction
        ignored = signed(node._saved_ignore_index)
        return lambda t: forward(t, *options, ignored)[0]

    return of


# What a node does to its one differentiable input, as a function of it alone.
# `MulBackward1` has a number for its other factor.
MOVES: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "TBackward0": lambda node: torch.t,
    "TransposeBackward0": _transposed,
    "ViewBackward0": _reshaped,
    "UnsafeViewBackward0": _reshaped,
    "ReshapeAliasBackward0": _reshaped,
    "SqueezeBackward1": _reshaped,
    "UnsqueezeBackward0": _reshaped,
    "CloneBackward0": lambda node: lambda t: t,
    "ExpandBackward0": _expanded,
    "SplitBackward0": _split,
    "PermuteBackward0": _permuted,
    "SliceBackward0": _sliced,
    "SelectBackward0": _selected,
    "IndexBackward0": _indexed,
    "MulBackward1": _scaled,
    "EmbeddingBackward0": _embedded,
    "NllLossBackward0": _likelihood(torch.ops.aten.nll_loss_forward),
    "NllLoss2DBackward0": _likelihood(torch.ops.aten.nll_loss2d_forward),
}


class Moved(Rule):
    """A linear function of one input, in `MOVES`."""

    is_linear = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._move = MOVES[node.name()](node)
        self._count = len(gradients)

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        tangent = inputs[0]
        if tangent is None:
            return [None] * self._count
        found = self._move(tangent)
        return [found] if isinstance(found, Tensor) else list(found)

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        return self.backward(changes)


class Sum(Rule):
    """`a + alpha b` or `a - alpha b`, where one may be spread over the other."""

    is_linear = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._alpha, self._shape = node._saved_alpha, _shape(node)
        if node.name() == "SubBackward0":
            self._alpha = -self._alpha

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        a, b = (*inputs, None)[:2]
        if b is not None and a is not None:
            return [torch.add(a, b, alpha=self._alpha)]
        if b is not None:
            b = b if self._alpha == 1 else b * self._alpha
        one = b if a is None else a
        if one is None or one.shape == self._shape:
            return [one]
        return [one.expand(self._shape)]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        return self.backward(changes)


class Picked(Rule):
    """Max pooling: elements at indices that the tangents do not move."""

    is_linear = True

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._places = node._saved_result1.flatten(-2)

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        tangent = inputs[0]
        if tangent is None:
            return [None]
        picked = tangent.flatten(-2).gather(-1, self._places)
        return [picked.view(_shape(self.node)), None][: len(self.node._input_metadata)]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        return self.backward(changes)
