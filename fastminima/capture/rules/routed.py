"""Parameters met by rows that data routes: experts, and what is put in their place."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from ..._dtypes import accumulation_dtype
from ..contributions import (
    Contribution,
    Dense,
    Materialized,
    Products,
    Stacked,
)
from ..graph.node import Node
from ..reading.plan import Slot
from ..rows.layout import IrregularLayout, RegularLayout, RowLayout
from ..rows.routes import index_positions
from .base import Contributions
from .pieces import from_rows

__all__ = ["grouped_mm", "index_put"]


def grouped_mm(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """Rows [S, d_in] through matrices [experts, d_in, d_out], each its own run of rows.

    Rows beyond the last run belong to no expert.
    """
    rows, ends = node._saved_self, node._saved_offs
    listed = _listed(layout)
    is_matrix = {slot.number for slot in slots} == {1}
    if not is_matrix or listed is None or ends is None:
        return {}
    if rows.dim() != 2 or len(slots[0].shape) != 3:
        return {}
    starts = [0, *ends.tolist()]
    experts = [
        _expert(rows[start:end], g[start:end], listed, slice(start, end), len(ends))
        for start, end in pairwise(starts)
    ]
    return {1: Stacked(experts)}


def _expert(
    rows: Tensor, g: Tensor, listed: IrregularLayout, own: slice, experts: int
) -> Contribution:
    """One matrix' gradient, from the rows of its own run."""

    def dense(some: RowLayout) -> Dense:
        return Dense(Products(some.rows(rows, 1), some.rows(g, 1)), out_first=False)

    layout = IrregularLayout(listed.labels[own], listed.batch)
    return from_rows(layout, dense, rows, g, shared_by=experts)


def _listed(layout: RowLayout) -> IrregularLayout | None:
    """The sample of each row of a matrix."""
    if isinstance(layout, RegularLayout) and layout.dim != 0:
        return None
    return layout.listed()


def index_put(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """One value put in many places, as a mask token."""
    indices = list(node._saved_indices)
    if [slot.number for slot in slots] != [1] or not isinstance(layout, RegularLayout):
        return {}
    if any(index is None for index in indices):
        return {}
    positions = index_positions(indices, tuple(g.shape))
    if layout.dim >= len(positions):
        return {}
    picked = g[tuple(positions)].to(accumulation_dtype(g.dtype))
    own = slots[0].shape
    shape = (1,) * (picked.dim() - len(own)) + own
    spread = positions[0].dim()
    if set(shape[:spread]) != {1} or shape[spread:] != picked.shape[spread:]:
        return {}
    labels = layout.listed().labels.to(g.device)[positions[layout.dim]]
    labels = labels.expand(picked.shape[:spread]).flatten()
    is_read = labels >= 0
    samples = picked.new_zeros(layout.count, *picked.shape[spread:])
    samples.index_add_(0, labels[is_read], picked.flatten(0, spread - 1)[is_read])
    return {1: Materialized(samples.reshape(layout.count, *own))}
