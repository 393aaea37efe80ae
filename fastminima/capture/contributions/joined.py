"""Several uses of one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...ops import embedding
from .base import Contribution, Fused, sq_norms_of, summed
from .dense import Dense, Products
from .embedding import Embedding
from .moved import Placed

__all__ = ["Apart", "Joined", "joined"]


class Joined(Contribution):
    """Several uses of one parameter: their sample gradients add up."""

    def __init__(self, parts: Sequence[Contribution]) -> None:
        self.parts = parts
        self.batch = parts[0].batch
        self.shape = parts[0].shape

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return summed(part.per_sample(lo, hi) for part in self.parts)

    def total(self) -> Tensor:
        return summed(part.total() for part in self.parts)

    def fused(self, *, with_second_moment: bool) -> Fused:
        """All from the same sample gradients, which are made once."""
        total = moment = None
        norms = []
        for samples in self.chunks():
            part = samples.sum(0)
            total = part if total is None else total.add_(part)
            norms.append(sq_norms_of(samples))
            if with_second_moment:
                part = samples.square_().sum(0)
                moment = part if moment is None else moment.add_(part)
            del samples
        assert total is not None  # a batch has a sample
        return Fused(total, torch.cat(norms), moment)

    def dots(self, direction: Tensor) -> Tensor:
        return summed(part.dots(direction) for part in self.parts)

    def several_dots(self, directions: Sequence[Tensor]) -> Sequence[Tensor]:
        found = [part.several_dots(directions) for part in self.parts]
        return [summed(iter(dots)) for dots in zip(*found, strict=True)]


class Apart(Joined):
    """Uses of different rows of one parameter, such as one expert each."""

    def sq_norms(self) -> Tensor:
        return summed(part.sq_norms() for part in self.parts)

    def second_moment(self) -> Tensor:
        return summed(part.second_moment() for part in self.parts)

    def fused(self, *, with_second_moment: bool) -> Fused:
        total, norms, moment = self.parts[0].fused(
            with_second_moment=with_second_moment
        )
        for part in self.parts[1:]:
            more = part.fused(with_second_moment=with_second_moment)
            total, norms = total.add_(more.total), norms + more.sq_norms
            if moment is not None and more.second_moment is not None:
                moment = moment.add_(more.second_moment)
        return Fused(total, norms, moment)

    def gram(self) -> Tensor:
        return summed(part.gram() for part in self.parts)


class _TiedHead(Joined):
    """A table used as embedding and as output head."""

    def __init__(self, table: Embedding, head: Dense) -> None:
        super().__init__([table, head])
        self.table, self.head = table, head

    def sq_norms(self) -> Tensor:
        return self._with_table(self.head.sq_norms())

    def second_moment(self) -> Tensor:
        return self._moment_with_table(self.head.second_moment())

    def fused(self, *, with_second_moment: bool) -> Fused:
        """One product for the head; of it the table changes the rows it looks up."""
        head = self.head.fused(with_second_moment=with_second_moment)
        norms, moment = self._with_table(head.sq_norms), head.second_moment
        if moment is not None:
            moment = self._moment_with_table(moment)
        return Fused(self.table.add_to(head.total), norms, moment)

    def _with_table(self, head: Tensor) -> Tensor:
        """Norms of the sum, from those of the head: |h|^2 + |e|^2 + 2 <h, e>."""
        table = self.table
        cross = embedding.tied_cross(
            table.ids, table.g, table.padding_idx, self.head.right, self.head.left
        )
        parts = table.sq_norms() + head
        total = parts + 2 * cross
        if not _may_look(total):
            return total.clamp_min(0)
        # Both are accurate to 1e-6 of the parts: below 1e-2 of them add the gradients.
        for n in torch.nonzero(total < 1e-2 * parts).flatten().tolist():
            total[n] = sq_norms_of(self.per_sample(n, n + 1))[0]
        return total

    def _moment_with_table(self, head: Tensor) -> Tensor:
        """Second moments of the sum, from those of the head: other rows are the same.

        Those that are looked up are made anew, since squares nearly cancel in
        h^2 + e^2 + 2 h e.
        """
        table = self.table
        rows = table.ids[table.ids != table.padding_idx].unique()
        if len(rows):
            head[rows] = self._rows(rows).second_moment()
        return head

    def _rows(self, rows: Tensor) -> Joined:
        """The gradients of some rows of the table alone, which are in order."""
        table, head = self.table, self.head
        ids = torch.searchsorted(rows, table.ids.contiguous())
        ids = ids.masked_fill(table.ids == table.padding_idx, -1)
        products = Products(head.right, head.left.index_select(2, rows))
        return Joined(
            [
                Embedding(ids, table.g, -1, len(rows)),
                Dense(products, out_first=True),
            ]
        )


def _may_look(x: Tensor) -> bool:
    """Whether the host may wait for values, as it may not in a CUDA graph's capture."""
    if not (x.is_cuda or x.is_meta):  # meta stands for a GPU's, as in tests
        return True
    return not torch.cuda.is_current_stream_capturing()


def joined(parts: Sequence[Contribution]) -> Contribution:
    """The sum of the contributions of all uses of one parameter, in its best form."""
    if _are_apart(parts):
        return Apart(parts)
    tables = [part for part in parts if isinstance(part, Embedding)]
    matrices = [part for part in parts if isinstance(part, Dense)]
    others = [p for p in parts if not isinstance(p, Embedding | Dense)]
    merged = [*others]
    if matrices:
        merged.append(_concatenated(matrices))
    if tables:
        merged += _concatenated_tables(tables)
    if len(merged) == 1:
        return merged[0]
    if len(merged) == 2 and not others and len(matrices) > 0:
        head, table = merged
        if isinstance(head, Dense) and isinstance(table, Embedding):
            return _TiedHead(table, head)
    return Joined(merged)


def _are_apart(parts: Sequence[Contribution]) -> bool:
    """Whether no element of the parameter is in two of its uses, for sure."""
    spans = [part.span if isinstance(part, Placed) else None for part in parts]
    known = sorted(span for span in spans if span is not None)
    if len(known) < len(spans):
        return False
    return all(a[1] <= b[0] for a, b in pairwise(known))


def _concatenated(parts: list[Dense]) -> Dense:
    if len(parts) == 1:
        return parts[0]
    left = torch.cat([part.left for part in parts], 1)
    right = torch.cat([part.right for part in parts], 1)
    return Dense(Products(right, left), out_first=True)


def _concatenated_tables(parts: list[Embedding]) -> list[Embedding]:
    if len({part.padding_idx for part in parts}) > 1:
        return parts
    ids = torch.cat([part.ids for part in parts], 1)
    g = torch.cat([part.g for part in parts], 1)
    return [Embedding(ids, g, parts[0].padding_idx, parts[0].shape[0])]
