"""Tables: rows looked up one by one, by an index, or in bags."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Size, Tensor

from ..._dtypes import accumulation_dtype
from ..contributions import (
    Contribution,
    Embedding,
    reshaped,
)
from ..graph.node import Node
from ..graph.tape import signed
from ..reading.plan import Slot
from ..rows.layout import IrregularLayout, RegularLayout, RowLayout
from ..rows.routes import index_positions
from .base import Contributions
from .pieces import from_rows

__all__ = ["embedding", "embedding_bag", "index", "index_select"]


def embedding(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`table[ids]`, with the row `padding_idx` left out."""
    if node._saved_scale_grad_by_freq:
        return {}
    if isinstance(layout, RegularLayout) and layout.dim == g.dim() - 1:
        return {}
    ids, padding = node._saved_indices, signed(node._saved_padding_idx)

    def table(some: RowLayout) -> Embedding:
        rows = some.rows(ids, 0), some.rows(g, 1)
        return Embedding(*rows, padding, slots[0].shape[0])

    return {0: from_rows(layout, table, g)}


def index(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """A table indexed along its first dims: as an embedding."""
    indices = list(node._saved_indices)
    if not indices or any(index is None for index in indices):
        return {}
    return _looked_up(index_positions(indices, slots[0].shape), g, layout, slots[0])


def index_select(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`table.index_select(0, ids)`."""
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


_SUM, _MEAN, _MAX = range(3)  # modes of an embedding bag


def embedding_bag(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """A table whose rows are added up, averaged, or compared, in bags."""
    if node._saved_scale_grad_by_freq or 0 not in {slot.number for slot in slots}:
        return {}
    if isinstance(layout, RegularLayout) and layout.dim != 0:
        return {}
    shape = next(slot.shape for slot in slots if slot.number == 0)
    if node._saved_mode == _MAX:
        return {0: _largest(node, g, layout, shape)}
    ids, sizes = node._saved_indices.long(), node._saved_result2
    place = torch.arange(len(ids), dtype=torch.int64, device=ids.device)
    bag = torch.searchsorted(node._saved_offsets.long(), place, right=True) - 1
    in_bag = bag < len(g)  # what is after the last offset is in none
    ids, bag = ids[in_bag], bag[in_bag]
    weights = node._saved_per_sample_weights
    weights = None if weights is None else weights[in_bag]
    if node._saved_mode == _MEAN:
        weights = sizes[bag].to(accumulation_dtype(g.dtype)).reciprocal_()
    number = torch.arange(1, len(ids) + 1, dtype=torch.int64, device=ids.device)
    padding = signed(node._saved_padding_idx)

    def table(some: RowLayout) -> Embedding:
        """Each id takes the gradient of its bag."""
        place = some.rows(number, 0) - 1
        is_gap, place = (place < 0).unsqueeze(2), place.clamp_min(0)
        rows = g[bag[place]].to(accumulation_dtype(g.dtype))
        if weights is not None:
            rows = rows * weights[place].unsqueeze(2)
        return Embedding(ids[place], rows.masked_fill_(is_gap, 0), padding, shape[0])

    bags = layout.listed()
    of_ids = IrregularLayout(bags.labels.to(bag.device)[bag].cpu(), bags.batch)
    return {0: from_rows(of_ids, table, g)}


def _largest(
    node: Node, g: Tensor, layout: RowLayout, shape: tuple[int, ...]
) -> Contribution:
    """Each feature of a bag comes from a row of its own: a table of single numbers."""
    width = shape[1]
    feature = torch.arange(width, dtype=torch.int64, device=g.device)
    ids = node._saved_result3[: len(g)].long() * width + feature
    # Backends count the last offset as one more bag, or do not.
    is_filled = (node._saved_result2[: len(ids)] > 0).unsqueeze(1)
    ids, rows = (layout.rows(t * is_filled, 1).flatten(1) for t in (ids, g))
    table = Embedding(ids, rows.unsqueeze(2), -1, shape[0] * width)
    return reshaped(table, shape)
