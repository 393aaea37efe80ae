"""Whether the batch axis of a scalar loss is that of the data.

A scalar loss does not say where its samples are. The first tensor below it that has
their number in the right dim may be another axis of that size (class sums, selected
tokens, time), or the samples in another order. Where data meets the first parameters
its rows are still those of the batch: they must come out as the samples, in order.
"""

from __future__ import annotations

from collections.abc import Sequence

from .layout import IrregularLayout, RegularLayout
from .plan import Plan, Use
from .samples import Batch, SegmentLayout, Segments
from .shared_rows import is_data
from .tape import Tape

__all__ = ["are_shown"]

# Products: the dims of the output that the data give when a parameter comes in by an
# input.
_DATA_DIMS = {
    ("MmBackward0", 0): (1,),
    ("MmBackward0", 1): (0,),
    ("AddmmBackward0", 1): (1,),
    ("AddmmBackward0", 2): (0,),
    ("AddmmBackward0", 0): (0,),
}


def are_shown(
    tape: Tape,
    plan: Plan,
    layouts: Sequence[Sequence[object]],
    samples: Batch | Segments,
) -> bool:
    """Whether the rows of the data are the samples, in order, and no other axis.

    Some use of data must show it, and none may show something else. Rows that were
    routed before they met a parameter say nothing. `layouts` are those of the plan's
    uses, for segments before they are resolved.
    """
    words = []
    calls: dict[tuple, list[tuple[int, int]]] = {}
    for use, of_use in zip(plan.uses, layouts, strict=True):
        edges = tape.children[use.node]
        if not of_use or any(is_data(tape, edge, plan.preparing) for edge in edges):
            continue
        layout = of_use[0]
        if layout is None:
            continue
        word = _says(tape, use, layout, samples)
        alone = _the_one(layout)
        if word is None and alone is not None:
            call = tape.nodes[use.node]._sequence_nr(), alone
            calls.setdefault((use.name, *use.parameters), []).append(call)
        words.append(word)
    words += [_is_called_in_order(of_layer) for of_layer in calls.values()]
    return any(words) and False not in words


def _the_one(layout: object) -> int | None:
    """The sample that all rows belong to, where there is one only."""
    if not isinstance(layout, IrregularLayout) or layout.batch == 1:
        return None
    labels = layout.labels[layout.labels >= 0].unique().tolist()
    return labels[0] if len(labels) == 1 else None


def _is_called_in_order(calls: list[tuple[int, int]]) -> bool | None:
    """Whether a layer that is called with single samples meets them in order."""
    met = list(dict.fromkeys(sample for _, sample in sorted(calls)))
    return met == sorted(met) if len(met) > 1 else None


def _says(
    tape: Tape, use: Use, layout: object, samples: Batch | Segments
) -> bool | None:
    """Whether the rows of a use show the samples in order; None if they say nothing."""
    if isinstance(samples, Segments):
        return isinstance(layout, SegmentLayout)
    batch, shape = samples.count, tape.shapes(use.node)[0]
    slots = {slot.number for slot in use.slots}
    dims = next(
        (d for (n, s), d in _DATA_DIMS.items() if n == use.name and s in slots),
        range(len(shape)),
    )
    # Is there a dim in the place that the samples' would have, and as long?
    is_in_place = samples.dim in dims and shape[samples.dim] == batch
    if not isinstance(layout, RegularLayout):
        return False if is_in_place else None
    if layout.dim == samples.dim and layout.outer == 1:
        return True
    if layout.dim != samples.dim:
        return not is_in_place
    # Both are in one dim: then time must not be as long as the batch.
    return layout.outer * layout.inner % batch != 0
