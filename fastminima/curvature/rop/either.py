"""Products by tangents where they are right, and else in another way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from .._graph import Graph, Parts
from .graph import TangentGraph
from .rule import NotCovered

__all__ = ["EitherGraph"]


class EitherGraph(Graph):
    """A `TangentGraph` (or `first`), or what `otherwise(roots, parameters)` makes.

    Attributes:
        reason: Why it is the other one; None as long as it is not.
    """

    def __init__(
        self,
        roots: tuple[Tensor, ...],
        parameters: tuple[Tensor, ...],
        otherwise: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Graph],
        first: type[TangentGraph] = TangentGraph,
    ) -> None:
        self._otherwise = lambda: otherwise(roots, parameters)
        self.reason: NotCovered | None = None
        try:
            self._graph: Graph = first(roots, parameters)
        except NotCovered as reason:
            self._give_way(reason)
        super().__init__(roots, self._graph.reached)

    @property
    def calls_closures(self) -> bool:
        """Whether products may run what a user has written."""
        return self._graph.calls_closures

    def product(self, parts: list[Tensor], only: Sequence[int] | None = None) -> Parts:
        """The product of the Hessian with a vector, given by its parts."""
        try:
            return self._graph.product(parts, only)
        except NotCovered as reason:
            self._give_way(reason)
            return self._graph.product(parts, only)

    def gradient(self) -> Parts:
        """The gradient of the loss."""
        return self._graph.gradient()

    def _give_way(self, reason: NotCovered) -> None:
        self._graph, self.reason = self._otherwise(), reason
