"""Gradients of an operand that an elementwise node spread over the samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..ops import broadcast
from .contributions import Contribution, Materialized
from .layout import IrregularLayout, RegularLayout, RowLayout
from .plan import Slot

__all__ = ["spread_gradient"]


def spread_gradient(
    g: Tensor, factor: Tensor | None, layout: RowLayout, slot: Slot
) -> Contribution | None:
    """Gradient of a broadcast operand: the sum of g * factor over all it was spread."""
    missing = g.dim() - len(slot.shape)
    shape = (1,) * missing + slot.shape
    if isinstance(layout, IrregularLayout):
        return _scattered(g, factor, layout, shape, slot) if g.dim() > 1 else None
    if shape[layout.dim] != 1 and layout.batch > 1:
        return None  # the parameter itself has a row for each sample
    if factor is not None:
        factor = factor.expand(g.shape)
    samples = _summed_like(g, factor, layout, shape)
    return Materialized(samples.reshape(layout.count, *slot.shape))


def _scattered(
    g: Tensor,
    factor: Tensor | None,
    layout: IrregularLayout,
    shape: tuple[int, ...],
    slot: Slot,
) -> Contribution:
    """The same for rows in any order: each is added to its sample, at its place."""
    g = g.to(accumulation_dtype(g.dtype))
    if factor is not None:
        g = g * factor
    if shape[-1] != g.shape[-1]:
        g = g.sum(-1, keepdim=True)
    places = math.prod(shape[:-1])
    place = torch.arange(places, dtype=torch.int64, device=layout.labels.device)
    place = place.reshape(shape[:-1]).expand(g.shape[:-1])
    row = (layout.labels * places + place).flatten()
    is_read = (layout.labels >= 0).flatten()
    samples = g.new_zeros(layout.count * places, shape[-1])
    rows = g.reshape(-1, shape[-1])[is_read.to(g.device)]
    samples.index_add_(0, row[is_read].to(g.device), rows)
    return Materialized(samples.reshape(layout.count, *slot.shape))


def _summed_like(
    g: Tensor, factor: Tensor | None, layout: RegularLayout, shape: tuple[int, ...]
) -> Tensor:
    """Sum of g * factor over the dims where `shape` is 1: `[batch, *shape]` or flat."""
    is_last = all(size == 1 for size in shape[:-1]) and shape[-1] == g.shape[-1]
    if is_last and layout.dim < g.dim() - 1:
        if factor is None:
            return broadcast.sum_over_time(layout.rows(g, 1))
        return broadcast.product_over_time(layout.rows(g, 1), layout.rows(factor, 1))
    is_channel = len(shape) > 2 and shape[1] == g.shape[1] and set(shape[2:]) == {1}
    is_plain = layout.dim == 0 and layout.outer * layout.inner == 1
    if factor is None and is_channel and is_plain:
        return broadcast.sum_over_space(layout.pick(g).flatten(2))
    samples = layout.isolate(g).to(accumulation_dtype(g.dtype))
    if factor is not None:
        samples = samples * layout.isolate(factor)
    dims = [i + 1 for i, size in enumerate(shape) if size == 1]
    return samples.sum(dims, keepdim=True) if dims else samples
