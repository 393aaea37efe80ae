"""Whether the batch axis of a scalar loss is that of the data.

A scalar loss does not say where its samples are. The first tensor below it that has
their number in the right dim may be another axis of that size (class sums, selected
tokens, time), or the samples in another order. Where data meets the first parameters
its rows are still those of the batch: they must come out as the samples, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from ..graph.nodes import PRODUCTS
from ..graph.tape import Tape
from ..rows.layout import IrregularLayout, RegularLayout
from ..rows.samples import Samples, SegmentLayout, Segments
from .plan import Layouts, Plan, Use

__all__ = ["Shown", "said_together", "what_uses_say"]


class Shown(Enum):
    """What the rows of some data say of an axis."""

    SAMPLES = auto()  # it is that of the samples, in order
    OTHER = auto()  # it is another one, or they are in another order
    EITHER = auto()  # it may be either
    NOTHING = auto()


def what_uses_say(
    tape: Tape,
    plan: Plan,
    layouts: Layouts,
    samples: Samples,
) -> list[Shown]:
    """Whether the rows of the data are the samples, by each use of data in a graph.

    Rows that were routed before they met a parameter say nothing. `layouts` are those
    of the plan's uses, for segments before they are resolved.
    """
    words: list[Shown] = []
    calls: dict[tuple, list[tuple[int, int]]] = {}
    for use in plan.uses:
        edges, of_use = tape.children[use.node], layouts[use.node]
        if not of_use or any(tape.is_data(edge, plan.preparing) for edge in edges):
            continue
        layout = of_use[0]
        if layout is None:
            continue
        word = _says(tape, use, layout, samples)
        alone = _the_one(layout)
        if word is Shown.NOTHING and alone is not None:
            call = tape.nodes[use.node]._sequence_nr(), alone
            calls.setdefault((use.name, *use.parameters), []).append(call)
        words.append(word)
    return words + [_are_called(of_layer) for of_layer in calls.values()]


def said_together(words: Sequence[Shown]) -> Shown:
    """Whether the rows of the data are the samples, in order, and no other axis.

    Some use of data must show it, and none may show something else.
    """
    # One that contradicts says most, and then one that cannot tell.
    said = (Shown.OTHER, Shown.EITHER, Shown.SAMPLES)
    return next((word for word in said if word in words), Shown.OTHER)


def _the_one(layout: object) -> int | None:
    """The sample that all rows belong to, where there is one only."""
    if not isinstance(layout, IrregularLayout) or layout.batch == 1:
        return None
    labels = layout.labels[layout.labels >= 0].unique().tolist()
    return labels[0] if len(labels) == 1 else None


def _are_called(calls: list[tuple[int, int]]) -> Shown:
    """What a layer that is called with single samples says by the order of calls."""
    met = list(dict.fromkeys(sample for _, sample in sorted(calls)))
    if len(met) == 1:
        return Shown.NOTHING
    return Shown.SAMPLES if met == sorted(met) else Shown.OTHER


def _data_dims(use: Use, rank: int) -> Sequence[int]:
    """The dims of a use's output that data give, and not the parameters there.

    [rows, d_in] @ weight has data in dim 0, weight @ [d_in, columns] in dim 1.
    """
    product = PRODUCTS.get(use.name)
    if product is None or product.factors is None or not product.is_of_matrices:
        return range(rank)
    left, _ = product.factors
    return (1,) if left in {slot.number for slot in use.slots} else (0,)


def _says(tape: Tape, use: Use, layout: object, samples: Samples) -> Shown:
    """What the rows of one use say."""
    if isinstance(samples, Segments):
        is_shown = isinstance(layout, SegmentLayout)
        return Shown.SAMPLES if is_shown else Shown.OTHER
    batch, shape = samples.count, tape.shapes(use.node)[0]
    dims = _data_dims(use, len(shape))
    # Is there a dim in the place that the samples' would have, and as long?
    is_in_place = samples.dim in dims and shape[samples.dim] == batch
    if not isinstance(layout, RegularLayout):
        return Shown.OTHER if is_in_place else Shown.NOTHING
    if layout.dim != samples.dim:
        return Shown.OTHER if is_in_place else Shown.SAMPLES
    # With samples and time in one dim, time first: it must not be as long as the batch.
    is_told = layout.outer == 1 or layout.outer * layout.inner % batch != 0
    return Shown.SAMPLES if is_told else Shown.EITHER
