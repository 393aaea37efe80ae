"""Regions that run again: rows that may be moved without a sign of it.

Outside, a guard compares what a node has saved from step to step. Inside a region that
is gone with its pass, so what holds such an index is measured in each step.

    checkpoint(region, h, use_reentrant=True),  region: layer(Own.apply(h, order))

`h` is a leaf of the region's graph, and data all the same: it is no parameter. Nodes
that pick rows by an index are told by their names alone (`gather_nodes`).
"""

from __future__ import annotations

from collections.abc import Container, Sequence

from ..graph.nodes import ASSIGNMENT, BAG, EMBEDDING, PRODUCTS
from ..graph.tape import Tape
from .own_functions import is_own

__all__ = ["may_move"]


def may_move(tape: Tape, preparing: Container[int]) -> bool:
    """Whether rows inside a region may go elsewhere in the next step without a sign.

    Args:
        tape: of the region.
        preparing: nodes between its parameters and their uses.
    """

    def moves(edge: tuple[int, int] | None) -> bool:
        is_known = edge is None or edge[0] in preparing or edge[0] in tape.parameter_at
        return not is_known

    for i, name in enumerate(tape.names):
        edges = tape.children[i]
        if i not in preparing and is_own(tape, i) and any(map(moves, edges)):
            return True
        if i not in preparing and any(map(moves, _moved_unseen(name, edges))):
            return True
    return False


def _moved_unseen(
    name: str, edges: Sequence[tuple[int, int] | None]
) -> Sequence[tuple[int, int] | None]:
    """The inputs whose rows a node moves by what the graph does not show."""
    if name in (EMBEDDING, BAG):
        return edges[:2]
    if name == ASSIGNMENT:
        return edges[1:]
    factors = PRODUCTS[name].factors if name in PRODUCTS else None
    if factors is None or edges[factors[0]] is not None:
        return ()
    return (edges[factors[1]],)
