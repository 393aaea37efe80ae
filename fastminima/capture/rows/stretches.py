"""Nodes through which the rows of the first dim stay what they are."""

from __future__ import annotations

from collections.abc import Iterable

from ..graph.nodes import ALONG, ELEMENTWISE, NORMALISING_LAST, PICKS, PRODUCTS, VIEWS
from ..graph.saved import saved_tensor
from ..graph.tape import Tape, signed

__all__ = ["keeps_rows", "number_of"]


def keeps_rows(tape: Tape, i: int, number: int) -> bool:
    """Whether row r of what enters node `i` by that input only meets row r of it."""
    name, edge = tape.names[i], tape.children[i][number]
    if edge is None:
        return False
    out, entering = tape.shapes(i)[0], tape.shapes(edge[0])[edge[1]]
    if not out or not entering or out[0] != entering[0]:
        return False
    if number in _row_inputs(name):
        return len(out) == len(entering)
    if name in ELEMENTWISE:
        return len(out) == len(entering)
    if name in VIEWS:
        return True
    if name in ALONG:
        return 0 not in _dims(tape, i, max(len(out), len(entering)))
    if name in NORMALISING_LAST:
        return len(tape.nodes[i]._saved_normalized_shape) < len(out)
    return name == "IndexBackward0" and _is_within_rows(tape, i)


def _row_inputs(name: str) -> tuple[int, ...]:
    """The inputs of a node whose first dim is that of its output."""
    if name in PRODUCTS:
        return PRODUCTS[name].rows
    return (0,) if name in PICKS and not PICKS[name].takes else ()


def number_of(tape: Tape, i: int, dim: int) -> int:
    """A saved dim of node `i` counted from the first."""
    return signed(dim) % max(1, len(tape.shapes(i)[0]))


def _dims(tape: Tape, i: int, rank: int) -> Iterable[int]:
    dims = getattr(tape.nodes[i], "_saved_dim", None)
    if dims is None:
        return range(rank)
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return [signed(dim) % rank for dim in listed] or range(rank)


def _is_within_rows(tape: Tape, i: int) -> bool:
    """Whether an index leaves the first dim alone, and in its place."""
    indices = list(saved_tensor(tape.nodes[i], "_saved_indices"))
    indexed = [n for n, index in enumerate(indices) if index is not None]
    is_together = indexed[-1] - indexed[0] == len(indexed) - 1
    return indices[0] is None and is_together
