"""A few orthonormal vectors with their products, and the Ritz pairs of their space."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..curvature._finite import NotFiniteError
from ..curvature._scale import dots, length
from ..ops.vector import linear_combinations, project_out
from ._pairs import BestPairs, Goal
from ._problem import Problem

__all__ = ["Ritz", "Space"]

# Squares of lengths are sums that may cancel, |A x|^2 too where x is a sum of vectors
# that A moves: doubles have 1e-16 of the terms. Below this share of them a length is
# taken of the vector.
_CANCELLED = 1e-10


class Ritz(NamedTuple):
    """Ritz pairs, the most wanted first.

    Attributes:
        values: The Ritz values.
        coordinates: Of the Ritz vectors, a column each.
        residuals: |A x - value x| of each.
    """

    values: list[float]
    coordinates: np.ndarray
    residuals: list[float]


class Space:
    """Orthonormal vectors with their products, known by all their inner products.

    Values and residuals are those of the small matrices; long vectors are made of them
    when they are asked for.

    Attributes:
        scale: An estimate of |A|, from below.
        least: The smallest Ritz value.
        gap: The largest |<A u, v> - <u, A v>| met.
    """

    def __init__(self, problem: Problem, goal: Goal) -> None:
        self._problem, self._goal = problem, goal
        self._vectors: list[Tensor] = []
        self._images: list[Tensor] = []
        # <v_i, v_j>, <v_i, A v_j> and <A v_i, A v_j>.
        self._gram, self._matrix, self._squares = (np.zeros((0, 0)) for _ in range(3))
        self.gap = 0.0
        self.scale, self.least = 0.0, 0.0

    @property
    def size(self) -> int:
        """How many vectors there are."""
        return len(self._vectors)

    def vector(self, place: int) -> Tensor:
        """One of them."""
        return self._vectors[place]

    def image(self, place: int) -> Tensor:
        """The product with it."""
        return self._images[place]

    def add(self, vector: Tensor) -> bool:
        """Make a product with what of a vector is new; False if nothing is."""
        before = float(length(vector))
        vector = vector.clone()
        for _ in range(2):
            project_out(vector, self._vectors)
        left = float(length(vector))
        if not left > 100 * torch.finfo(vector.dtype).eps * before:
            return False
        self._vectors.append(vector.div_(left))
        self._images.append(self._problem.multiply(vector))
        self._extend()
        return True

    def pairs(self, best: BestPairs) -> Ritz:
        """The wanted Ritz pairs and one more; the best are kept, but for vectors.

        Vectors that are followed may lie where A is rounding alone: noise is judged
        beside others, of which |A| is known.
        """
        ritz, k = self._ritz(self._goal.k + 1), self._goal.k
        best.scale, best.noise = self.scale, float("nan")
        best.add_noise(self.gap, self.size)
        if self.size > k:
            self._problem.refuse_noise(best.noise)
        best.values, best.residuals = ritz.values[:k], ritz.residuals[:k]
        best.is_sure = True
        # Sums of products are products, but for what a half precision rounds.
        best.is_measured = not self._problem.is_half
        return ritz

    def _ritz(self, count: int) -> Ritz:
        values, coordinates = np.linalg.eigh(self._matrix)
        self.scale, self.least = float(np.abs(values).max()), float(values[0])
        order = self._goal.order(values)[:count]
        found, chosen = values[order].tolist(), coordinates[:, order]
        residuals = [
            self._residual(value, weights)
            for value, weights in zip(found, chosen.T, strict=True)
        ]
        return Ritz(found, chosen, residuals)

    def combined(
        self, of_vectors: np.ndarray, of_images: np.ndarray
    ) -> Float[Tensor, "outputs params"]:
        """Sums of the vectors and of the products, weighted by columns."""
        first, *rest = (*self._vectors, *self._images)
        weights = np.concatenate([of_vectors, of_images])
        return linear_combinations(first, rest, torch.from_numpy(weights))

    def vectors(self, ritz: Ritz) -> list[Tensor]:
        """The Ritz vectors of the wanted pairs."""
        first, *rest = self._vectors
        weights = np.ascontiguousarray(ritz.coordinates[:, : self._goal.k])
        found = linear_combinations(first, rest, torch.from_numpy(weights))
        return list(found.unbind())

    def error(self, ritz: Ritz, place: int) -> Float[Tensor, " params"]:
        """A x - value x of one Ritz pair."""
        return self._error(ritz.values[place], ritz.coordinates[:, place])

    def _error(self, value: float, weights: np.ndarray) -> Tensor:
        column = weights[:, None]
        return self.combined(-value * column, column)[0]

    def is_moved(self, shift: float, weights: np.ndarray) -> bool:
        """Whether A x - shift x is more than rounding."""
        square, terms = self._square(shift, weights)
        return square > _CANCELLED * terms

    def _residual(self, value: float, weights: np.ndarray) -> float:
        """|A x - value x|."""
        square, terms = self._square(value, weights)
        if square > _CANCELLED * terms:
            return square**0.5
        return float(length(self._error(value, weights)))

    def _square(self, shift: float, weights: np.ndarray) -> tuple[float, float]:
        """|A x - shift x|^2, and the absolute terms of which it is the sum."""
        sums = self._squares - 2 * shift * self._matrix + shift * shift * self._gram
        terms = (
            np.abs(self._squares)
            + 2 * abs(shift) * np.abs(self._matrix)
            + shift * shift * np.abs(self._gram)
        )
        size = np.abs(weights)
        return float(weights @ sums @ weights), float(size @ terms @ size)

    def _extend(self) -> None:
        """One more row and column; what they differ by is noise."""
        vector, image = self._vectors[-1], self._images[-1]
        rows = [*self._vectors, *self._images]
        found = torch.stack([dots(vector, rows), dots(image, rows)]).cpu().numpy()
        if not np.isfinite(found).all():
            raise NotFiniteError(
                f"Product {self._problem.products} with the matrix is not finite. "
                "Check the parameters and the batch."
            )
        (own, row), (column, squares) = (np.split(numbers, 2) for numbers in found)
        self.gap = max(self.gap, float(np.abs(row - column).max()))
        self._gram = _bordered(self._gram, own)
        self._matrix = _bordered(self._matrix, (row + column) / 2)
        self._squares = _bordered(self._squares, squares)


def _bordered(matrix: np.ndarray, column: np.ndarray) -> np.ndarray:
    """A symmetric matrix with one more row and column."""
    larger = np.pad(matrix, (0, 1))
    larger[:, -1] = larger[-1, :] = column
    return larger
