"""From what was measured to the layouts of a graph, and how long they hold."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch

from ..errors import CaptureError
from ..graph.nodes import VIEWS
from ..graph.tape import Tape
from ..rows.decode import Measurement
from ..rows.guards import Guard, find_guards, gather_nodes, own_guards, watched_sources
from ..rows.layout import IrregularLayout, RegularLayout, RowLayout
from ..rows.measure import Measurements
from ..rows.own_functions import OwnGuard
from ..rows.samples import Batch, Segments
from .memory import Found, Layouts
from .plan import Plan, watched_nodes
from .whereabouts import Whereabouts

__all__ = [
    "disagreement",
    "guards_of",
    "is_sure",
    "layouts_of",
    "layouts_of_one",
    "nodes_to_watch",
]


def nodes_to_watch(tape: Tape, batch: int, regions: Container[int] = ()) -> list[int]:
    """Nodes whose rows have to be measured: uses, views below them, and gathers."""
    near = watched_nodes(tape, regions)
    views = [view for i in near for view in _views_of(tape, i)]
    return sorted({*near, *views, *watched_sources(tape, batch)})


def layouts_of(
    where: Whereabouts,
    tape: Tape,
    plan: Plan,
    measured: Mapping[int, list[Measurement | None]],
    samples: Batch | Segments,
    routed: Container[int] = (),
) -> tuple[Layouts, bool]:
    """Layouts of all uses but the routed ones, and whether they may be kept.

    Raises:
        CaptureError: for rows that do not each belong to one sample.
    """
    batch = samples.count
    layouts: Layouts = []
    is_settled = True
    for use in plan.uses:
        of_use: list[Any] = []
        for measurement in () if use.node in routed else measured[use.node]:
            if measurement is None:
                of_use.append(None)
                continue
            found: list[Any] = samples.layouts(measurement)
            if len(found) > 1 and isinstance(samples, Batch):
                found = _like_views(found, tape, use.node, measured, batch)
            if not found:
                raise CaptureError(where.mixed_message(tape, use.node, samples))
            is_settled &= len(found) == 1
            is_settled &= not isinstance(found[0], IrregularLayout)
            is_settled &= samples.are_shown(measurement)
            of_use.append(found[0])
        layouts.append(of_use)
    return layouts, is_settled


def guards_of(
    tape: Tape,
    measured: Measurements,
    samples: Batch | Segments,
    plan: Plan,
    covered: Container[int],
) -> Sequence[Guard | OwnGuard] | None:
    """What must stay the same for layouts to hold, or None if that is not known.

    Segments come with their places in each step. That attention keeps them apart was
    measured; where rows are picked by an index, they are measured each time. (Not where
    losses are, of which there is one a token.)
    """
    if isinstance(samples, Batch):
        return find_guards(tape, measured, samples.count, plan.preparing, covered)
    tokens = samples.ids.numel()
    for i in gather_nodes(tape):
        edges = (edge for edge in tape.children[i] if edge is not None)
        shapes = [*tape.shapes(i), *(tape.shapes(j)[output] for j, output in edges)]
        if i not in plan.preparing and any(math.prod(s) > tokens for s in shapes):
            return None
    own = own_guards(tape, plan.preparing)
    if own is None or any(guard.indices for guard in own):
        return None
    return own


def disagreement(known: Found, measured: Measurements) -> int | None:
    """The first use whose rows a new measurement gives to other samples.

    Rows that were not seen contradict nothing.
    """
    for use, of_use in zip(known.plan.uses, known.layouts, strict=True):
        for layout, seen in zip(of_use, measured.get(use.node, ()), strict=False):
            if layout is not None and seen is not None and not _agree(layout, seen):
                return use.node
    return None


def _agree(layout: RowLayout, seen: Measurement) -> bool:
    if isinstance(layout, IrregularLayout):
        if seen.leading is None or seen.leading.shape != tuple(layout.labels.shape):
            return False
        return seen.agrees(layout.labels.numpy())
    expected = layout.labels.numpy()
    if layout.dim == len(seen.shape) - 1 and layout.dim > 0:
        labels = seen.trailing
        return labels is not None and bool(((labels == expected) | (labels < 0)).all())
    if seen.leading is None:
        return False
    sizes = [1] * seen.leading.ndim
    sizes[layout.dim] = -1
    return seen.agrees(expected.reshape(sizes))


def is_sure(measured: list[Measurement | None], batch: int) -> bool:
    """Whether one layout alone fits what was measured, and all samples were seen."""
    return all(
        m is None or (len(m.layouts(batch)) == 1 and m.shows_all(batch))
        for m in measured
    )


def _views_of(tape: Tape, i: int) -> list[int]:
    """Nodes that view the one output of node `i` in another shape."""
    if len(tape.shapes(i)) > 1:
        return []
    return [parent for parent, _, _ in tape.parents[i] if tape.names[parent] in VIEWS]


def _like_views(
    found: list[RowLayout],
    tape: Tape,
    i: int,
    measured: Mapping[int, list[Measurement | None]],
    batch: int,
) -> list[RowLayout]:
    """Those of several layouts that also fit where the output is viewed otherwise.

    Where only the first of T tokens is seen, as before a classifier, rows [B * T] fit
    two layouts if T is one more than a multiple of B; rows [B, T] fit one.
    """
    shape = tape.shapes(i)[0]
    for view in _views_of(tape, i):
        seen = measured[view][0] if view in measured else None
        if seen is None:
            continue
        fitting = [x for x in seen.layouts(batch) if isinstance(x, RegularLayout)]
        strides = {x.stride(seen.shape) for x in fitting}
        common: list[RowLayout] = [
            x
            for x in found
            if isinstance(x, RegularLayout) and x.stride(shape) in strides
        ]
        found = common or found
    return found


def layouts_of_one(tape: Tape, plan: Plan) -> Layouts:
    """Layouts of a batch of one: all rows belong to the sample."""
    scalar = IrregularLayout(torch.zeros((), dtype=torch.long, device="cpu"), 1)
    return [
        [
            RegularLayout(0, 1, 1, shape[0]) if shape else scalar
            for shape in tape.shapes(use.node)
        ]
        for use in plan.uses
    ]
