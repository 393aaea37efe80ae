"""Nodes that pick rows by data: what was measured holds while they pick the same.

    x[order]            [B, d] by an index over the batch: a guard keeps `order`
    x[:, :, keep]       by an index over features: harmless, the batch dim is dim 0
    x.roll(1, 1)        by numbers of the node (PLACING): they are part of the signature
    x.masked_select(m)  by something that cannot be compared: nothing is remembered

A guard that does not hold makes the graph a new one, which is measured.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.node import Node
from ..graph.nodes import (
    ASSIGNMENT,
    BAG,
    BY_DIM,
    BY_INDICES,
    EMBEDDING,
    MOVE_UNSEEN,
    PICKS,
    PLACING,
    PRODUCTS,
    REORDERING,
)
from ..graph.saved import saved_tensor
from ..graph.tape import Tape, signed
from .evidence import Evidence
from .own_functions import OwnGuard, is_own, own_guard
from .shared import shared_dims, shares_rows

__all__ = [
    "Guard",
    "find_guards",
    "gather_nodes",
    "own_guards",
    "places",
    "placing_numbers",
    "read_numbers",
    "reordering_nodes",
    "watched_sources",
]


@dataclass(frozen=True, eq=False)
class Guard:
    """An index over the batch that must stay what it was."""

    node: int
    saved: str
    number: int | None
    value: Tensor

    def holds(self, tape: Tape) -> bool:
        """Whether the node of this graph picks the same rows."""
        return torch.equal(_saved(tape.nodes[self.node], self), self.value)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Guard)
            and (self.node, self.saved, self.number)
            == (other.node, other.saved, other.number)
            and torch.equal(self.value, other.value)
        )


def _saved(node: Node, guard: Guard) -> Tensor:
    value = saved_tensor(node, guard.saved)
    return value if guard.number is None else value[guard.number]


def placing_numbers(
    tape: Tape, preparing: Container[int]
) -> list[tuple[int, tuple[str, ...]]]:
    """Nodes, and the attributes of them, that say where rows go."""
    return [
        (i, tuple(f"_saved_{word}" for word in PLACING[name]))
        for i, name in enumerate(tape.names)
        if name in PLACING and i not in preparing
    ]


def read_numbers(tape: Tape, placing: list[tuple[int, tuple[str, ...]]]) -> tuple:
    """The values of those attributes in this graph."""
    values = []
    for i, names in placing:
        node = tape.nodes[i]
        for name in names:
            value = getattr(node, name)
            values.append(tuple(value) if isinstance(value, list) else value)
    return tuple(values)


def reordering_nodes(tape: Tape, preparing: Container[int]) -> list[int]:
    """Nodes whose shapes say where rows go: [4, B, 6] is not [6, B, 4]."""
    return [
        i
        for i, name in enumerate(tape.names)
        if name in REORDERING and i not in preparing
    ]


def places(tape: Tape, preparing: Container[int]) -> tuple:
    """All that says where rows go in this graph, besides the shapes of the uses."""
    shapes = tuple(tape.shapes(i)[0] for i in reordering_nodes(tape, preparing))
    return read_numbers(tape, placing_numbers(tape, preparing)), shapes


def _moves_unseen(tape: Tape, i: int, preparing: Container[int]) -> bool:
    """Whether a node moves rows of data by something that cannot be watched."""
    name, edges = tape.names[i], tape.children[i]
    if name in MOVE_UNSEEN:
        return True
    if name == BAG:
        return tape.is_data(edges[0], preparing)
    factors = PRODUCTS[name].factors if name in PRODUCTS else None
    if factors is None:
        return False
    left, right = (edges[number] for number in factors)
    return left is None and tape.is_data(right, preparing)


def gather_nodes(tape: Tape) -> list[int]:
    """Nodes that pick rows by an index."""
    known = BY_DIM | BY_INDICES
    return [i for i, name in enumerate(tape.names) if name in known]


def watched_sources(tape: Tape, batch: int) -> list[int]:
    """Nodes to measure so that `find_guards` knows which dim runs over the batch."""
    gathers = gather_nodes(tape)
    assigned = [i for i, name in enumerate(tape.names) if name == ASSIGNMENT]
    sources = [tape.children[i][0] for i in gathers]
    sources += [edge for i in assigned for edge in tape.children[i]]
    shared = [i for i in range(len(tape.names)) if shared_dims(tape, i, batch)]
    return [
        *gathers,
        *assigned,
        *(e[0] for e in sources if e is not None and not tape.is_leaf(e[0])),
        *shared,
    ]


def find_guards(
    evidence: Evidence, routed: Container[int] = ()
) -> list[Guard | OwnGuard] | None:
    """What must stay the same for a measured layout to hold, or None if unknowable.

    Nodes that prepare a parameter pick no rows of samples, nor do those that look up a
    table; `routed` ones are followed in each step.
    """
    tape, preparing = evidence.tape, evidence.preparing
    own = own_guards(tape, preparing)
    if own is None:
        return None
    guards: list[Guard | OwnGuard] = list(own)
    for i, name in enumerate(tape.names):
        if i in preparing:
            continue
        if _moves_unseen(tape, i, preparing):
            return None
        if shares_rows(evidence, i):
            return None
        if name == ASSIGNMENT and not _fills_rows(evidence, i):
            return None
        if name == EMBEDDING and evidence.is_data(tape.children[i][0]):
            index = saved_tensor(tape.nodes[i], "_saved_indices")
            guards.append(Guard(i, "_saved_indices", None, index.clone()))
        if name == BAG and evidence.is_data(tape.children[i][1]):
            # Weights of the rows in a bag, computed for each sample.
            offsets = saved_tensor(tape.nodes[i], "_saved_offsets")
            guards.append(Guard(i, "_saved_offsets", None, offsets.clone()))
    for i in gather_nodes(tape):
        name, node = tape.names[i], tape.nodes[i]
        if i in preparing or i in routed:
            continue
        pick = PICKS.get(name)
        # Where what an index moves is a parameter, no sample's row is moved.
        if pick and not evidence.is_data(tape.children[i][pick.moved]):
            continue
        picked_from = i if name.startswith("IndexPut") else _source(tape, i)
        dim = evidence.batch_dim(picked_from)
        if name in BY_INDICES:
            indices = enumerate(saved_tensor(node, "_saved_indices"))
            guards += [
                Guard(i, "_saved_indices", number, index.clone())
                for number, index in indices
                if index is not None and _may_cover(number, index, dim)
            ]
            continue
        own = evidence.batch_dim(i)
        rank = len(tape.shapes(i)[0])
        if own is not None and own == dim and own != signed(node._saved_dim) % rank:
            continue
        saved = next((s for s in _INDEX_NAMES if hasattr(node, s)), None)
        if saved is None:
            return None
        guards.append(Guard(i, saved, None, saved_tensor(node, saved).clone()))
    return guards


def own_guards(tape: Tape, preparing: Container[int]) -> list[OwnGuard] | None:
    """What must stay the same in functions of users that data flow through."""
    guards = []
    for i in range(len(tape.names)):
        if i in preparing or not is_own(tape, i):
            continue
        if any(tape.is_data(edge, preparing) for edge in tape.children[i]):
            guard = own_guard(tape, i)
            if guard is None:
                return None
            guards.append(guard)
    return guards


def _fills_rows(evidence: Evidence, i: int) -> bool:
    """Whether an assignment into a slice leaves the samples where they are.

    The slice itself is not shown. It takes in all of the batch dim if what is assigned
    is as long there, and no other dim of that length can be meant.
    """
    tape = evidence.tape
    _, *assigned = tape.children[i]
    moved = [e for e in assigned if e is not None and evidence.is_data(e)]
    if not moved:  # an activation in place, a constant, a parameter
        return True
    dim = evidence.batch_dim(i)
    whole = tape.shapes(i)[0]
    if dim is None or whole.count(whole[dim]) > 1:
        return False
    for child, output in moved:
        part = tape.shapes(child)[output]
        if len(part) != len(whole) or part[dim] != whole[dim]:
            return False
        if evidence.batch_dim(child) != dim:
            return False
    return True


_INDEX_NAMES = ("_saved_index", "_saved_indices", "_saved_result1")


def _source(tape: Tape, i: int) -> int | None:
    edge = tape.children[i][0]
    return None if edge is None else edge[0]


def _may_cover(number: int, index: Tensor, dim: int | None) -> bool:
    """Whether an index at position `number` may run over dim `dim`."""
    extent = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
    return dim is None or number <= dim < number + extent
