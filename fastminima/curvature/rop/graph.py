"""A gradient whose products with vectors are made by tangents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._graph import Graph, Parts, differentiate
from .leaves import Leaf, Leaves
from .rule import NotCovered
from .steps import LeafInput, Step, steps_of

__all__ = ["TangentGraph"]


class TangentGraph(Graph):
    """The recorded graph of a scalar loss, for products with its Hessian.

    A product goes once forth through the graph, with the derivatives of all tensors
    along the vector, and once back, with those of their gradients. It is what double
    backward computes; what does not depend on the vector is made once.

    Raises:
        NotCovered: The graph has a node of which tangents would be wrong.

    Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian".
    """

    def __init__(
        self, roots: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
    ) -> None:
        root = roots[-1]
        one = torch.ones_like(root)
        with torch.no_grad():
            self._steps, self._gradient = steps_of(
                root,
                lambda outputs, inputs: differentiate(
                    outputs, inputs, (one,), create_graph=False
                ),
                parameters,
            )
        super().__init__(roots, self._gradient)
        self._is_reached = [g is not None for g in self._gradient]
        self._leaves = Leaves(parameters)
        self._is_checked = False
        self._dying: list[list[int]] = [[] for _ in self._steps]
        self._plan()

    def gradient(self) -> Parts:
        return self._gradient

    def product(self, parts: Sequence[Tensor]) -> Parts:
        """The product of the Hessian with a vector, given by its parts."""
        with torch.no_grad():
            tangents = self._forth(parts)
            if not self._is_checked:
                self._check(parts, tangents[-1][0])
            self._leaves.start()
            self._back(tangents, parts)
            return self._leaves.finish(self._is_reached)

    def _forth(self, parts: Sequence[Tensor]) -> list[Sequence[Tensor | None]]:
        tangents: list[Sequence[Tensor | None]] = []
        for at, step in enumerate(self._steps):
            if step.is_wanted or not self._is_checked:
                tangents.append(step.rule.tangents(_inputs(step, tangents, parts)))
            else:
                tangents.append([None] * step.count)
            for place in self._dying[at]:
                tangents[place] = [None] * self._steps[place].count
        return tangents

    def _back(
        self, tangents: list[Sequence[Tensor | None]], parts: Sequence[Tensor]
    ) -> None:
        changes: list[list[Tensor | None]] = [[None] * s.count for s in self._steps]
        for at in reversed(range(len(self._steps))):
            step = self._steps[at]
            tangents[at] = ()
            leaves = [
                Leaf(self._leaves, source.index, source.is_turned)
                if isinstance(source, LeafInput)
                else None
                for source in step.inputs
            ]
            found = step.rule.changes(
                changes[at], _inputs(step, tangents, parts), leaves
            )
            changes[at] = []
            for source, leaf, change in zip(step.inputs, leaves, found, strict=False):
                if change is None or source is None:
                    continue
                if leaf is not None:
                    leaf.add(change)
                else:
                    place, number = source
                    before = changes[place][number]
                    after = change if before is None else before + change
                    changes[place][number] = after

    def _check(self, parts: Sequence[Tensor], slope: Tensor | None) -> None:
        """The slope of the loss along the vector is that which the gradient says.

        Else something acts on gradients that no node shows, such as a hook.
        """
        want = square = 0.0
        for gradient, part in zip(self._gradient, parts, strict=True):
            if gradient is not None:
                terms = gradient * part
                want += float(terms.sum(dtype=torch.float64))
                square += float(terms.norm()) ** 2
        got = 0.0 if slope is None else float(slope)
        eps = max(torch.finfo(p.dtype).eps for p in parts)
        if abs(got - want) > 1e4 * eps * (abs(want) + square**0.5):
            raise NotCovered(
                f"The loss changes by {got:.6g} along the vector, and by {want:.6g} as "
                "its gradient says: something acts on gradients, such as a hook on a "
                "tensor."
            )
        self._is_checked = True

    def _plan(self) -> None:
        """Find which tangents are read, and when for the last time."""
        is_read = [False] * len(self._steps)  # on the way back
        last = [-1] * len(self._steps)
        for step in self._steps:
            step.is_wanted = False
        for at in reversed(range(len(self._steps))):
            step = self._steps[at]
            matters = step.is_wanted or not step.rule.is_linear
            for source in step.inputs:
                if isinstance(source, tuple):
                    place = source[0]
                    last[place] = max(last[place], at)
                    is_read[place] = is_read[place] or not step.rule.is_linear
                    wanted = self._steps[place].is_wanted
                    self._steps[place].is_wanted = wanted or matters
        for place, at in enumerate(last):
            if at >= 0 and not is_read[place]:
                self._dying[at].append(place)


def _inputs(
    step: Step,
    tangents: list[Sequence[Tensor | None]],
    parts: Sequence[Tensor],
) -> list[Tensor | None]:
    found: list[Tensor | None] = []
    for source in step.inputs:
        if isinstance(source, LeafInput):
            part = parts[source.index]
            found.append(part.t() if source.is_turned else part)
        elif source is None:
            found.append(None)
        else:
            place, number = source
            found.append(tangents[place][number])
    return found
