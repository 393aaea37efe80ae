"""What was found out about a graph structure, for the steps that repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..graph.tape import Tape
from ..rows.batch_axis import batch_edges
from ..rows.guards import Guard, placing_numbers, read_numbers, reordering_nodes
from ..rows.layout import IrregularLayout, RegularLayout
from ..rows.own_functions import OwnGuard
from ..rows.routes import Routes
from ..rows.samples import Batch, Segments
from ..session.single_rows import RowUse, find_row_uses
from . import mixing as batchnorm
from .plan import Plan
from .regions import Region, region_shapes

__all__ = ["Found", "Known", "Layouts"]

# Of each use, of each of its outputs: a RowLayout, None where no gradient comes, or a
# SegmentLayout, which becomes a RowLayout in each step.
Layouts = list[list[Any]]
# Sizes of a graph are measured this often before a layout is carried over to new ones.
_MEASURED_SIZES = 3
_MOST_SIZES = 256
# A known structure is measured anew after so many steps, whatever the cadence is.
_EARLY = 10


@dataclass(frozen=True)
class Found:
    """How to read a graph: the uses, whose rows are whose, and what runs again.

    `regions` has for the node of a reentrant checkpoint how to read what it runs, or
    None where no gradient came when its rows were measured. `routes` say whose rows are
    whose at the uses that have no layouts, in each graph anew.
    """

    plan: Plan
    layouts: Layouts
    regions: dict[int, Region | None] = field(default_factory=dict)
    routes: Routes | None = None

    def row_uses(self, tape: Tape) -> dict[int, RowUse]:
        """The uses whose norms are those of single rows; the same in every step."""
        cached = self.__dict__.get("_row_uses")
        if cached is None:
            cached = self.__dict__["_row_uses"] = find_row_uses(tape, self)
        return cached

    def followed(self, tape: Tape, samples: Batch | Segments) -> Found | None:
        """The same with the layouts of all uses; None where the routes do not agree."""
        if isinstance(samples, Segments):
            return self._resolved(tape, samples)
        if self.routes is None:
            return self
        labels = self.routes.labels(tape)
        if labels is None:
            return None
        layouts = [
            self.routes.layouts(tape, labels, use.node, samples.count)
            if use.node in self.routes.nodes
            else of_use
            for use, of_use in zip(self.plan.uses, self.layouts, strict=True)
        ]
        return replace(self, layouts=layouts)

    def _resolved(self, tape: Tape, segments: Segments) -> Found:
        layouts: Layouts = []
        for use, of_use in zip(self.plan.uses, self.layouts, strict=True):
            shapes = tape.shapes(use.node)
            layouts.append(
                [
                    None if layout is None else segments.resolve(layout, shape)
                    for layout, shape in zip(of_use, shapes, strict=True)
                ]
            )
        regions = {
            i: None if region is None else region.resolved(segments)
            for i, region in self.regions.items()
        }
        return replace(self, layouts=layouts, regions=regions)

    def choosing(self, samples: Tensor) -> Found:
        """The same, looking at some samples only."""
        regions = {
            i: None if r is None else replace(r, layouts=_choosing(r.layouts, samples))
            for i, r in self.regions.items()
        }
        return replace(self, layouts=_choosing(self.layouts, samples), regions=regions)


def _choosing(layouts: Sequence[Sequence[Any]], samples: Tensor) -> Layouts:
    return [
        [None if layout is None else layout.choose(samples) for layout in of_use]
        for of_use in layouts
    ]


class Known:
    """One graph structure in all the sizes it was met in."""

    def __init__(
        self,
        tape: Tape,
        found: Found,
        guards: Sequence[Guard | OwnGuard],
        *,
        moves_rows: bool = True,
        is_open: bool = False,
        rejected: frozenset[int] = frozenset(),
    ) -> None:
        self.norms = batchnorm.norm_nodes(tape)
        self._is_open = is_open  # a scalar loss: its samples are found on the way
        self._rejected = rejected  # what only looks like their axis
        self._uses = found.plan.uses
        self._guards = tuple(guards)
        self._plan = found.plan
        self._regions = tuple(found.regions)
        self._routed = _routed(found)
        preparing = found.plan.preparing
        self._placing = placing_numbers(tape, preparing) if moves_rows else []
        self._reordering = reordering_nodes(tape, preparing) if moves_rows else []
        self._found: dict[tuple, Found] = {}
        self._measured: list[tuple] = []
        self.recalls = 0  # steps since it was measured
        self._follows = True  # measured layouts were those carried over from the first

    def is_due(self, every: int) -> bool:
        """Whether this structure is to be measured anew; counts the step.

        Every so many steps, and once early on.
        """
        self.recalls += 1
        return self.recalls % every == 0 or self.recalls == min(_EARLY, every)

    def fits(self, found: Found, guards: Sequence[Guard | OwnGuard]) -> bool:
        """Whether a new measurement speaks of the same uses under the same guards."""
        return (
            self._uses == found.plan.uses
            and self._guards == tuple(guards)
            and self._routed == _routed(found)
        )

    def recall(self, tape: Tape, samples: Batch | Segments) -> Found | None:
        """What holds for this graph, or None when it has to be measured.

        Raises:
            CaptureError: for a batch size that the graph does not have.
        """
        if not all(guard.holds(tape) for guard in self._guards):
            return None
        signature = self._signature(tape, samples)
        found = self._found.get(signature)
        if found is not None:
            return found.followed(tape, samples)
        if len(self._measured) < _MEASURED_SIZES or not self._follows:
            return None
        layouts = self._carried_over(signature)
        if layouts is None:
            return None
        if self._is_open:
            batch_edges(
                tape, samples, self._rejected
            )  # raises where there is no such axis
        routes = self._found[self._measured[0]].routes
        if routes is not None:
            routes = routes.resized(tape, samples.count)
            if routes is None:
                return None
        found = Found(self._plan.sized(tape), layouts, routes=routes)
        self._keep(signature, found)
        return found.followed(tape, samples)

    def remember(self, tape: Tape, samples: Batch | Segments, found: Found) -> None:
        """Keep what was measured on a graph."""
        signature = self._signature(tape, samples)
        if self._measured:
            self._follows &= self._carried_over(signature) == found.layouts
        self._follows &= not found.regions  # they may compute anything in other sizes
        if signature not in self._found:
            self._measured.append(signature)
        self._keep(signature, found)

    def _keep(self, signature: tuple, found: Found) -> None:
        if len(self._found) >= _MOST_SIZES:
            self._found = {s: self._found[s] for s in self._measured}
        self._found[signature] = found

    def _signature(self, tape: Tape, samples: Batch | Segments) -> tuple:
        """All by which two graphs of one structure can differ in their layouts."""
        shapes = zip(self._plan.uses, self._plan.signature(tape), strict=True)
        return (
            samples.sizes if samples.count > 1 else 1,  # else all rows are the one's
            tuple(() if use.node in self._routed else s for use, s in shapes),
            self._plan.entrances(tape),
            read_numbers(tape, self._placing),
            tuple(tape.shapes(i)[0] for i in self._reordering),
            tuple(region_shapes(tape, i) for i in self._regions),
        )

    def _carried_over(self, signature: tuple) -> Layouts | None:
        """The layouts of the first measurement in the sizes of another graph."""
        old_sizes, old_shapes, old_entrances, old_numbers, before, _ = self._measured[0]
        sizes, new_shapes, entrances, numbers, reordered, _ = signature
        if numbers != old_numbers or _ones(entrances) != _ones(old_entrances):
            return None
        first = self._found[self._measured[0]]
        if _is_between(first) and not _scales(before, reordered, old_sizes, sizes):
            return None
        layouts: Layouts = []
        for of_use, old, new in zip(first.layouts, old_shapes, new_shapes, strict=True):
            moved: list[Any] = []
            for layout, was, now in zip(of_use, old, new, strict=True):
                if layout is None:
                    moved.append(None)
                    continue
                assert not isinstance(layout, IrregularLayout)
                carried = layout.transfer(was, now, sizes)
                if carried is None:
                    return None
                moved.append(carried)
            layouts.append(moved)
        return layouts


def _is_between(found: Found) -> bool:
    """Whether the batch is somewhere in the middle of a dim.

    Then the dim's size does not say what is on either side of it.
    """
    regular = found.routes.regular.values() if found.routes is not None else ()
    layouts = [x for of_use in found.layouts for x in of_use]
    layouts += [stretch.layout for stretch in regular]
    return any(
        isinstance(x, RegularLayout) and x.outer > 1 and x.inner > 1 for x in layouts
    )


def _scales(
    old: Sequence[Sequence[int]],
    new: Sequence[Sequence[int]],
    old_batch: int,
    batch: int,
) -> bool:
    """Whether shapes differ by the batch size alone."""
    return all(
        len(a) == len(b)
        and all(x == y or x * batch == y * old_batch for x, y in zip(a, b, strict=True))
        for a, b in zip(old, new, strict=True)
    )


def _routed(found: Found) -> frozenset[int]:
    """Nodes whose layouts the routes give."""
    return frozenset(found.routes.nodes if found.routes is not None else ())


def _ones(shapes: Sequence[Sequence[int]]) -> list[list[bool]]:
    return [[size == 1 for size in shape] for shape in shapes]
