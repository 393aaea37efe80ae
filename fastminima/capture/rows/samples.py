"""What a sample is: an index of the batch dimension, or a segment of packed rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .decode import Measurement
from .layout import IrregularLayout, RowLayout

__all__ = ["Batch", "Samples", "SegmentLayout", "Segments"]


@dataclass(frozen=True)
class Batch:
    """Samples are the indices of dimension `dim` of the tensors that hold a batch."""

    count: int
    dim: int = 0

    @property
    def sizes(self) -> int:
        """What layouts scale with."""
        return self.count

    @property
    def dims(self) -> frozenset[int]:
        """The dims that say which sample it is."""
        return frozenset([self.dim])

    @property
    def described(self) -> str:
        """For messages."""
        return f"batch axis of size {self.count} (dimension {self.dim})"

    def is_in(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape may hold the batch."""
        return len(shape) > self.dim and shape[self.dim] == self.count

    def column(self, weights: Tensor, shape: Sequence[int]) -> Tensor:
        """The samples' weights as a factor for a tensor that holds the batch."""
        sizes = [1] * len(shape)
        sizes[self.dim] = self.count
        return weights.view(sizes)

    def layouts(self, measurement: Measurement) -> list[RowLayout]:
        """The layouts that fit what was measured; the irregular one if no other."""
        return measurement.layouts(self.count)

    def are_shown(self, measurement: Measurement) -> bool:
        """Whether enough samples were seen for what fits to fit again."""
        return measurement.shows_all(self.count)


_WASTE = 4  # rows with padding over rows without, beyond which segments are grouped
_AXES = ("rows", "time", "repeats")


def _orders(*, several_rows: bool, repeats: bool) -> list[tuple[str, str, str]]:
    """The orders that can be told apart."""
    orders = [("rows", "time", "repeats")]
    if several_rows:
        orders.append(("time", "rows", "repeats"))
    if repeats:
        orders.append(("rows", "repeats", "time"))
    return orders


@dataclass(frozen=True)
class SegmentLayout:
    """Rows are the tokens of packed rows, in one of the orders that models use.

    ids [[0, 0, 1], [2, 2, -1]] and a tensor [6, d] in the order rows, time: its rows
    are those of samples 0, 0, 1, 2, 2 and of none. Targets shifted by one drop the last
    token of each row: [4, d], samples 0, 0, 2, 2.

    Args:
        order: what the rows of the tensor run over, slowest first; "repeats" are
            several rows for each token, as where each head has its own.
        repeats: how many.
        start, drop: tokens left out at the start and at the end of each packed row.
    """

    order: tuple[str, str, str]
    repeats: int
    start: int = 0
    drop: int = 0

    def labels(self, ids: Tensor, leading: Sequence[int]) -> Tensor | None:
        """The segment of each row of a tensor `[*leading, features]`, if it can be."""
        kept = ids[:, self.start : ids.shape[1] - self.drop]
        if kept.numel() * self.repeats != math.prod(leading):
            return None
        cube = kept.unsqueeze(2).expand(-1, -1, self.repeats)
        axes = [_AXES.index(name) for name in self.order]
        return cube.permute(axes).reshape(tuple(leading))

    def transfer(
        self, old: Sequence[int], new: Sequence[int], sizes: Sequence[int]
    ) -> SegmentLayout | None:
        """This layout on a tensor of another shape, where it fits."""
        tokens = sizes[0] * (sizes[1] - self.start - self.drop)
        fits = len(old) == len(new) and tokens * self.repeats == math.prod(new[:-1])
        return self if fits else None


@dataclass(frozen=True, eq=False)
class Segments:
    """Samples are segments: `ids[row, t]` is the sample of a token, -1 nobody's."""

    ids: Tensor  # [rows, time], int64, on the CPU
    count: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """What layouts scale with."""
        return tuple(self.ids.shape)

    @property
    def is_shared(self) -> bool:
        """Whether several segments share a row, so that attention may mix them."""
        highest = self.ids.amax(1)
        other = (self.ids >= 0) & (self.ids != highest[:, None])
        return bool(other.any())

    @property
    def dims(self) -> frozenset[int]:
        """The dims that say which sample it is."""
        return frozenset([0, 1])

    @property
    def described(self) -> str:
        """For messages."""
        return f"tensor whose first dims are those of segment_ids {self.sizes}"

    def is_in(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of that shape may hold the packed rows."""
        return tuple(shape[:2]) == self.sizes

    def column(self, weights: Tensor, shape: Sequence[int]) -> Tensor:
        """The samples' weights as a factor for a tensor that holds the packed rows."""
        # Tokens of no sample (-1) take the last of these, which is no sample's weight:
        # what they touch is then seen to be mixed. (In a plain pass all weigh one.)
        padded = torch.cat([weights, weights[:1].square()])
        of_tokens = padded[self.ids.to(weights.device)]
        return of_tokens.reshape(*self.sizes, *[1] * (len(shape) - 2))

    def layouts(self, measurement: Measurement) -> list[RowLayout | SegmentLayout]:
        """The layouts that fit what was measured; the irregular one if no other."""
        labels = measurement.leading
        if labels is None:
            return []
        found: list[RowLayout | SegmentLayout] = []
        for candidate in self._candidates(labels.shape):
            rows = candidate.labels(self.ids, labels.shape)
            if rows is None:
                continue
            if measurement.agrees(rows.numpy()):
                found.append(candidate)
        if found and labels.size == self.count:  # or rows of whole documents, in order?
            numbers = np.arange(self.count).reshape(labels.shape)
            if measurement.agrees(numbers):
                found.append(IrregularLayout(torch.from_numpy(numbers), self.count))
        return found or [
            IrregularLayout(torch.from_numpy(np.ascontiguousarray(labels)), self.count)
        ]

    def are_shown(self, measurement: Measurement) -> bool:
        """Whether enough samples were seen for what fits to fit again.

        Few orders are possible at all, and documents of two tokens leave no gradient in
        attention's queries and keys: half of the segments will do.
        """
        return 2 * measurement.seen >= self.count

    def _candidates(self, leading: Sequence[int]) -> list[SegmentLayout]:
        rows, time = self.ids.shape
        number = math.prod(leading)
        found = []
        for start, drop in ((0, 0), (0, 1), (1, 0)):
            tokens = rows * (time - start - drop)
            if tokens and number % tokens == 0:
                repeats = number // tokens
                found += [
                    SegmentLayout(order, repeats, start, drop)
                    for order in _orders(several_rows=rows > 1, repeats=repeats > 1)
                ]
        return found

    def groups(self, chosen: Tensor | None) -> list[Tensor] | None:
        """Places, among the segments looked at, of those of about one length.

        None where padding all to the longest one is no great waste.
        """
        lengths = torch.bincount(self.ids[self.ids >= 0], minlength=self.count)
        lengths = lengths if chosen is None else lengths[chosen]
        if len(lengths) * int(lengths.max()) <= _WASTE * int(lengths.sum()):
            return None
        size = (lengths.clamp(min=1).log2() / math.log2(_WASTE)).ceil()
        return [(size == s).nonzero().flatten() for s in size.unique()]

    def resolve(
        self, layout: RowLayout | SegmentLayout, shape: Sequence[int]
    ) -> RowLayout:
        """The samples of the rows in this step."""
        if not isinstance(layout, SegmentLayout):
            return layout
        labels = layout.labels(self.ids, shape[:-1])
        assert labels is not None  # shapes are part of what a layout is kept under
        return IrregularLayout(labels, self.count)


# What a sample is. Both say how many there are, in which dims they show, and which
# layouts fit what was measured; `sizes` is what their layouts scale with.
Samples = Batch | Segments
