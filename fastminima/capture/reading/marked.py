"""Compiled regions whose own code shows their uses: what is seen there, and kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..compiled.marks import Into, Mark
from ..graph.passes import belongs_to_another
from ..rows.decode import Measurement
from ..rows.fingerprints import Fingerprints
from ..rows.layout import IrregularLayout, RegularLayout
from ..rows.samples import Samples, SegmentLayout, Segments
from .plan import Layouts, Path, Slot, Use

__all__ = ["Marked", "Sight", "Unmarked", "marked_region"]

_NOWHERE = -1  # stands for nodes of an eager graph


class Unmarked(Exception):
    """Why a region has to run again for the probe."""


class Sight:
    """What the measuring passes see of the uses of a compiled region.

    Args:
        seen: takes fingerprints, under the negative numbers that `key` gives.
        batch: samples.
        owner: of the passes.
    """

    def __init__(
        self, seen: dict[int, Fingerprints], batch: int, owner: object
    ) -> None:
        self._seen, self._batch, self._owner = seen, batch, owner
        self.marks: dict[int, Mark] = {}
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.reason = (
            "its backend is none of those whose graphs are marked, or no gradient of a "
            "parameter is computed in it"
        )

    def take(self, mark: Mark, g: Tensor, saved: Sequence[Tensor]) -> None:
        """Note the rows of one output gradient."""
        if belongs_to_another(self._owner):
            return
        self.marks[mark.place] = mark
        self.shapes[mark.place] = tuple(g.shape)
        prints = self._seen.setdefault(key(mark.place), Fingerprints(self._batch))
        prints((g if mark.viewed is None else g.reshape(mark.viewed),))

    def refuse(self, reason: str) -> None:
        """Note why there are no marks."""
        self.reason = reason


def key(place: int) -> int:
    """Of a use among the nodes of the region's graph, whose numbers are positive."""
    return -1 - place


@dataclass(frozen=True)
class Marked:
    """How to read a compiled region from the operators in its backward graph.

    Attributes:
        uses: by their marks' places; those of untracked parameters are missing.
        layouts: of each use.
        shapes: of its output gradient.
        sources: for each parameter, how many uses there are.
        batch: number of samples in this step, where the layouts are those of another
            one, to be carried over to the shapes that come; else None.
    """

    uses: Mapping[int, Use]
    layouts: Layouts
    shapes: Mapping[int, tuple[int, ...]] = field(compare=False)
    sources: Mapping[str, int] = field(compare=False)
    batch: int | None = None
    # How norms are computed, by place and shape, once that is decided.
    ways: dict[Any, Any] = field(init=False, default_factory=dict, compare=False)

    def at(self, mark: Mark, shape: tuple[int, ...]) -> tuple[Use, tuple] | None:
        """A tracked use and its layouts, for an output gradient of this shape.

        None where its rows are not known.
        """
        use, layouts = self.uses[mark.place], self.layouts[mark.place]
        measured = self.shapes[mark.place]
        if self.batch is None:
            return (use, layouts) if shape == measured else None
        (layout,) = layouts
        carried = layout.transfer(measured, shape, self.batch)
        if carried is None:
            return None
        sizes = {into.number: into.shape for into in mark.into}
        slots = tuple(
            replace(slot, shape=_filled(sizes[slot.number], shape))
            for slot in use.slots
        )
        return replace(use, slots=slots), (carried,)

    def carried_to(self, batch: int) -> Marked | None:
        """This region in another batch, if its layouts can be carried over."""
        layouts = (x for of_use in self.layouts.values() for x in of_use)
        if not all(isinstance(x, RegularLayout) for x in layouts):
            return None
        return replace(self, batch=batch)

    def agrees(self, other: Marked) -> bool:
        """Whether a measurement in other sizes is what this one would be there."""
        if self.uses.keys() != other.uses.keys():
            return False
        for place, (layout,) in self.layouts.items():
            if not isinstance(layout, RegularLayout):
                return False
            (now,) = other.layouts[place]
            sizes = self.shapes[place], other.shapes[place]
            if layout.transfer(*sizes, now.batch) != now:
                return False
        return True

    def resolved(self, segments: Segments) -> Marked:
        """This region with the samples that packed rows have in this step."""
        layouts = {
            place: tuple(segments.resolve(x, self.shapes[place]) for x in of_use)
            for place, of_use in self.layouts.items()
        }
        return replace(self, layouts=layouts)


def marked_region(
    sight: Sight,
    measured: Mapping[int, Sequence[Measurement | None]],
    samples: Samples,
    parameters: Mapping[int, str],
    edges: int,
    wanted: Mapping[str, int],
    eager: Mapping[str, tuple[tuple[int, ...], RegularLayout | IrregularLayout]] | None,
) -> tuple[Marked, bool]:
    """The uses that were seen, and whether what was seen will hold.

    Args:
        sight: what the operators were given.
        measured: of it, by `key`.
        samples: what a sample is.
        parameters: of the region's inputs that are tensors, by place.
        edges: how many of these there are.
        wanted: the parameters that the region's own graph uses.
        eager: what the layouts are of output gradients of these shapes, by parameter,
            where the compiled code itself does not tell.

    Raises:
        Unmarked: where not all of these are seen, or not so that they can be read.
    """
    if not wanted:  # nothing to read there, whatever it does
        return Marked({}, {}, {}, {}), True
    if not sight.marks:
        raise Unmarked(sight.reason)
    first = next(iter(sight.marks.values()))
    total = first.total
    if first.edges != edges:
        raise Unmarked(f"it has {edges} inputs and was compiled for {first.edges}")
    if len(sight.marks) != total:
        raise Unmarked(f"{len(sight.marks)} of its {total} uses got a gradient")
    uses: dict[int, Use] = {}
    layouts: Layouts = {}
    is_settled = True
    instead: dict[int | None, list[int]] = {}
    for place, mark in sorted(sight.marks.items()):
        instead.setdefault(mark.behind, []).append(place)
    for place, mark in sorted(sight.marks.items()):
        use = _use_of(mark, sight.shapes[place], parameters)
        if use is None or mark.behind is not None:
            continue
        try:
            if eager is None:
                found = {place: _layout_of(place, sight, measured, samples)}
            else:
                found = {place: (_eager_layout(use, sight.shapes[place], eager), True)}
        except Unmarked:
            if place not in instead:
                raise
            found = {
                behind: _layout_of(behind, sight, measured, samples)
                for behind in instead[place]
            }
        for chosen, (layout, holds) in found.items():
            use = _use_of(sight.marks[chosen], sight.shapes[chosen], parameters)
            assert use is not None
            uses[chosen] = use
            layouts[chosen] = (layout,)
            is_settled &= holds
    sources: dict[str, int] = {}
    for name in (name for use in uses.values() for name in use.parameters):
        sources[name] = sources.get(name, 0) + 1
    missing = sorted(wanted.keys() - sources.keys())
    if missing:
        raise Unmarked(f"the gradients of {missing[:4]} are not computed by it")
    return Marked(uses, layouts, sight.shapes, sources), is_settled


def _use_of(
    mark: Mark, shape: tuple[int, ...], parameters: Mapping[int, str]
) -> Use | None:
    """The use of tracked parameters that a mark tells of.

    `shape` is that of its output gradient, where it has sizes that change.
    """
    into = [into for into in mark.into if into.edge in parameters]
    if not into:
        return None
    slots = tuple(
        Slot(
            number,
            (_NOWHERE, 0),
            next(_filled(x.shape, shape) for x in into if x.number == number),
            tuple(_path(x, parameters) for x in into if x.number == number),
        )
        for number in sorted({x.number for x in into})
    )
    return Use(_NOWHERE, mark.name, slots)


def _filled(sizes: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes, those that change being those of the same dims of another shape."""
    if -1 not in sizes:
        return sizes
    return tuple(
        now if size == -1 else size for size, now in zip(sizes, shape, strict=True)
    )


def _path(into: Into, parameters: Mapping[int, str]) -> Path:
    return Path(parameters[into.edge], None, into.edge, is_copy=False)


def _layout_of(
    place: int,
    sight: Sight,
    seen: Mapping[int, Sequence[Measurement | None]],
    samples: Samples,
) -> tuple[RegularLayout | IrregularLayout | SegmentLayout, bool]:
    """The layout of an output gradient that its rule can read."""
    mark, shape = sight.marks[place], sight.shapes[place]
    if samples.count == 1:
        return _of_one(mark, shape), True
    if "of_one" in mark.constants:
        raise Unmarked(mark.constants["of_one"])
    measured = seen.get(key(place), ())
    measurement = measured[0] if measured else None
    if measurement is None:
        raise Unmarked(f"no gradient came to {mark.name}")
    found = samples.layouts(measurement)
    flat = [_flattened(x, mark.viewed) for x in found]
    fitting = [x for x in flat if _is_read(mark, x, shape)]
    if not fitting:
        raise Unmarked(
            f"the rows of {mark.name} (shape {shape}) are not those of samples in an "
            "order that is read there"
        )
    holds = len(found) == 1 and not isinstance(fitting[0], IrregularLayout)
    return fitting[0], holds and samples.are_shown(measurement)


def _eager_layout(
    use: Use,
    shape: tuple[int, ...],
    eager: Mapping[str, tuple[tuple[int, ...], RegularLayout | IrregularLayout]],
) -> RegularLayout:
    """The layout that an output gradient has in the same region, uncompiled."""
    for name in use.parameters:
        measured, layout = eager[name]
        if measured == shape and isinstance(layout, RegularLayout):
            return layout
    raise Unmarked(f"the rows of {use.name} are not those of the uncompiled region")


def _of_one(mark: Mark, shape: tuple[int, ...]) -> RegularLayout | IrregularLayout:
    """All rows belong to the one sample, in a form that the rule reads."""
    if not shape:
        return IrregularLayout(torch.zeros((), dtype=torch.long, device="cpu"), 1)
    candidates = (RegularLayout(dim, 1, 1, size) for dim, size in enumerate(shape))
    for layout in candidates:
        if _is_read(mark, layout, shape):
            return layout
    raise Unmarked(f"{mark.name} of shape {shape} sums over no rows")


def _flattened(
    layout: RegularLayout | IrregularLayout | SegmentLayout,
    viewed: tuple[int, ...] | None,
) -> RegularLayout | IrregularLayout | SegmentLayout:
    """A layout of rows [..., features] for the same rows in a matrix."""
    if viewed is None or isinstance(layout, SegmentLayout):
        return layout
    if isinstance(layout, IrregularLayout):
        return IrregularLayout(layout.labels.flatten(), layout.batch)
    dim, last = layout.dim, len(viewed) - 1
    if dim == last:
        return layout.along(1)
    outer = layout.outer * math.prod(viewed[:dim])
    return RegularLayout(
        0, outer, layout.batch, layout.inner * math.prod(viewed[dim + 1 : last])
    )


def _is_read(
    mark: Mark,
    layout: RegularLayout | IrregularLayout | SegmentLayout,
    shape: tuple[int, ...],
) -> bool:
    """Whether the rule for such a use reads rows in such an order."""
    name = mark.name
    if not isinstance(layout, RegularLayout):
        if name == "AddBackward0":
            return len(shape) > 1
        rows_only = ("AddmmBackward0", "EmbeddingBackward0")
        return name in rows_only and len(shape) > 1
    dim = layout.dim
    if name == "AddBackward0":
        into = mark.into[0].shape
        return into[dim] == 1
    if name == "AddmmBackward0":
        return dim == 0
    if name == "BmmBackward0":
        return dim == 1
    if name == "ConvolutionBackward0":
        return dim == 0 and (layout.is_one_row or len(shape) < 5)
    if name in ("NativeGroupNormBackward0", "NativeBatchNormBackward0"):
        return dim == 0
    if name in ("NativeLayerNormBackward0", "FusedRmsNormBackward0"):
        return dim < len(shape) - len(mark.constants["normalized_shape"])
    if name in ("EmbeddingBackward0", "IndexSelectBackward0"):
        return dim < len(shape) - 1
    return dim < len(shape) - len(mark.into[0].shape) + _indexed(mark)


def _indexed(mark: Mark) -> int:
    """How many dims of a table an index picks from."""
    return len(mark.saved)
