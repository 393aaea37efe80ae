"""Operands that an elementwise node spreads over the samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import mul

import torch
from torch import Size, Tensor

from ..._dtypes import accumulation_dtype
from ...ops import broadcast
from ...ops._pieces import in_pieces, pieces
from ..contributions import (
    Contribution,
    Materialized,
)
from ..graph.node import Node
from ..reading.plan import Slot
from ..rows.layout import IrregularLayout, RegularLayout, RowLayout
from .base import Contributions

__all__ = [
    "add",
    "div",
    "lerp",
    "multiply",
    "prelu",
    "repeat",
    "sub",
    "where",
]

Term = Callable[..., Tensor]  # of pieces of the output gradient and of other tensors


def add(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`x + alpha * y`: each operand's gradient is the output's, summed."""
    found: Contributions = {}
    for slot in slots:
        if slot.number == 0 or node._saved_alpha == 1:
            found |= _spread(layout, slot, None, g)
    return found


def multiply(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`x * y`: the output's gradient times the other operand, summed."""
    if len(slots) > 1:
        return {}
    other = node._saved_other if slots[0].number == 0 else node._saved_self
    return _spread(layout, slots[0], mul, g, other)


def where(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """Parameters chosen at some places, such as a bias under a mask."""
    found: Contributions = {}
    for slot in slots:
        is_chosen = node._saved_condition
        if slot.number == 1:
            is_chosen = ~is_chosen
        found |= _spread(layout, slot, _chosen, g, is_chosen)
    return found


def _chosen(g: Tensor, is_chosen: Tensor) -> Tensor:
    return g.where(is_chosen, 0)


def sub(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`x - alpha * y`."""
    found: Contributions = {}
    factor = -node._saved_alpha
    for slot in slots:
        term = None if slot.number == 0 else lambda g: factor * g
        found |= _spread(layout, slot, term, g)
    return found


def div(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`x / y`."""
    if len(slots) > 1:
        return {}
    other = node._saved_other
    if slots[0].number == 0:
        return _spread(layout, slots[0], lambda g, y: g / y, g, other)
    terms = g, node._saved_self, other
    return _spread(layout, slots[0], lambda g, x, y: -g * x / y.square(), *terms)


def lerp(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`start + weight * (end - start)` with a number as weight."""
    found: Contributions = {}
    for slot in slots:
        factor = node._saved_weight if slot.number == 1 else 1 - node._saved_weight
        found |= _spread(layout, slot, partial(mul, factor), g)
    return found


def prelu(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`max(x, 0) + weight * min(x, 0)`."""
    if len(slots) > 1 or slots[0].number != 1:
        return {}
    return _spread(
        layout, slots[0], lambda g, x: g * x.clamp(max=0), g, node._saved_self
    )


def _spread(
    layout: RowLayout, slot: Slot, term: Term | None, *tensors: Tensor
) -> Contributions:
    part = _spread_gradient(layout, slot, term, *tensors)
    return {} if part is None else {slot.number: part}


def repeat(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """Expand and repeat over the batch alone: the output gradient is the answer."""
    if not isinstance(layout, RegularLayout):
        return {}
    slot = slots[0]
    missing = g.dim() - len(slot.shape)
    shape = (1,) * missing + slot.shape
    if layout.outer > 1 and shape[layout.dim] != 1:
        return {}  # repeats interleave the samples, each a row of the parameter
    samples = layout.isolate(g)
    dims = [
        i + 1
        for i, (size, full) in enumerate(zip(shape, samples.shape[1:], strict=True))
        if size == 1 and full != 1
    ]
    if dims:
        samples = samples.sum(dims, keepdim=True)
    if tuple(samples.shape[1:]) != shape:
        return {}
    return {0: Materialized(samples.reshape(len(samples), *slot.shape))}


def _spread_gradient(
    layout: RowLayout, slot: Slot, term: Term | None, g: Tensor, *others: Tensor
) -> Contribution | None:
    """Gradient of a broadcast operand: the sum of a term over all it was spread.

    The term is computed elementwise from `g`, in the accumulation dtype, and from the
    other tensors, on some samples at a time; without one it is `g` itself.
    """
    missing = g.dim() - len(slot.shape)
    shape = (1,) * missing + slot.shape
    if isinstance(layout, IrregularLayout):
        if g.dim() < 2:
            return None
        samples = _scattered(layout, shape, term, g, *others)
    elif shape[layout.dim] != 1 and layout.batch > 1:
        return None  # the parameter itself has a row for each sample
    else:
        others = tuple(other.expand(g.shape) for other in others)
        samples = _summed_like(layout, shape, term, g, *others)
    return Materialized(samples.reshape(layout.count, *slot.shape))


def _scattered(
    layout: IrregularLayout,
    shape: tuple[int, ...],
    term: Term | None,
    g: Tensor,
    *others: Tensor,
) -> Tensor:
    """For rows in any order: each is added to its sample, at its place."""
    places = math.prod(shape[:-1])
    dtype = accumulation_dtype(g.dtype)
    samples = g.new_zeros(layout.count * places, shape[-1], dtype=dtype)
    place = torch.arange(places, dtype=torch.int64, device="cpu").reshape(shape[:-1])
    row = (layout.labels * places + place.expand(g.shape[:-1])).flatten()
    is_read = (layout.labels >= 0).flatten()
    tensors = tuple(t.expand(g.shape).reshape(-1, g.shape[-1]) for t in (g, *others))
    for some in pieces(len(row), _bytes(dtype, g.shape[-1], *others), 4):
        read = is_read[some].to(g.device)
        first, *rest = (t[some][read] for t in tensors)
        rows = first.to(dtype) if term is None else term(first.to(dtype), *rest)
        if shape[-1] != g.shape[-1]:
            rows = rows.sum(-1, keepdim=True)
        samples.index_add_(0, row[some][is_read[some]].to(g.device), rows)
        del first, rest, rows
    return samples


def _summed_like(
    layout: RegularLayout,
    shape: tuple[int, ...],
    term: Term | None,
    g: Tensor,
    *others: Tensor,
) -> Tensor:
    """Sum of the term over the dims where `shape` is 1: `[batch, *shape]` or flat."""
    is_last = all(size == 1 for size in shape[:-1]) and shape[-1] == g.shape[-1]
    if is_last and layout.dim < g.dim() - 1 and term in (None, mul):
        rows = [layout.rows(t, 1) for t in (g, *others)]
        sums = broadcast.sum_over_time if term is None else broadcast.product_over_time
        return sums(*rows)
    is_channel = len(shape) > 2 and shape[1] == g.shape[1] and set(shape[2:]) == {1}
    is_plain = layout.dim == 0 and layout.outer * layout.inner == 1
    if term is None and is_channel and is_plain:
        return broadcast.sum_over_space(layout.pick(g).flatten(2))
    dims = [i + 1 for i, size in enumerate(shape) if size == 1]
    dtype = accumulation_dtype(g.dtype)
    if term is None and not dims:
        return layout.isolate(g)  # converted when it is read

    def summed(grads: Tensor, *factors: Tensor) -> tuple[Tensor]:
        grads = grads.to(dtype)
        terms = grads if term is None else term(grads, *factors)
        return (terms.sum(dims, keepdim=True) if dims else terms,)

    tensors = [layout.isolate(t) for t in (g, *others)]
    each = _bytes(dtype, Size(tensors[0].shape[1:]).numel(), *others)
    return in_pieces(
        lambda some: summed(*(t[some] for t in tensors)), layout.count, each, 4
    )[0]


def _bytes(dtype: torch.dtype, elements: int, *others: Tensor) -> int:
    """What a term of so many elements takes, with what it is made of."""
    return elements * (4 * dtype.itemsize + sum(t.itemsize for t in others))
