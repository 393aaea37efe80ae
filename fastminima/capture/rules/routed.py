"""Rules for parameters that rows are gathered from, put into, or routed through.

Tables looked up by indexing, mask tokens put in the place of some rows, and experts
whose rows lie in one matrix, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Size, Tensor

from ..._dtypes import accumulation_dtype
from ..contributions import (
    Contribution,
    Dense,
    Embedding,
    Materialized,
    Stacked,
    reshaped,
)
from ..reading.plan import Slot
from ..rows.layout import IrregularLayout, RegularLayout, RowLayout
from ..rows.routes import index_positions
from .pieces import from_rows

__all__ = ["GATHERED"]

Contributions = dict[int, Contribution]


def _grouped_mm(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
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
        return Dense(some.rows(rows, 1), some.rows(g, 1), out_first=False)

    layout = IrregularLayout(listed.labels[own], listed.batch)
    return from_rows(layout, dense, rows, g, shared_by=experts)


def _listed(layout: RowLayout) -> IrregularLayout | None:
    """The sample of each row of a matrix."""
    if isinstance(layout, RegularLayout) and layout.dim != 0:
        return None
    return layout.listed()


def _index(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """A table indexed along its first dims: as an embedding."""
    indices = list(node._saved_indices)
    if not indices or any(index is None for index in indices):
        return {}
    return _looked_up(index_positions(indices, slots[0].shape), g, layout, slots[0])


def _index_select(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    if node._saved_dim != 0:
        return {}
    return _looked_up([node._saved_index], g, layout, slots[0])


def _looked_up(
    positions: Sequence[Tensor], g: Tensor, layout: RowLayout, slot: Slot
) -> Contributions:
    """`table[positions]`: a table of as many rows as its indexed dims have places."""
    rows = 1
    ids = torch.zeros((), dtype=torch.long, device=g.device)
    for position, size in zip(positions, slot.shape, strict=False):
        ids = ids * size + position
        rows *= size
    width = Size(slot.shape[len(positions) :]).numel()
    if isinstance(layout, RegularLayout):
        if layout.dim >= ids.dim():
            return {}
    else:
        labels = _first_dims(layout.labels, ids.dim())
        if labels is None:
            return {}
        layout = IrregularLayout(labels, layout.batch)
    values = g.reshape(*ids.shape, width)

    def of_rows(some: RowLayout) -> Embedding:
        return Embedding(some.rows(ids, 0), some.rows(values, 1), -1, rows)

    table = from_rows(layout, of_rows, values)
    if table.shape == slot.shape:
        return {slot.number: table}
    return {slot.number: reshaped(table, slot.shape)}


def _first_dims(labels: Tensor, dims: int) -> Tensor | None:
    """Labels of the first dims alone, if the others make no difference."""
    if labels.dim() < dims:
        return None
    rest = labels.reshape(*labels.shape[:dims], -1)
    most = rest.amax(-1) if rest.shape[-1] else rest.new_full(rest.shape[:-1], -1)
    agree = (rest == most[..., None]) | (rest < 0)
    return most if bool(agree.all()) else None


def _index_put(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
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


GATHERED = {
    "GroupedMmBackward0": _grouped_mm,
    "IndexBackward0": _index,
    "IndexSelectBackward0": _index_select,
    "IndexPutBackward0": _index_put,
    "IndexPutImplBackward0": _index_put,
}
