"""What a rule is, and the one that holds for every node."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._graph import differentiate
from .leaves import Leaf

__all__ = [
    "NotCovered",
    "Rule",
    "Some",
    "Universal",
    "edges_of",
    "products",
    "signed",
    "total",
]

Some = Sequence[Tensor | None]


class NotCovered(Exception):
    """A graph has something of which tangents would be wrong; its text says what."""


class Rule(abc.ABC):
    """What one node does to tangents, and to the changes of gradients.

    With x the node's inputs, y = f(x) its outputs and d the gradient of the loss by y,
    a tangent is the derivative of a tensor along the vector v, and a change that of its
    gradient. The node's gradient is f'(x)ᵀ d, so that the change of it has two parts:
    f'(x)ᵀ (change of d), which is the node's own backward, and (∂/∂x f'(x)ᵀ d) applied
    to the tangents of x.

    Attributes:
        node: The autograd node.
        is_linear: Whether the second part is zero whatever x, so that tangents of the
            inputs matter only for tangents of the outputs.
        remembers: Whether `changes` uses what `tangents` left in the rule.
    """

    is_linear = False
    remembers = False

    def __init__(self, node: Any, gradients: Some) -> None:
        self.node = node
        self._metas = [
            None if upper is None else upper._input_metadata[number]
            for upper, number in node.next_functions
        ]

    @abc.abstractmethod
    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs; None stands for zero, in both."""

    @abc.abstractmethod
    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs, from those by the outputs.

        `inputs` are the tangents of the inputs. What goes to a leaf may be written
        there, and None returned for it.
        """

    def backward(self, changes: Some) -> Some:
        """The node's own backward; None for every input where all changes are."""
        if all(change is None for change in changes):
            return [None] * len(self.node.next_functions)
        found = self.node(*changes)
        return self._fitted(found if isinstance(found, tuple) else (found,))

    def _fitted(self, found: Some) -> Some:
        """What a node gives, as the engine hands it on: as the inputs are."""
        return [
            None if g is None or meta is None else _fit(g, meta)
            for g, meta in zip(found, self._metas, strict=False)
        ]


class Universal(Rule):
    """Any node with a second derivative, by differentiating its backward.

    g = f'(x)ᵀ u is linear in u, so the tangents of the outputs are its derivative by u,
    weighted with those of the inputs; by the symmetry of second derivatives its
    derivative by x, weighted in the same way, is the second part of the changes.
    """

    def __init__(self, node: Any, gradients: Some) -> None:
        super().__init__(node, gradients)
        self._given = [
            None if g is None else g.detach().requires_grad_() for g in gradients
        ]
        with torch.enable_grad():
            found = node(*self._given)
            self._found = self._fitted(found if isinstance(found, tuple) else (found,))
        self._second: Some = ()
        made = [g for g in self._found if g is not None and g.requires_grad]
        ones = [torch.ones_like(g) for g in made]
        self._edges = edges_of(node)
        by_inputs = differentiate(made, self._edges, ones, create_graph=False)
        self.is_linear = all(g is None for g in by_inputs)
        self.remembers = not self.is_linear
        if self.is_linear:
            self._edges = []
        else:
            _check_apart(node)

    def tangents(self, inputs: Some) -> Some:
        """The tangents of the outputs."""
        self._second = ()
        used = [
            (g, t)
            for g, t in zip(self._found, inputs, strict=False)
            if t is not None and g is not None and g.requires_grad
        ]
        given = [u for u in self._given if u is not None]
        if not used:
            return [None] * len(self._given)
        outputs, weights = zip(*used, strict=True)
        found = differentiate(
            outputs, (*given, *self._edges), weights, create_graph=False
        )
        self._second = found[len(given) :]
        first = iter(found)
        return [None if u is None else next(first) for u in self._given]

    def changes(
        self, changes: Some, inputs: Some, leaves: Sequence[Leaf | None]
    ) -> Some:
        """The changes of the gradients by the inputs."""
        found = list(self.backward(changes))
        ends = [(edge.node, edge.output_nr) for edge in self._edges]
        second = dict(zip(ends, self._second, strict=False))
        self._second = ()
        for i, end in enumerate(self.node.next_functions):
            extra = second.pop(end, None) if end[0] is not None else None
            found[i] = total(found[i], extra)
        return found


def signed(number: int) -> int:
    """A number as it was given; nodes keep negative ones without a sign."""
    return number - 2**64 if number >= 2**63 else number


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of those that are there; itself where it is one."""
    found: Tensor | None = None
    for term in terms:
        if term is not None:
            found = term if found is None else found + term
    return found


def products(*pairs: tuple[Tensor, Tensor | None]) -> Tensor | None:
    """The sum of products, element by element, of those pairs that are there."""
    found: Tensor | None = None
    for a, b in pairs:
        if b is not None:
            found = a * b if found is None else found.addcmul_(a, b)
    return found


def edges_of(node: Any) -> list[GradientEdge]:
    """Where the gradients by the inputs go, each place once."""
    ends = dict.fromkeys(end for end in node.next_functions if end[0] is not None)
    return [GradientEdge(upper, number) for upper, number in ends]


def _check_apart(node: Any) -> None:
    """NotCovered if one of the inputs is made from another.

    A derivative by the other would hold what goes through the one.
    """
    ends = {upper for upper, _ in node.next_functions if upper is not None}
    if len(ends) < 2:
        return
    waiting = list(dict.fromkeys(c for n in ends for c, _ in n.next_functions))
    seen = set(waiting)
    for upper in waiting:
        if upper in ends:
            raise NotCovered(
                f"{node.name()} has an input that is made from another of its inputs, "
                "and no rule of its own."
            )
        for child, _ in () if upper is None else upper.next_functions:
            if child not in seen:
                seen.add(child)
                waiting.append(child)


def _fit(gradient: Tensor, meta: Any) -> Tensor:
    if tuple(gradient.shape) != tuple(meta.shape):
        gradient = gradient.sum_to_size(tuple(meta.shape))
    return gradient if gradient.dtype == meta.dtype else gradient.to(meta.dtype)
