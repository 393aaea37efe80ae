"""Rules for layers of their own kind: PReLU, Bilinear, EmbeddingBag, differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor

from ..._dtypes import accumulation_dtype
from ..contributions import Contribution, Dense, Embedding, in_pieces, reshaped
from ..graph.tape import signed
from ..reading.plan import Slot
from ..rows.layout import IrregularLayout, RegularLayout, RowLayout
from .pieces import from_rows, some_of
from .spread import Term, spread_gradient

__all__ = ["LAYERS"]

Contributions = dict[int, Contribution]

_SUM, _MEAN, _MAX = range(3)  # modes of an embedding bag


def _prelu(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    if len(slots) > 1 or slots[0].number != 1:
        return {}
    return _spread(
        layout, slots[0], lambda g, x: g * x.clamp(max=0), g, node._saved_self
    )


def _sub(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    found: Contributions = {}
    factor = -node._saved_alpha
    for slot in slots:
        term = None if slot.number == 0 else lambda g: factor * g
        found |= _spread(layout, slot, term, g)
    return found


def _div(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    if len(slots) > 1:
        return {}
    other = node._saved_other
    if slots[0].number == 0:
        return _spread(layout, slots[0], lambda g, y: g / y, g, other)
    terms = g, node._saved_self, other
    return _spread(layout, slots[0], lambda g, x, y: -g * x / y.square(), *terms)


def _spread(
    layout: RowLayout, slot: Slot, term: Term | None, *tensors: Tensor
) -> Contributions:
    part = spread_gradient(layout, slot, term, *tensors)
    return {} if part is None else {slot.number: part}


# How `F.bilinear` calls the node: x1 [N, 1, d1, 1], weight [1, p, d1, d2],
# x2 [N, 1, 1, d2], summed over the last two dims.
_BILINEAR = ([1, 3], [0], [1, 2], [2, 3])


def _trilinear(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """A bilinear form: a dense layer on the products of both inputs' features."""
    dims = (node._saved_expand1, node._saved_expand2, node._saved_expand3)
    if len(slots) > 1 or slots[0].number != 1:
        return {}
    if tuple(map(list, (*dims, node._saved_sumdim))) != _BILINEAR:
        return {}
    if isinstance(layout, RegularLayout) and layout.dim != 0:
        return {}
    dtype = accumulation_dtype(g.dtype)
    tensors = (node._saved_i1, node._saved_i3, g)

    def some(lo: int, hi: int) -> Dense:
        rows = (some_of(layout, lo, hi).rows(t, 1).to(dtype) for t in tensors)
        left, right, grads = rows
        products = (left.unsqueeze(3) * right.unsqueeze(2)).flatten(2)
        return Dense(products, grads, out_first=True)

    is_regular = isinstance(layout, RegularLayout)
    steps = layout.outer * layout.inner if is_regular else layout.longest
    bytes_each = steps * Size(slots[0].shape[1:]).numel() * dtype.itemsize
    dense = in_pieces(layout.count, some, bytes_each)
    return {1: reshaped(dense, slots[0].shape)}


def _embedding_bag(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
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
    node: Any, g: Tensor, layout: RowLayout, shape: tuple[int, ...]
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


LAYERS = {
    "PreluKernelBackward0": _prelu,
    "SubBackward0": _sub,
    "DivBackward0": _div,
    "TrilinearBackward0": _trilinear,
    "EmbeddingBagBackward0": _embedding_bag,
}
