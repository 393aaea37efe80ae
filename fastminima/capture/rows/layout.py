"""Which rows of a tensor belong to which sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

__all__ = ["IrregularLayout", "RegularLayout", "RowLayout", "fit_layouts"]


@dataclass(frozen=True)
class RegularLayout:
    """Dimension `dim` runs over (outer, batch, inner) and the middle is the sample.

        tensor          outer, batch, inner   sample of row r along `dim`
        [B, d]          1, B, 1               r
        [B * T, d]      1, B, T               r // T        as in a transformer
        [T * B, d]      T, B, 1               r % B         time first, as in an RNN
        [H * B * T, d]  H, B, T               r // T % B    heads first

    Where `chosen` is given, only those samples are read, in that order.
    """

    dim: int
    outer: int
    batch: int
    inner: int
    chosen: Tensor | None = field(default=None, compare=False)  # int64

    @property
    def count(self) -> int:
        """Number of samples that are read."""
        return self.batch if self.chosen is None else len(self.chosen)

    @property
    def is_one_row(self) -> bool:
        """Whether the dimension is the batch itself."""
        return self.outer == 1 and self.inner == 1

    @property
    def labels(self) -> Tensor:
        """The sample of each position along `dim`, read or not."""
        rows = self.outer * self.batch * self.inner
        place = torch.arange(rows, dtype=torch.int64, device="cpu")
        return place // self.inner % self.batch

    def stride(self, shape: Sequence[int]) -> int:
        """Elements from a row of one sample to one of the next, in row-major order.

        The same for every shape that the tensor is viewed in.
        """
        return self.inner * math.prod(shape[self.dim + 1 :])

    def listed(self) -> IrregularLayout:
        """The layout of the positions along `dim`, as a list of labels."""
        listed = IrregularLayout(self.labels, self.batch)
        return listed if self.chosen is None else listed.choose(self.chosen)

    def choose(self, samples: Tensor) -> RegularLayout:
        """This layout, reading some samples only."""
        return replace(self, chosen=samples)

    def along(self, dim: int) -> RegularLayout:
        """This layout along another dimension, as in a transposed tensor."""
        return replace(self, dim=dim)

    def pick(self, t: Tensor) -> Tensor:
        """The samples that are read, of a tensor whose first dim is the batch."""
        if self.chosen is None:
            return t
        return t.index_select(0, self.chosen.to(t.device))

    def isolate(self, t: Tensor) -> Tensor:
        """`[count, *shape of one sample]`, a view where strides allow it.

        The sample's own extent of `dim`, outer * inner, stays in its place.
        """
        if self.outer == 1 and self.inner == 1:
            return self.pick(t.movedim(self.dim, 0)).unsqueeze(self.dim + 1)
        parts = (self.outer, self.batch, self.inner)
        split = t.unflatten(self.dim, parts).movedim(self.dim + 1, 0)
        return self.pick(split.flatten(self.dim + 1, self.dim + 2))

    def rows(self, t: Tensor, trailing: int) -> Tensor:
        """`[count, time, *last trailing dims]`; all other dims are time."""
        if self.outer == 1 and self.dim == 0 and t.dim() == trailing + 1:
            return self.pick(t.unflatten(0, (self.batch, self.inner)))
        samples = self.isolate(t)
        return samples.flatten(1, samples.dim() - trailing - 1)

    def keep_only(self, t: Tensor, n: int) -> Tensor:
        """A copy of `t` with the rows of all but the n-th sample read set to zero."""
        n = n if self.chosen is None else int(self.chosen[n])
        kept = torch.zeros_like(t, memory_format=torch.contiguous_format)
        self._one(kept, n).copy_(self._one(t, n))
        return kept

    def _one(self, t: Tensor, n: int) -> Tensor:
        """Sample n's rows, always a view."""
        parts = (self.outer, self.batch, self.inner)
        return t.unflatten(self.dim, parts).select(self.dim + 1, n)

    def transfer(
        self, old: tuple[int, ...], new: tuple[int, ...], batch: int
    ) -> RegularLayout | None:
        """What this layout is on a tensor of another shape, if only one can be meant.

        [4 * 6, d] with B = 4, T = 6 -> [3 * 6, d] with B = 3: (1, 3, 6).
        """
        if len(old) != len(new) or new[self.dim] % batch:
            return None
        rest = new[self.dim] // batch
        if self.outer > 1 and self.inner > 1:
            same = rest == self.outer * self.inner
            return (
                RegularLayout(self.dim, self.outer, batch, self.inner) if same else None
            )
        if self.outer > 1:
            return RegularLayout(self.dim, rest, batch, 1)
        if self.inner > 1 or rest == 1:
            return RegularLayout(self.dim, 1, batch, rest)
        return None  # there was one row a sample, and now there are several


@dataclass(frozen=True, eq=False)
class IrregularLayout:
    """Rows in any order: `labels[i]` is the sample of row i, -1 for nobody's."""

    labels: Tensor  # [*leading], int64, on the CPU
    batch: int

    @property
    def count(self) -> int:
        """Number of samples that are read."""
        return self.batch

    def listed(self) -> IrregularLayout:
        """The layout itself: it is a list of labels."""
        return self

    def choose(self, samples: Tensor) -> IrregularLayout:
        """This layout, reading some samples only."""
        # The last place is nobody's.
        place = torch.full((self.batch + 1,), -1, dtype=torch.int64, device="cpu")
        place[samples.cpu()] = self._numbers(len(samples))
        return IrregularLayout(place[self.labels], len(samples))

    @property
    def longest(self) -> int:
        """Rows that every sample is padded to."""
        return self._padded[0].shape[1]

    @staticmethod
    def _numbers(count: int) -> Tensor:
        """0 ... count - 1, where labels are."""
        return torch.arange(count, dtype=torch.int64, device="cpu")

    @cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        """Row numbers `[batch, longest]` and where they are real."""
        flat = self.labels.flatten()
        order = torch.argsort(flat, stable=True)
        order = order[flat[order] >= 0]
        counts = torch.bincount(flat[order], minlength=self.batch)
        longest = max(int(counts.max()), 1) if len(flat) else 1
        place = self._numbers(len(order)) - (counts.cumsum(0) - counts)[flat[order]]
        index = torch.zeros(self.batch, longest, dtype=torch.int64, device="cpu")
        index[flat[order], place] = order
        return index, self._numbers(longest) < counts[:, None]

    def rows(self, t: Tensor, trailing: int) -> Tensor:
        """`[batch, time, *last trailing dims]`, short samples padded with zeros."""
        index, real = (x.to(t.device) for x in self._padded)
        flat = t.flatten(0, t.dim() - trailing - 1)
        if len(flat) == 0:  # an expert without tokens
            return flat.new_zeros(self.batch, 1, *flat.shape[1:])
        padding = ~real.reshape((*real.shape, *[1] * trailing))
        return flat[index].masked_fill_(padding, 0)  # also where row 0 is not finite

    def keep_only(self, t: Tensor, n: int) -> Tensor:
        """A copy of `t` with the rows of every sample but n set to zero."""
        others = (self.labels != n).to(t.device)
        return t.masked_fill(
            others.reshape((*others.shape, *[1] * (t.dim() - others.dim()))), 0
        )


RowLayout = RegularLayout | IrregularLayout


def fit_layouts(
    labels: np.ndarray,
    batch: int,
    dim: int | None = None,
    weights: tuple[np.ndarray, float] | None = None,
) -> list[RegularLayout]:
    """Every regular layout that agrees with the labels seen (-1: not seen).

    Where `dim` is given, `labels` are those of the places along that dim alone. Where
    `weights` are, some labels may be wrong, which together weigh no more than a number.
    """
    if dim is not None:
        return _fits_along(labels, batch, dim, None)
    found = []
    for axis, size in enumerate(labels.shape):
        if size and size % batch == 0:
            moved = np.moveaxis(labels, axis, -1)
            weight = weights and (np.moveaxis(weights[0], axis, -1), weights[1])
            found += _fits_along(moved, batch, axis, weight)
    return found


def _fits_along(
    last: np.ndarray,
    batch: int,
    dim: int,
    weights: tuple[np.ndarray, float] | None,
) -> list[RegularLayout]:
    """Layouts along one dim, which is the last one of `last`."""
    size = last.shape[-1]
    if size == 0 or size % batch:
        return []
    lowest, highest = _extremes(last) if weights is None else (last, last)
    found = []
    rest = size // batch
    for inner in range(1, rest + 1):
        if rest % inner:
            continue
        expected = np.arange(size) // inner % batch
        if weights is None:
            # -1 is below every label: what was seen is all the same where these agree.
            agrees = (highest == expected) & (lowest == expected)
            is_fit = bool(((highest < 0) | agrees).all())
        else:
            is_other = (last != expected) & (last >= 0)
            is_fit = float((weights[0] * is_other).sum()) <= weights[1]
        if is_fit:
            found.append(RegularLayout(dim, rest // inner, batch, inner))
    return found


def _extremes(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest label seen at each place of the last dim."""
    flat = labels.reshape(-1, labels.shape[-1])
    most = np.iinfo(flat.dtype).max
    highest = flat.max(0, initial=-1)  # of no rows at all too
    lowest = np.where(flat < 0, most, flat).min(0, initial=most)
    return lowest, highest
