"""From what was seen of a graph to how it is read, and how long that holds."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CaptureError
from ..graph.nodes import VIEWS
from ..graph.tape import Tape
from ..rows.decode import Measurement
from ..rows.evidence import Evidence, Measurements
from ..rows.guards import (
    Guard,
    find_guards,
    gather_nodes,
    own_guards,
    watched_sources,
)
from ..rows.layout import IrregularLayout, RegularLayout, RowLayout
from ..rows.own_functions import OwnGuard
from ..rows.routes import Routes, find_routes
from ..rows.samples import Batch
from .plan import Layouts, Plan, find_plan, watched_nodes
from .recipe import Recipe
from .refusals import Whereabouts, refuse_hidden

__all__ = ["Fit", "disagreement", "fit", "fit_one", "guards_of", "nodes_to_watch"]


@dataclass(frozen=True)
class Fit:
    """The uses of a graph and the layouts that fit what was seen at them.

    Attributes:
        is_settled: whether one layout alone fits at each use and all samples were seen,
            so that it will fit again.
    """

    plan: Plan
    layouts: Layouts
    routes: Routes | None
    is_settled: bool


def nodes_to_watch(tape: Tape, batch: int, regions: Container[int] = ()) -> list[int]:
    """Nodes whose rows have to be measured: uses, views below them, and gathers."""
    near = watched_nodes(tape, regions)
    views = [view for i in near for view in _views_of(tape, i)]
    return sorted({*near, *views, *watched_sources(tape, batch)})


def fit(
    evidence: Evidence,
    where: Whereabouts,
    regions: Container[int] = (),
    *,
    is_inner: bool = False,
) -> tuple[Fit, Evidence]:
    """Where parameters meet data, and whose the rows are there.

    Returns the evidence too, which knows then what prepares parameters. Rows that data
    route are followed, but in a graph that is there in the backward pass only.

    Raises:
        CaptureError: for rows that do not each belong to one sample.
    """
    plan = find_plan(evidence.tape, evidence, regions)
    refuse_hidden(plan)
    evidence = evidence.given(plan.preparing)
    routes = None
    if isinstance(evidence.samples, Batch) and not is_inner:
        routes = find_routes(evidence)
    layouts, is_settled = _layouts(
        where, plan, evidence, routes.nodes if routes else ()
    )
    return Fit(plan, layouts, routes, is_settled), evidence


def fit_one(tape: Tape, regions: Container[int] = ()) -> Fit:
    """The uses of a graph of one sample, to which all rows belong."""
    plan = find_plan(tape, None, regions)
    refuse_hidden(plan)
    scalar = IrregularLayout(torch.zeros((), dtype=torch.long, device="cpu"), 1)
    layouts: Layouts = {
        use.node: tuple(
            RegularLayout(0, 1, 1, shape[0]) if shape else scalar
            for shape in tape.shapes(use.node)
        )
        for use in plan.uses
    }
    return Fit(plan, layouts, None, True)


def _layouts(
    where: Whereabouts, plan: Plan, evidence: Evidence, routed: Container[int]
) -> tuple[Layouts, bool]:
    """Layouts of all uses but the routed ones, and whether they may be kept."""
    samples = evidence.samples
    layouts: Layouts = {}
    is_settled = True
    for use in plan.uses:
        of_use: list[Any] = []
        for measurement in () if use.node in routed else evidence.seen[use.node]:
            if measurement is None:
                of_use.append(None)
                continue
            found: list[Any] = samples.layouts(measurement)
            if len(found) > 1 and isinstance(samples, Batch):
                found = _like_views(found, evidence, use.node)
            if not found:
                message = where.mixed_message(evidence.tape, use.node, samples)
                raise CaptureError(message)
            is_settled &= len(found) == 1
            is_settled &= not isinstance(found[0], IrregularLayout)
            is_settled &= samples.are_shown(measurement)
            of_use.append(found[0])
        layouts[use.node] = tuple(of_use)
    return layouts, is_settled


def guards_of(
    evidence: Evidence, routes: Routes | None
) -> Sequence[Guard | OwnGuard] | None:
    """What must stay the same for layouts to hold, or None if that is not known.

    Segments come with their places in each step. That attention keeps them apart was
    measured; where rows are picked by an index, they are measured each time. (Not where
    losses are, of which there is one a token.)
    """
    tape, samples = evidence.tape, evidence.samples
    if isinstance(samples, Batch):
        return find_guards(evidence, routes.covered if routes else ())
    tokens = samples.ids.numel()
    for i in gather_nodes(tape):
        edges = (edge for edge in tape.children[i] if edge is not None)
        shapes = [*tape.shapes(i), *(tape.shapes(j)[output] for j, output in edges)]
        if i not in evidence.preparing and any(math.prod(s) > tokens for s in shapes):
            return None
    own = own_guards(tape, evidence.preparing)
    if own is None or any(guard.indices for guard in own):
        return None
    return own


def disagreement(recipe: Recipe, seen: Measurements) -> int | None:
    """The first use whose rows a new measurement gives to other samples.

    Rows that were not seen contradict nothing.
    """
    for use in recipe.plan.uses:
        of_use = recipe.layouts[use.node]
        for layout, now in zip(of_use, seen.get(use.node, ()), strict=False):
            if layout is not None and now is not None and not _agree(layout, now):
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


def _views_of(tape: Tape, i: int) -> list[int]:
    """Nodes that view the one output of node `i` in another shape."""
    if len(tape.shapes(i)) > 1:
        return []
    return [parent for parent, _, _ in tape.parents[i] if tape.names[parent] in VIEWS]


def _like_views(found: list[RowLayout], evidence: Evidence, i: int) -> list[RowLayout]:
    """The layouts, of several, that also fit where the output is viewed otherwise.

    Where only the first of T tokens is seen, as before a classifier, rows [B * T] fit
    two layouts if T is one more than a multiple of B; rows [B, T] fit one.
    """
    tape = evidence.tape
    shape = tape.shapes(i)[0]
    for view in _views_of(tape, i):
        seen = evidence.first(view)
        if seen is None:
            continue
        fitting = [x for x in evidence.layouts(view) if isinstance(x, RegularLayout)]
        strides = {x.stride(seen.shape) for x in fitting}
        common: list[RowLayout] = [
            x
            for x in found
            if isinstance(x, RegularLayout) and x.stride(shape) in strides
        ]
        found = common or found
    return found
