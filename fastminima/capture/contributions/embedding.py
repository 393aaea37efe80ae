"""Gradients of tables."""

from __future__ import annotations

from torch import Tensor

from ..._dtypes import accumulation_dtype
from ...ops import embedding
from ...ops._pieces import itemsize, pieces
from .base import Contribution

__all__ = ["Embedding"]


class Embedding(Contribution):
    """Gradient of a table: each row of `g [batch, time, width]` goes to row `ids`."""

    def __init__(self, ids: Tensor, g: Tensor, padding_idx: int, rows: int) -> None:
        self.ids, self.g, self.padding_idx = ids, g, padding_idx
        self.batch = len(g)
        self.shape = (rows, g.shape[2])

    def per_sample(self, lo: int, hi: int) -> Tensor:
        return embedding.embedding_gradients(
            self.ids[lo:hi], self.g[lo:hi], self.padding_idx, self.shape[0]
        )

    def sq_norms(self) -> Tensor:
        return embedding.embedding_sq_norms(self.ids, self.g, self.padding_idx)

    def second_moment(self) -> Tensor:
        return embedding.embedding_second_moment(
            self.ids, self.g, self.padding_idx, self.shape[0]
        )

    def total(self) -> Tensor:
        dtype = accumulation_dtype(self.g.dtype)
        return self.add_to(self.g.new_zeros(self.shape, dtype=dtype))

    def add_to(self, total: Tensor) -> Tensor:
        """Add the ordinary gradient to a tensor of this shape, row by row."""
        _, time, width = self.g.shape
        size = total.itemsize + itemsize(self.g.dtype, total.dtype)
        for some in pieces(self.batch, time * width * size):
            ids = self.ids[some].long()
            is_left_out = ids == self.padding_idx
            rows = self.g[some].to(total.dtype)
            rows = rows.masked_fill(is_left_out.unsqueeze(2), 0).flatten(0, 1)
            places = ids.masked_fill(is_left_out, 0).flatten()
            # By sorting, where `index_add_` on a GPU adds in any order.
            total.index_put_((places,), rows, accumulate=True)
            del rows
        return total

    def gram(self) -> Tensor:
        return embedding.embedding_gram(self.ids, self.g, self.padding_idx)

    def dots(self, direction: Tensor) -> Tensor:
        return embedding.embedding_dots(self.ids, self.g, self.padding_idx, direction)
