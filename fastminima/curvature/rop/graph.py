"""A gradient whose products with vectors are made by tangents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._graph import Graph, Parts
from .._nodes import survey
from .leaves import Handed, Leaves
from .plan import Plan
from .rule import NotCovered, Some, Universal, total
from .saved import Saved
from .steps import LeafInput, Step, steps_of

__all__ = ["ClosedForm", "TangentGraph"]

_ROUNDINGS = 1e3  # that the slope of a loss may be off by, of the terms it is a sum of
_COARSEST = 0.3  # what is said to agree in half precisions


class TangentGraph(Graph):
    """The recorded graph of a scalar loss, for products with its Hessian.

    A product goes once forth through the graph, with the derivatives of all tensors
    along the vector, and once back, with those of their gradients. It is what double
    backward computes, in another order: what does not depend on the vector is made
    once, and sums of products are added up in place.

    Raises:
        NotCovered: The graph has a node of which tangents would be wrong; at the first
            product also if gradients are not what the nodes say.

    Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian".
    """

    _kind: type[Leaves] = Leaves

    def __init__(
        self, roots: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
    ) -> None:
        root = roots[-1]
        if root.numel() != 1:
            raise NotCovered(f"The root has {root.numel()} elements, not one.")
        self._saved = Saved()
        with torch.no_grad():
            self._steps, self._gradient = steps_of(root, parameters, self._saved)
        super().__init__(roots, self._gradient)
        self._parameters = parameters
        self._plans: dict[tuple[int, ...], Plan] = {}
        self._dying: list[list[int]] = [[] for _ in self._steps]
        self._eps: float | None = survey(roots).eps  # None once it has been checked
        self._find_wanted()

    @property
    def calls_closures(self) -> bool:
        """No node does, once it is known that gradients are what nodes say."""
        return self._eps is not None

    def gradient(self) -> Parts:
        """The gradient of the loss, of the recording."""
        return self._gradient

    def product(
        self, parts: Sequence[Tensor], only: Sequence[int] | None = None
    ) -> Parts:
        """The product of the Hessian with a vector, given by its parts.

        With `only`, within those parameters: nodes that are made of none of them are
        not gone through.

        Raises:
            RuntimeError: A tensor of the graph was overwritten since it was recorded.
        """
        self._saved.check()
        # Function modes would see each of some hundred operations, to no end.
        with torch.no_grad(), torch._C.DisableTorchFunction():
            plan = self._plan(only)
            moved = plan.within(parts)
            tangents = self._forth(moved, plan)
            plan.start()
            self._back(tangents, moved, plan)
            return plan.finish(self._gradient)

    def _plan(self, only: Sequence[int] | None) -> Plan:
        key = tuple(range(len(self._parameters)) if only is None else only)
        if key not in self._plans:
            self._plans[key] = Plan(self._steps, self._parameters, key, self._kind)
        return self._plans[key]

    def _find_wanted(self) -> None:
        """Find which tangents are read, and when for the last time."""
        is_read = [False] * len(self._steps)  # on the way back
        last = [-1] * len(self._steps)
        for at in reversed(range(len(self._steps))):
            step = self._steps[at]
            matters = step.is_wanted or not step.rule.is_linear
            for source in step.inputs:
                if isinstance(source, tuple):
                    place, _ = source
                    last[place] = max(last[place], at)
                    is_read[place] = is_read[place] or not step.rule.is_linear
                    self._steps[place].is_wanted |= matters
        for place, at in enumerate(last):
            if at >= 0 and not is_read[place]:
                self._dying[at].append(place)

    def _forth(self, parts: Some, plan: Plan) -> list[Some]:
        """The tangents of each step's outputs, as far as the way back needs them."""
        tangents: list[Some] = [[None] * step.count for step in self._steps]
        terms = 0.0
        for at in plan.active:
            step = self._steps[at]
            if step.is_wanted or step.rule.remembers or self._eps is not None:
                inputs = _inputs(step, tangents, parts)
                tangents[at] = step.rule.tangents(inputs)
                if self._eps is not None and step.scalar is not None:
                    terms += _size(step.rule.backward([step.scalar]), inputs)
            for place in self._dying[at]:
                tangents[place] = [None] * self._steps[place].count
        if self._eps is not None and tangents:
            self._check(parts, tangents[-1][0], terms, self._eps)
        return tangents

    def _back(self, tangents: list[Some], parts: Some, plan: Plan) -> None:
        changes: list[list[Tensor | None]] = [[None] * s.count for s in self._steps]
        for at in reversed(plan.active):
            step = self._steps[at]
            tangents[at] = ()
            leaves = plan.leaves(step)
            inputs = _inputs(step, tangents, parts)
            found = step.rule.changes(changes[at], inputs, leaves)
            changes[at] = []
            for source, leaf, change in zip(step.inputs, leaves, found, strict=False):
                if change is None or source is None:
                    continue
                if leaf is not None:
                    leaf.add(change)
                elif isinstance(source, tuple):
                    place, number = source
                    changes[place][number] = total(changes[place][number], change)

    def _check(
        self, parts: Some, slope: Tensor | None, terms: float, eps: float
    ) -> None:
        """The slope of the loss along the vector is that which the gradient says.

        Else something acts on gradients that no node shows, such as a hook. `terms` is
        the sum of the absolute terms that the slope is a sum of.
        """
        want = 0.0
        for gradient, part in zip(self._gradient, parts, strict=True):
            if gradient is not None and part is not None:
                want += float((gradient * part).sum(dtype=torch.float64))
        got = 0.0 if slope is None else float(slope)
        share = min(_ROUNDINGS * eps, _COARSEST)
        if abs(got - want) > share * (abs(want) + terms):
            raise NotCovered(
                f"The loss changes by {got:.6g} along the vector, and by {want:.6g} as "
                "its gradient says: something acts on gradients, such as a hook on a "
                "tensor."
            )
        self._eps = None


class ClosedForm(TangentGraph):
    """The same where each node is linear or has a formula of its own.

    A product's parts may share memory with what rules keep: they are to be read.

    Raises:
        NotCovered: Also for a node that is neither.
    """

    _kind = Handed

    def __init__(
        self, roots: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
    ) -> None:
        super().__init__(roots, parameters)
        for step in self._steps:
            if isinstance(step.rule, Universal) and not step.rule.is_linear:
                raise NotCovered(f"{step.rule.node.name()} has no formula of its own.")


def _inputs(step: Step, tangents: list[Some], parts: Some) -> list[Tensor | None]:
    """The tangents of a step's inputs."""
    found: list[Tensor | None] = []
    for source in step.inputs:
        if source is None:
            found.append(None)
        elif isinstance(source, LeafInput):
            part = parts[source.index]
            found.append(part.t() if part is not None and source.is_turned else part)
        else:
            place, number = source
            found.append(tangents[place][number] if tangents[place] else None)
    return found


def _size(gradients: Some, tangents: Some) -> float:
    pairs = zip(gradients, tangents, strict=False)
    products = [g * t for g, t in pairs if g is not None and t is not None]
    return sum(float(p.abs().sum(dtype=torch.float64)) for p in products)
