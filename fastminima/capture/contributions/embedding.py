"""Gradients of tables."""

from __future__ import annotations

from torch import Tensor

from ...ops import embedding
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

    def gram(self) -> Tensor:
        return embedding.embedding_gram(self.ids, self.g, self.padding_idx)

    def dots(self, direction: Tensor) -> Tensor:
        return embedding.embedding_dots(self.ids, self.g, self.padding_idx, direction)
