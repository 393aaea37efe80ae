"""Graphs that were met before, walked again by the extension.

A training loop makes one graph, or a few, over and over. The first two walks over one
are those of `tape.py`; then the extension walks it, comparing as it goes, and what does
not agree is walked anew.
"""

from __future__ import annotations

from typing import Any

from .extension import learned
from .node import Node
from .tape import Tape

__all__ = ["KnownGraphs"]

_MOST = 4  # wirings that are compared before a graph is called new


class KnownGraphs:
    """The structures of the last graphs, the last one first."""

    def __init__(self) -> None:
        self._wirings: list[tuple[Any, Tape]] = []  # tapes without nodes
        self._met: list[object] = []  # keys of graphs met once

    def walk(self, root: Node, names: dict[int, str]) -> Tape:
        """The graph below a node, as `Tape([root], names)` has it."""
        for place, (wiring, structure) in enumerate(self._wirings):
            nodes = wiring.follow(root, names)
            if nodes is not None:
                if place:
                    self._wirings.insert(0, self._wirings.pop(place))
                return structure.of(nodes)
        tape = Tape([root], names)
        self._remember(tape)
        return tape

    def wiring_of(self, tape: Tape) -> Any:
        """What the extension knows of the graph walked last; None if nothing."""
        if not self._wirings or self._wirings[0][1].key != tape.key:
            return None
        return self._wirings[0][0]

    def _remember(self, tape: Tape) -> None:
        """Keep a structure that is met for the second time."""
        host = learned()
        if host is None:
            return
        if tape.key not in self._met:
            self._met = [tape.key, *self._met[: 2 * _MOST]]
            return
        types = [type(node) for node in tape.nodes]
        leaves = [tape.parameter_at.get(i) for i in range(len(tape.nodes))]
        wiring = host.Wiring(tape.names, types, tape.children, leaves)
        self._wirings.insert(0, (wiring, tape.of([])))
        del self._wirings[_MOST:]
