"""Rows that data sends elsewhere: their samples derived from the indices of each step.

Experts get rows in another order in every step, so what was measured in one step says
nothing about the next. But rows stay together through most nodes (products,
activations); where they part, an index says how. Nodes through which the first dim
stays what it is make a *stretch*, and stretches meet at *crossings*, nodes that take
rows out by an index, or put them in. Once a measurement has shown which stretches have
the samples in a regular order, the labels of all others follow from the indices.

    h [N, d]               stretch 0: regular, row n is sample n // T   (measured)
    h[idx] [M, d]          crossing: row m of stretch 1 is row idx[m] of stretch 0
    expert(h[idx]) [M, d]  stretch 1 still: sample of row m is idx[m] // T
    out.index_add(0, idx, ...)  crossing: back into a stretch of N rows

They are right wherever every crossing agrees: a row that the losses reach over several
crossings then has the same sample over each of them. Where one does not agree, the
graph is measured again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..graph.nodes import PICKS
from ..graph.saved import saved_tensor
from ..graph.tape import Tape
from .decode import Measurement
from .evidence import Evidence
from .layout import IrregularLayout, RegularLayout, RowLayout
from .stretches import keeps_rows, number_of

__all__ = ["Routes", "find_routes", "index_positions"]


@dataclass(frozen=True)
class _Crossing:
    """Rows `part` are those that the index of `node` picks of the rows `whole`."""

    node: int
    whole: int  # numbers of stretches
    part: int
    takes: bool  # else it puts the part into the whole


@dataclass(frozen=True)
class _Regular:
    """A stretch with the samples in a regular order, seen at one of its nodes."""

    node: int
    shape: tuple[int, ...]
    layout: RegularLayout


@dataclass(frozen=True)
class Routes:
    """What it takes to label routed rows in a later step.

    Attributes:
        nodes: nodes whose rows are routed, and the stretch of each.
        crossings: all that must agree.
        regular: the stretches whose labels are known beforehand.
    """

    nodes: Mapping[int, int]
    crossings: tuple[_Crossing, ...]
    regular: Mapping[int, _Regular]

    @property
    def covered(self) -> set[int]:
        """Nodes that pick rows by an index and need no other guard."""
        return {*self.nodes, *(crossing.node for crossing in self.crossings)}

    def labels(self, tape: Tape) -> dict[int, Tensor] | None:
        """Labels of all stretches in this graph, or None where crossings disagree."""
        known: dict[int, Tensor] = {}
        for stretch, regular in self.regular.items():
            if tape.shapes(regular.node)[0] != regular.shape:
                return None
            known[stretch] = regular.layout.labels
        waiting = list(self.crossings)
        while waiting:
            ready = [c for c in waiting if c.whole in known]
            ready = ready or [c for c in waiting if c.part in known]
            if not ready:
                return None
            for crossing in ready:
                if not _cross(tape, crossing, known):
                    return None
            waiting = [c for c in waiting if c not in ready]
        return known

    def layouts(
        self, tape: Tape, labels: Mapping[int, Tensor], node: int, batch: int
    ) -> list[RowLayout | None]:
        """Layouts of the outputs of a routed node."""
        own = labels[self.nodes[node]]
        layouts: list[RowLayout | None] = []
        for shape in tape.shapes(node):
            leading = shape[:-1] if len(shape) > 1 else shape
            spread = own.reshape(-1, *[1] * (len(leading) - 1)).expand(leading)
            layouts.append(IrregularLayout(spread, batch))
        return layouts

    def resized(self, tape: Tape, batch: int) -> Routes | None:
        """These routes in a graph of other sizes, if only one can be meant."""
        regular = {}
        for stretch, known in self.regular.items():
            shape = tape.shapes(known.node)[0]
            layout = known.layout.transfer(known.shape, shape, batch)
            if layout is None:
                return None
            regular[stretch] = _Regular(known.node, shape, layout)
        return replace(self, regular=regular)


def index_positions(indices: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    """Indices of the first dims of a tensor as numbers, none negative."""
    numbers: list[Tensor] = []
    for index in indices:
        is_mask = index.dtype in (torch.bool, torch.uint8)
        numbers += index.nonzero().unbind(1) if is_mask else [index.long()]
    return [
        torch.where(number < 0, number + size, number)
        for number, size in zip(numbers, shape, strict=False)
    ]


def _cross(tape: Tape, crossing: _Crossing, known: dict[int, Tensor]) -> bool:
    """Label the side that is not known yet; whether both sides agree."""
    rows = _picked_rows(tape, crossing)
    if rows is None:
        return False
    whole, part = known.get(crossing.whole), known.get(crossing.part)
    if whole is None:
        assert part is not None
        size = tape.shapes(_whole_node(tape, crossing))[0][0]
        if len(part) != len(rows):
            return False
        whole = torch.full((size,), -1, dtype=torch.int64, device="cpu")
        whole[rows] = part
        known[crossing.whole] = whole
    if len(rows) and int(rows.max()) >= len(whole):
        return False
    picked = whole[rows]
    if part is None:
        known[crossing.part] = picked
        return True
    # Rows that no loss reaches are nobody's, and so is what they are made of.
    unreached = part if crossing.takes else picked
    return len(part) == len(picked) and bool(((part == picked) | (unreached < 0)).all())


def _whole_node(tape: Tape, crossing: _Crossing) -> int:
    if not crossing.takes:
        return crossing.node
    edge = tape.children[crossing.node][0]
    assert edge is not None
    return edge[0]


def _picked_rows(tape: Tape, crossing: _Crossing) -> Tensor | None:
    """The rows that an index picks, one for each row of the part."""
    node, name = tape.nodes[crossing.node], tape.names[crossing.node]
    word = PICKS[name].index
    saved = saved_tensor(node, f"_saved_{word}")
    indices = list(saved) if word == "indices" else [saved]
    shape = tape.shapes(_whole_node(tape, crossing))[0]
    first, *others = index_positions(_leading(indices), shape)
    first = first.cpu()
    extent = torch.broadcast_shapes(first.shape, *(o.shape for o in others))
    if first.dim() < len(extent):
        first = first.reshape(*[1] * (len(extent) - first.dim()), *first.shape)
    if any(size != 1 for size in first.shape[1:]):
        return None  # rows in several dims
    return first.flatten().expand(extent[:1]) if extent else first.reshape(1)


def _leading(indices: list[Tensor | None]) -> list[Tensor]:
    """The indices of the first dims, up to one that is not indexed."""
    found = []
    for index in indices:
        if index is None:
            break
        found.append(index)
    return found


def find_routes(evidence: Evidence) -> Routes | None:
    """Routes that reproduce what was measured; None where rows are not routed by data.

    Crossings that are not understood are left out, for guards to hold.
    """
    stretch = _stretches(evidence)
    crossings = list(_crossings(evidence, stretch))
    if not crossings:
        return None
    regular = _regular_stretches(evidence, stretch)
    met = {s for c in crossings for s in (c.whole, c.part)}
    routed = met - _leaking(evidence, stretch, crossings)
    while True:
        known = _labelled(routed | (met & set(regular)), met - routed, crossings)
        lost = {
            s
            for c in crossings
            for s, other in ((c.whole, c.part), (c.part, c.whole))
            if s in routed and not {s, other} <= known
        }
        if not lost:
            break
        routed -= lost
    routes = Routes(
        {i: s for i, s in stretch.items() if s in routed},
        tuple(c for c in crossings if {c.whole, c.part} <= known),
        {s: regular[s] for s in known - routed},
    )
    return routes if _reproduces(routes, evidence) else None


def _labelled(
    candidates: set[int], fixed: set[int], crossings: list[_Crossing]
) -> set[int]:
    """The stretches whose labels follow from the fixed ones among them."""
    known = candidates & fixed
    size = -1
    while len(known) > size:
        size = len(known)
        for c in crossings:
            if {c.whole, c.part} <= candidates and {c.whole, c.part} & known:
                known |= {c.whole, c.part}
    return known


def _stretches(evidence: Evidence) -> dict[int, int]:
    """For each node that rows of samples pass, the number of its stretch."""
    tape = evidence.tape
    top = {i: i for i in range(len(tape.nodes))}

    def find(i: int) -> int:
        while top[i] != i:
            top[i] = top[top[i]]
            i = top[i]
        return i

    for i, edges in enumerate(tape.children):
        for number, edge in enumerate(edges):
            if edge is None or not evidence.is_data(edge):
                continue
            if keeps_rows(tape, i, number):
                top[find(edge[0])] = find(i)
    return {
        i: find(i)
        for i in range(len(tape.nodes))
        if i not in evidence.preparing and not tape.is_leaf(i)
    }


def _crossings(evidence: Evidence, stretch: Mapping[int, int]) -> Iterator[_Crossing]:
    tape = evidence.tape
    for i, name in enumerate(tape.names):
        pick = PICKS.get(name)
        if pick is None or i not in stretch:
            continue
        number, takes = pick.moved, pick.takes
        edge = tape.children[i][number]
        if edge is None or not evidence.is_data(edge):
            continue
        if keeps_rows(tape, i, number) or not _picks_first(tape, i):
            continue
        own, other = stretch[i], stretch[edge[0]]
        yield (
            _Crossing(i, other, own, True) if takes else _Crossing(i, own, other, False)
        )


def _picks_first(tape: Tape, i: int) -> bool:
    """Whether the index of node `i` is one of the first dim."""
    node = tape.nodes[i]
    if hasattr(node, "_saved_indices"):
        return bool(_leading(list(saved_tensor(node, "_saved_indices"))))
    return number_of(tape, i, node._saved_dim) == 0


def _regular_stretches(
    evidence: Evidence, stretch: Mapping[int, int]
) -> dict[int, _Regular]:
    """Stretches that were seen to have the samples in one regular order."""
    found: dict[int, _Regular] = {}
    irregular: set[int] = set()
    for i in evidence.seen:
        seen = evidence.first(i)
        if i not in stretch or seen is None:
            continue
        if not seen.shows_all(evidence.samples.count):
            continue
        layouts = evidence.layouts(i)
        (layout,) = layouts if len(layouts) == 1 else (None,)
        if isinstance(layout, RegularLayout) and layout.dim == 0:
            found.setdefault(stretch[i], _Regular(i, seen.shape, layout))
        else:
            irregular.add(stretch[i])
    return {s: regular for s, regular in found.items() if s not in irregular}


def _leaking(
    evidence: Evidence, stretch: Mapping[int, int], crossings: list[_Crossing]
) -> set[int]:
    """Stretches that rows leave, or enter, by other ways than a crossing."""
    tape = evidence.tape
    crossed = {(c.node, 0 if c.takes else 1) for c in crossings}
    leaking = {stretch[0]} if 0 in stretch else set()
    for i, edges in enumerate(tape.children):
        for number, edge in enumerate(edges):
            if edge is None or not evidence.is_data(edge):
                continue
            if i in stretch and (i, number) not in crossed:
                ends = {stretch[i], stretch[edge[0]]}
                if len(ends) > 1 or not keeps_rows(tape, i, number):
                    leaking |= ends
    return leaking


def _reproduces(routes: Routes, evidence: Evidence) -> bool:
    """Whether the derived labels are those that were measured."""
    labels = routes.labels(evidence.tape)
    if labels is None:
        return False
    for i, outputs in evidence.seen.items():
        if i not in routes.nodes:
            continue
        own = labels[routes.nodes[i]].numpy()
        for seen in outputs:
            if seen is not None and not _agrees(seen, own):
                return False
    return True


def _agrees(seen: Measurement, own: np.ndarray) -> bool:
    labels = seen.leading
    if labels is None or len(labels) != len(own):
        return False
    # A row that is seen has a sample, whatever the routes say.
    if bool(((labels >= 0) & (own < 0).reshape(-1, *[1] * (labels.ndim - 1))).any()):
        return False
    return seen.agrees(own.reshape(-1, *[1] * (labels.ndim - 1)))
