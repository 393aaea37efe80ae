"""Rules for layers of their own kind: PReLU, Bilinear, EmbeddingBag, differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from .contributions import Contribution, Dense, Embedding, reshaped
from .layout import IrregularLayout, RegularLayout, RowLayout
from .plan import Slot
from .spread import spread_gradient
from .tape import signed

__all__ = ["LAYERS"]

Contributions = dict[int, Contribution]

_SUM, _MEAN, _MAX = range(3)  # modes of an embedding bag


def _prelu(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    if len(slots) > 1 or slots[0].number != 1:
        return {}
    return _spread(g, node._saved_self.clamp(max=0), layout, slots[0])


def _sub(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    found: Contributions = {}
    for slot in slots:
        signed_g = g if slot.number == 0 else -node._saved_alpha * g
        found |= _spread(signed_g, None, layout, slot)
    return found


def _div(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    if len(slots) > 1:
        return {}
    other = node._saved_other
    if slots[0].number == 0:
        return _spread(g, other.reciprocal(), layout, slots[0])
    return _spread(g, -node._saved_self / other.square(), layout, slots[0])


def _spread(
    g: Tensor, factor: Tensor | None, layout: RowLayout, slot: Slot
) -> Contributions:
    part = spread_gradient(g, factor, layout, slot)
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
    left, right, g = (layout.rows(t, 1).to(dtype) for t in tensors)
    products = (left.unsqueeze(3) * right.unsqueeze(2)).flatten(2)
    dense = Dense(products, g, out_first=True)
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
    rows = g[bag].to(accumulation_dtype(g.dtype))
    if node._saved_mode == _MEAN:
        rows = rows / sizes[bag].unsqueeze(1)
    elif node._saved_per_sample_weights is not None:
        rows = rows * node._saved_per_sample_weights[in_bag].unsqueeze(1)
    bags = layout.listed()
    of_ids = IrregularLayout(bags.labels.to(bag.device)[bag].cpu(), bags.batch)
    ids, rows = of_ids.rows(ids, 0), of_ids.rows(rows, 1)
    padding = signed(node._saved_padding_idx)
    return {0: Embedding(ids, rows, padding, shape[0])}


def _largest(
    node: Any, g: Tensor, layout: RowLayout, shape: tuple[int, ...]
) -> Contribution:
    """Each feature of a bag comes from a row of its own: a table of single numbers."""
    width = shape[1]
    feature = torch.arange(width, dtype=torch.int64, device=g.device)
    ids = node._saved_result3.long() * width + feature
    is_filled = (node._saved_result2 > 0).unsqueeze(1)
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
