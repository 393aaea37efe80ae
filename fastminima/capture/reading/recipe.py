"""How to read a graph: its uses, whose the rows of each are, and what runs again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ..errors import CaptureError
from ..graph.tape import Tape
from ..rows.guards import places
from ..rows.routes import Routes
from ..rows.samples import Samples, Segments
from .marked import Marked
from .plan import Layouts, Plan
from .regions import tape_of

__all__ = ["Recipe", "Region"]


@dataclass(frozen=True)
class Region:
    """How to read a region, whose graph is there in the backward pass only.

    Attributes:
        key, shapes: of the graph that was measured.
        inputs: the parameters among the tensors that the region is given, by place.
        places: what says where rows go; None where they all belong to one sample.
    """

    key: Hashable
    plan: Plan
    layouts: Layouts
    shapes: tuple
    inputs: Mapping[int, str]
    places: tuple | None

    @property
    def sources(self) -> Mapping[str, int]:
        """For each parameter, how many uses there are."""
        return self.plan.sources

    def resolved(self, segments: Segments) -> Region:
        """This region with the samples that rows have in this step."""
        shapes = {
            use.node: of_use
            for use, of_use in zip(self.plan.uses, self.shapes, strict=True)
        }
        return replace(self, layouts=_resolved(self.layouts, shapes, segments))

    def read(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        names: Mapping[int, str],
    ) -> Tape:
        """The graph of the region, when it is the one that was measured.

        Raises:
            CaptureError: when it is another.
        """
        tape = tape_of(inputs, outputs, names, self.inputs)
        is_same = tape.key == self.key and self.plan.signature(tape) == self.shapes
        if is_same and self.places is not None:
            is_same = places(tape, self.plan.preparing) == self.places
        if not is_same:
            raise CaptureError(
                "A region that runs again in the backward pass (a reentrant "
                "checkpoint, or a compiled region) computed something else now than "
                "when its rows were measured. Use use_reentrant=False, or run the "
                "uncompiled module."
            )
        return tape


@dataclass(frozen=True)
class Recipe:
    """How to read a graph. It holds no node, so it outlives the graph.

    Attributes:
        plan: where parameters meet data.
        layouts: of each output of each use; those of routed uses are empty.
        regions: how to read each node that has a graph of its own; None where no
            gradient came when its rows were measured.
        routes: they give the layouts of the other uses, in each graph anew.
        programs: what was made of this recipe once, for the passes that repeat it
            (`session/program.py`).
        lasts: whether it is kept; else it is made anew in each step.
    """

    plan: Plan
    layouts: Layouts
    regions: dict[int, Region | Marked | None] = field(default_factory=dict)
    routes: Routes | None = None
    programs: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    lasts: bool = field(default=True, compare=False)

    @property
    def runs_again(self) -> bool:
        """Whether some region has a graph of its own, in a pass inside the pass."""
        return not all(isinstance(r, Marked | None) for r in self.regions.values())

    @cached_property
    def inside(self) -> frozenset[str]:
        """The parameters that are used in regions."""
        there = (r for r in self.regions.values() if r is not None)
        return frozenset(name for region in there for name in region.sources)

    def followed(self, tape: Tape, samples: Samples) -> Recipe | None:
        """This recipe with layouts of all uses; None where its routes do not agree."""
        if isinstance(samples, Segments):
            shapes = {use.node: tape.shapes(use.node) for use in self.plan.uses}
            regions = {
                i: None if region is None else region.resolved(samples)
                for i, region in self.regions.items()
            }
            layouts = _resolved(self.layouts, shapes, samples)
            return self._for_now(layouts, regions)
        if self.routes is None:
            return self
        labels = self.routes.labels(tape)
        if labels is None:
            return None
        routed = {
            use.node: tuple(self.routes.layouts(tape, labels, use.node, samples.count))
            for use in self.plan.uses
            if use.node in self.routes.nodes
        }
        return self._for_now({**self.layouts, **routed}, self.regions)

    def choosing(self, samples: Tensor) -> Recipe:
        """This recipe, looking at some samples only."""
        regions = {
            i: None if r is None else replace(r, layouts=_choosing(r.layouts, samples))
            for i, r in self.regions.items()
        }
        return self._for_now(_choosing(self.layouts, samples), regions)

    def _for_now(
        self, layouts: Layouts, regions: dict[int, Region | Marked | None]
    ) -> Recipe:
        """This recipe with other layouts, for one step."""
        return replace(self, layouts=layouts, regions=regions, programs={}, lasts=False)


def _resolved(
    layouts: Layouts,
    shapes: Mapping[int, Sequence[tuple[int, ...]]],
    segments: Segments,
) -> Layouts:
    """Layouts with the samples that packed rows have in this step."""
    return {
        node: tuple(
            None if layout is None else segments.resolve(layout, shape)
            for layout, shape in zip(of_use, shapes[node], strict=True)
        )
        for node, of_use in layouts.items()
    }


def _choosing(layouts: Layouts, samples: Tensor) -> Layouts:
    return {
        node: tuple(
            None if layout is None else layout.choose(samples) for layout in of_use
        )
        for node, of_use in layouts.items()
    }
