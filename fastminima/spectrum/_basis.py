"""The vectors of a Lanczos run, of which all but the last two may be kept rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ..ops.vector import linear_combinations, project_out

__all__ = ["Basis"]

_PIECE = 1 << 18  # elements of each vector that are made float at a time


class Basis:
    """Orthonormal vectors, the first ones in `dtype`.

    The recurrence needs the last two, which stay as they are. The others are read to
    project them out, where a vector's own rounding hardly matters, and to combine them:
    what comes out is then off by as much as they are, 1e-3 of its length in bfloat16.

    Attributes:
        dtype: What vectors are kept in; None for as they are.
    """

    def __init__(
        self, first: Float[Tensor, " params"], dtype: torch.dtype | None = None
    ) -> None:
        self._vectors = [first]
        self.dtype = None if dtype == first.dtype else dtype

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, place: int) -> Tensor:
        return self._vectors[place]

    def append(self, vector: Float[Tensor, " params"]) -> None:
        """One more; the third from the end is rounded."""
        self._vectors.append(vector)
        if self.dtype is not None and len(self) > 2:
            self._vectors[-3] = self._vectors[-3].to(self.dtype)

    def cut(self, size: int) -> None:
        """Keep only the first ones."""
        del self._vectors[size:]

    def project_out(
        self, w: Float[Tensor, " params"], size: int | None = None
    ) -> Float64[Tensor, " basis"]:
        """Remove from w, in place, its parts along the first vectors; these parts."""
        vectors = self._vectors[:size]
        if all(v.dtype == w.dtype for v in vectors):
            return project_out(w, vectors)
        parts = [
            (rows @ part).double() for rows, part in self._pieces(vectors, w.dtype, w)
        ]
        coefficients = torch.stack(parts).sum(dim=0)
        for rows, part in self._pieces(vectors, w.dtype, w):
            part.sub_(coefficients.to(w.dtype) @ rows)
        return coefficients

    def combined(
        self, weights: np.ndarray, others: Sequence[Tensor] = ()
    ) -> Float[Tensor, "outputs params"]:
        """Sums of the first vectors, and of the others after them, by columns."""
        own = len(weights) - len(others)
        vectors = [*self._vectors[:own], *others]
        dtype, chosen = self._vectors[-1].dtype, torch.from_numpy(weights.copy())
        if all(v.dtype == dtype for v in vectors):
            return linear_combinations(vectors[0], vectors[1:], chosen)
        like = self._vectors[-1]
        out = like.new_empty(weights.shape[1], len(like))
        factors = chosen.T.to(out)
        for start, (rows, _) in enumerate(self._pieces(vectors, dtype, like)):
            out[:, start * _PIECE : start * _PIECE + rows.shape[1]] = factors @ rows
        return out

    def replace(self, coordinates: np.ndarray) -> None:
        """Put combinations of all but the last in their place, piece by piece."""
        old, last = self._vectors[:-1], self._vectors[-1]
        count = coordinates.shape[1]
        factors = torch.from_numpy(coordinates.copy())
        kept = old[:count]
        if self.dtype is not None:
            kept = [v.to(self.dtype) for v in kept]
        for place, (rows, _) in enumerate(self._pieces(old, last.dtype, last)):
            start = place * _PIECE
            first, *rest = rows.contiguous().unbind()
            moved = linear_combinations(first, rest, factors)
            for vector, row in zip(kept, moved, strict=True):
                vector[start : start + len(row)] = row
        self._vectors = [*kept, last]

    @staticmethod
    def _pieces(
        vectors: Sequence[Tensor], dtype: torch.dtype, beside: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same elements of all vectors [vectors, piece], and of another."""
        columns = zip(*(v.split(_PIECE) for v in vectors), strict=True)
        for rows, part in zip(columns, beside.split(_PIECE), strict=True):
            yield torch.stack([row.to(dtype) for row in rows]), part
