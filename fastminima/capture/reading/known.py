"""A graph as it was read last, to be recognised without being read again."""

from __future__ import annotations

from typing import Any

from .memory import Structure
from .plan import Layouts
from .recipe import Recipe

__all__ = ["KnownReading"]


class KnownReading:
    """Recognises a graph: its wiring, and what its sizes are told by.

    Args:
        structure: what is remembered of the graph.
        recipe: how it was read.
        wiring: its nodes and edges, as the extension has them.
        conditions: hold where all sizes and numbers are those of the last graph.
        names: of the tracked parameters, by id.
        check_every: steps after which a structure is measured anew.
    """

    def __init__(
        self,
        structure: Structure,
        recipe: Recipe,
        wiring: Any,
        conditions: Any,
        names: dict[int, str],
        check_every: int,
    ) -> None:
        self._structure, self._check_every = structure, check_every
        self.wiring, self.conditions, self._names = wiring, conditions, names
        self.layouts: Layouts = recipe.layouts
        self.sources = recipe.plan.sources

    def is_next(self, names: dict[int, str]) -> bool:
        """Whether the next graph may be this one.

        Every so many steps it is measured anew, so it has to be read.
        """
        return names is self._names and not self._structure.will_be_due(
            self._check_every
        )

    def count(self) -> None:
        """Count a step in which the graph was recognised."""
        self._structure.recalls += 1
