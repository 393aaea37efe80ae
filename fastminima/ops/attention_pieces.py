"""Pieces of attention's scores that are made at a time, and what makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ._pieces import step_of

__all__ = ["Layout", "Piece", "Scores"]


class Scores(NamedTuple):
    """How scores are made of the products of queries and keys.

    Attributes:
        scale: What the products are multiplied with.
        is_causal: Whether query i sees the keys j <= i alone.
        mask: None; or booleans, True where a key is seen; or numbers that are added.
            Of four dims, each that of the scores or one.
    """

    scale: float
    is_causal: bool = False
    mask: Tensor | None = None


class Piece(NamedTuple):
    """Some rows of the scores of some heads, up to the last column that they see."""

    heads: slice
    rows: slice
    columns: slice

    @property
    def queries(self) -> tuple[slice, slice]:
        """Its place in what has a row for each query."""
        return self.heads, self.rows

    @property
    def keys(self) -> tuple[slice, slice]:
        """Its place in keys and values."""
        return self.heads, self.columns


# Matrices of the size of a piece that are there at a time, in the accumulation dtype.
_COPIES = 8


class Layout:
    """Heads of keys, `[heads, steps, width]`, and the rows that queries have for each.

    Heads of queries that share a head of keys lie one after the other in its rows.
    """

    def __init__(self, q: Tensor, k: Tensor, scores: Scores) -> None:
        self.batch, self.groups, self.steps = k.shape[:3]
        self.shared, self.time = q.shape[1] // max(1, self.groups), q.shape[2]
        self.heads, self.rows = self.batch * self.groups, self.shared * self.time
        self.scores = scores
        self.dtype = accumulation_dtype(q.dtype)

    def __iter__(self) -> Iterator[Piece]:
        for heads in self.some_heads():
            yield from self.pieces(heads)

    def some_heads(self) -> Iterator[slice]:
        """As many heads at a time as have pieces of the limit."""
        step = step_of(self._each * self._rows)
        for head in range(0, self.heads, step):
            yield slice(head, min(head + step, self.heads))

    def pieces(self, heads: slice) -> Iterator[Piece]:
        """The pieces of some heads."""
        for row in range(0, self.rows, self._rows):
            stop = min(row + self._rows, self.rows)
            yield Piece(heads, slice(row, stop), slice(self._seen(stop)))

    @property
    def _each(self) -> int:
        """Bytes that are there of a row of scores."""
        return _COPIES * self.dtype.itemsize * self.steps

    @property
    def _rows(self) -> int:
        """Rows of a piece; if causal, few of them have columns that they do not see."""
        rows = max(1, min(self.rows, step_of(self._each)))
        if self.scores.is_causal and self.shared == 1:
            rows = min(rows, max(64, -(-self.time // 8)))
        return rows

    def _seen(self, stop: int) -> int:
        """How many keys the rows before `stop` see, at the most."""
        if self.scores.is_causal and self.shared == 1:
            return min(stop, self.steps)
        return self.steps

    def folded(self, *tensors: Tensor) -> list[Tensor]:
        """Tensors with a row for each query: heads of keys, and their rows."""
        shape = self.heads, self.rows
        return [x.reshape(*shape, *x.shape[3:]) for x in tensors]

    def merged(self, *tensors: Tensor) -> list[Tensor]:
        """Keys and values, of all heads."""
        return [x.reshape(self.heads, self.steps, -1) for x in tensors]

    def of_queries(self, x: Tensor) -> Tensor:
        """As the queries are."""
        shape = self.batch, self.groups * self.shared, self.time
        return x.view(*shape, *x.shape[2:])

    def of_keys(self, x: Tensor) -> Tensor:
        """As the keys are."""
        return x.view(self.batch, self.groups, self.steps, -1)

    def products(self, piece: Piece, q: Tensor, k: Tensor) -> Tensor:
        """The products scale q k^T of a piece."""
        q, k = q[piece.queries].to(self.dtype), k[piece.keys].to(self.dtype)
        return torch.bmm(q, k.mT).mul_(self.scores.scale)

    def masked(self, piece: Piece, products: Tensor) -> Tensor:
        """The scores, of these products: they are written over."""
        if not self.scores.is_causal and self.scores.mask is None:
            return products
        row = _counted(piece.rows, products)
        t = row % max(1, self.time)
        if self.scores.is_causal:
            j = _counted(piece.columns, products)
            products.masked_fill_(j > t[:, None], -torch.inf)
        if self.scores.mask is None:
            return products
        shape = self.batch, self.groups * self.shared, self.time, self.steps
        n = _counted(piece.heads, products)
        head = (n % self.groups * self.shared)[:, None] + row // max(1, self.time)
        seen = self.scores.mask.expand(shape)[..., piece.columns]
        seen = seen[(n // self.groups)[:, None], head, t]
        if seen.dtype == torch.bool:
            return products.masked_fill_(seen.logical_not_(), -torch.inf)
        return products.add_(seen)

    def probabilities(
        self, piece: Piece, q: Tensor, k: Tensor, stats: Tensor
    ) -> Tensor:
        """Those of a piece, from the statistics of its rows."""
        largest, inverse = stats[:, *piece.queries, None]
        scores = self.masked(piece, self.products(piece, q, k))
        return scores.sub_(largest).exp_().mul_(inverse)

    def tangents(
        self, piece: Piece, q: Tensor, k: Tensor, uq: Tensor, uk: Tensor
    ) -> Tensor:
        """How far the scores of a piece move along (uq, uk): t."""
        return self.products(piece, uq, k).add_(self.products(piece, q, uk))

    def wide(self, *tensors: Tensor) -> list[Tensor]:
        """In the accumulation dtype."""
        return [x.to(self.dtype) for x in tensors]

    def totals(self, *tensors: Tensor) -> list[Tensor]:
        """Zeros for sums over the pieces of rows, shaped as these."""
        return [x.new_zeros(x.shape, dtype=self.dtype) for x in tensors]


def _counted(places: slice, like: Tensor) -> Tensor:
    """The numbers of a slice, where a tensor is."""
    first = places.start or 0
    return torch.arange(first, places.stop, dtype=torch.int64, device=like.device)
