"""Matrices: products of rows with them, forms of two inputs, and biases beside them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Size, Tensor

from ..._dtypes import accumulation_dtype
from ...ops import broadcast
from ..contributions import (
    Column,
    Contribution,
    Dense,
    DenseBias,
    Materialized,
    Products,
    Stacked,
    in_pieces,
    reshaped,
)
from ..graph.node import Node
from ..graph.nodes import ADDMM, is_scaled
from ..reading.plan import Slot
from ..rows.layout import RegularLayout, RowLayout
from . import elementwise
from .base import Contributions, has_rows, numbers
from .pieces import from_rows, in_row_pieces, some_of

__all__ = ["addmm", "baddbmm", "bmm", "mm", "mv", "trilinear"]


def mm(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`a @ weight`, or `weight @ b` where the samples are columns of b."""
    found: Contributions = {}
    for slot in slots:
        factors = (node._saved_self, None) if slot.number else (None, node._saved_mat2)
        part = _product(*factors, g, layout)
        if part is not None:
            found[slot.number] = part
    return found


def addmm(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`bias + a @ weight`: a linear layer."""
    if is_scaled(node, ADDMM):
        return {}
    found: Contributions = {}
    bias = next((slot for slot in slots if slot.number == 0), None)
    if bias is not None and bias.shape[-1:] != g.shape[1:]:
        bias = None  # one number for all features, or one for each row
    if bias is not None and Size(bias.shape).numel() != g.shape[1]:
        bias = None
    for slot in slots:
        part = None
        if slot.number == 2:
            has_bias = bias is not None
            part = _product(node._saved_mat1, None, g, layout, with_bias=has_bias)
        elif slot.number == 1:
            part = _product(None, node._saved_mat2, g, layout)
        if part is not None:
            found[slot.number] = part
    if bias is not None and has_rows(layout):
        weight = found.get(2)
        if isinstance(weight, Dense):
            found[0] = DenseBias(weight.products, bias.shape)
        else:
            (summed,) = in_row_pieces(layout, partial(_bias_samples, g), g)
            found[0] = Materialized(summed.reshape(len(summed), *bias.shape))
    return found


def mv(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`matrix @ weight` with a vector: a linear layer of one feature."""
    if 1 not in numbers(slots) or not has_rows(layout):
        return {}
    products = Products(layout.rows(node._saved_self, 1), layout.rows(g[:, None], 1))
    return {1: Column(Dense(products, out_first=False))}


def bmm(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`a @ weight` in each product of a batch; `weight @ b`, samples as columns."""
    if 1 in numbers(slots):
        return _stacked(1, node._saved_self, g, layout)
    if not isinstance(layout, RegularLayout) or layout.dim != 2:
        return {}
    rows, grads = node._saved_mat2.transpose(1, 2), g.transpose(1, 2)
    return _stacked(0, rows, grads, layout.along(1), out_first=True)


def baddbmm(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`bias + a @ weight` in each product of a batch, such as an expert's."""
    found: Contributions = {}
    for slot in slots:
        if slot.number == 0 and node._saved_beta == 1:
            found |= elementwise.add(node, g, layout, [slot])
        elif slot.number == 2 and node._saved_alpha == 1:
            found |= _stacked(2, node._saved_batch1, g, layout)
    return found


def _stacked(
    number: int, a: Tensor, g: Tensor, layout: RowLayout, *, out_first: bool = False
) -> Contributions:
    """Only when samples are rows of each product, not products of the batch."""
    if not isinstance(layout, RegularLayout) or layout.dim != 1:
        return {}
    a, g = layout.isolate(a), layout.isolate(g)  # [count, product, time, features]
    pairs = zip(a.unbind(1), g.unbind(1), strict=True)
    return {number: Stacked([Dense(Products(*p), out_first=out_first) for p in pairs])}


# How `F.bilinear` calls the node: x1 [N, 1, d1, 1], weight [1, p, d1, d2],
# x2 [N, 1, 1, d2], summed over the last two dims.
_BILINEAR = ([1, 3], [0], [1, 2], [2, 3])


def trilinear(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
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
        return Dense(Products(products, grads), out_first=True)

    is_regular = isinstance(layout, RegularLayout)
    steps = layout.outer * layout.inner if is_regular else layout.longest
    bytes_each = steps * Size(slots[0].shape[1:]).numel() * dtype.itemsize
    dense = in_pieces(layout.count, some, bytes_each)
    return {1: reshaped(dense, slots[0].shape)}


def _product(
    first: Tensor | None,
    second: Tensor | None,
    g: Tensor,
    layout: RowLayout,
    *,
    with_bias: bool = False,
) -> Contribution | None:
    """The right factor's gradient given the left, or the left's given the right."""
    if first is not None:
        if not has_rows(layout):
            return None
        if isinstance(layout, RegularLayout) and layout.is_one_row:
            one_row = Products(layout.pick(first), layout.pick(g), with_bias=with_bias)
            return Dense(one_row, out_first=False)
        dense = partial(_dense, first, g, with_bias=with_bias)
        return from_rows(layout, dense, first, g)
    columns = _swapped(layout)
    if columns is None or second is None:
        return None
    products = Products(columns.rows(second.t(), 1), columns.rows(g.t(), 1))
    return Dense(products, out_first=True)


def _swapped(layout: RowLayout) -> RowLayout | None:
    """The layout of the transpose of a matrix whose columns belong to samples."""
    if isinstance(layout, RegularLayout) and layout.dim == 1:
        return layout.along(0)
    return None


def _dense(
    a: Tensor, g: Tensor, layout: RowLayout, *, with_bias: bool = False
) -> Dense:
    products = Products(layout.rows(a, 1), layout.rows(g, 1), with_bias=with_bias)
    return Dense(products, out_first=False)


def _bias_samples(g: Tensor, layout: RowLayout) -> tuple[Tensor]:
    return (broadcast.sum_over_time(layout.rows(g, 1)),)
