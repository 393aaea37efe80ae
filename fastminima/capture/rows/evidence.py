"""What was seen of the rows of a graph, and the questions that are asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..graph.tape import Tape
from .decode import Measurement
from .layout import RegularLayout, RowLayout
from .samples import Samples

__all__ = ["Evidence", "Measurements"]

# Of each watched node, of each of its outputs; None where no gradient came.
Measurements = dict[int, list[Measurement | None]]


@dataclass(frozen=True)
class Evidence:
    """What the measuring passes showed of one graph.

    Attributes:
        tape: the graph.
        samples: what a sample is.
        seen: of each watched node, of each of its outputs; None where no gradient came.
        preparing: nodes that prepare parameters, once that is known: what comes from
            them is no data.
    """

    tape: Tape
    samples: Samples
    seen: Measurements
    preparing: frozenset[int] = frozenset()

    def given(self, preparing: frozenset[int]) -> Evidence:
        """This evidence, knowing which nodes prepare parameters."""
        return replace(self, preparing=preparing)

    def first(self, i: int | None) -> Measurement | None:
        """What was seen of the first output of a node, which most have alone."""
        found = None if i is None else self.seen.get(i)
        return found[0] if found else None

    def layouts(self, i: int | None) -> list[RowLayout]:
        """The layouts that fit there; none where nothing was seen or rows are mixed."""
        found = self.first(i)
        return [] if found is None else found.layouts(self.samples.count)

    def batch_dim(self, i: int | None) -> int | None:
        """The one dim that runs over the batch at node i, if there is one for sure."""
        layouts = self.layouts(i)
        if len(layouts) == 1 and isinstance(layouts[0], RegularLayout):
            return layouts[0].dim
        return None

    def is_mixed(self, i: int) -> bool:
        """Whether rows of an output do not each belong to one sample."""
        return any(m is not None and m.is_mixed for m in self.seen[i])

    def is_sure(self, i: int) -> bool:
        """Whether one layout alone fits each output, and all samples were seen."""
        batch = self.samples.count
        return all(
            m is None or (len(m.layouts(batch)) == 1 and m.shows_all(batch))
            for m in self.seen[i]
        )

    def is_data(self, edge: tuple[int, int] | None) -> bool:
        """Whether rows of samples come along an edge, and not a parameter."""
        return self.tape.is_data(edge, self.preparing)

    def hide(self, nodes: Iterable[int]) -> None:
        """Take what was seen at these nodes for rows that all samples share.

        Above the axis of a scalar loss no sample has a weight of its own: all rows keep
        their size in each pass, as those of a sample with the weight one would.
        """
        for i in nodes:
            if i in self.seen:
                self.seen[i] = [m and m.mixed() for m in self.seen[i]]
