"""Rows in no regular order, gathered for some samples at a time.

They are padded to the longest sample, which can be much more than there is of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...ops._pieces import pieces
from ..contributions import Contribution, in_pieces
from ..rows.layout import IrregularLayout, RegularLayout, RowLayout

__all__ = ["from_rows", "in_row_pieces", "some_of"]


def some_of(layout: RowLayout, lo: int, hi: int) -> RowLayout:
    """The layout that reads samples lo ... hi - 1, of those that are read, alone."""
    if (lo, hi) == (0, layout.count):
        return layout
    if isinstance(layout, RegularLayout) and layout.chosen is not None:
        return layout.choose(layout.chosen[lo:hi])
    return layout.choose(torch.arange(lo, hi, dtype=torch.int64, device="cpu"))


def _bytes_each(layout: RowLayout, features: int, size: int) -> int:
    """What gathering one sample's rows of so many features takes; none for views."""
    if not isinstance(layout, IrregularLayout):
        return 0
    return layout.longest * features * size


def from_rows(
    layout: RowLayout,
    make: Callable[[RowLayout], Contribution],
    *tensors: Tensor,
    shared_by: int = 1,
) -> Contribution:
    """What `make` gives for a layout; where gathering is too much, in pieces.

    Args:
        layout: of the rows of all samples.
        make: the contribution of the samples that a layout reads.
        tensors: whose rows, all but the last dim, it gathers.
        shared_by: how many such contributions are alive together.
    """
    return in_pieces(
        layout.count,
        lambda lo, hi: make(some_of(layout, lo, hi)),
        sum(_bytes_each(layout, t.shape[-1], t.itemsize) for t in tensors),
        shared_by=shared_by,
    )


def in_row_pieces(
    layout: RowLayout, make: Callable[[RowLayout], tuple[Tensor, ...]], *tensors: Tensor
) -> tuple[Tensor, ...]:
    """As `from_rows`, for tensors with a row for each sample."""
    each = sum(_bytes_each(layout, t.shape[-1], t.itemsize) for t in tensors)
    parts = [make(part) for part in _parts(layout, each)]
    if len(parts) == 1:
        return parts[0]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def _parts(layout: RowLayout, bytes_each: int) -> Iterator[RowLayout]:
    for some in pieces(layout.count, bytes_each, 4):
        yield some_of(layout, some.start, some.stop)
