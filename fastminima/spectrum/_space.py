"""A few orthonormal vectors with their products, and the Ritz pairs of their space."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..curvature._scale import dot, length
from ..ops.vector import linear_combinations, project_out
from ._pairs import BestPairs, Goal
from ._problem import Problem

__all__ = ["Ritz", "Space", "take"]


def take(
    problem: Problem, goal: Goal, space: Space, best: BestPairs
) -> tuple[Ritz, list[float]]:
    """The Ritz pairs of a space, with one more, and residuals; the best are kept."""
    ritz = space.ritz(goal.k + 1)
    best.scale = space.scale
    best.add_noise(space.gap, space.size)
    problem.refuse_noise(best.noise)
    errors = ritz.images - ritz.vectors * ritz.column
    residuals = torch.stack([length(error) for error in errors]).tolist()
    best.values, best.residuals = ritz.values[: goal.k], residuals[: goal.k]
    best.vectors = list(ritz.vectors[: goal.k].unbind())
    best.is_sure = True
    # Sums of products are products, but for what a half precision rounds.
    best.is_measured = not problem.is_half
    return ritz, residuals


class Ritz(NamedTuple):
    """Ritz pairs, the most wanted first, with the products of their vectors."""

    values: list[float]
    vectors: Float[Tensor, "k params"]
    images: Float[Tensor, "k params"]

    @property
    def column(self) -> Tensor:
        """The values, to be multiplied with the rows of vectors."""
        column = torch.tensor(self.values, dtype=torch.float64, device="cpu")
        return column.to(self.vectors)[:, None]


class Space:
    """Orthonormal vectors with their products.

    Attributes:
        scale: An estimate of |A|, from below.
        least: The smallest Ritz value.
        gap: The largest |<A u, v> - <u, A v>| met.
    """

    def __init__(self, problem: Problem, goal: Goal) -> None:
        self._problem, self._goal = problem, goal
        self._vectors: list[Tensor] = []
        self._images: list[Tensor] = []
        self._matrix = np.zeros((0, 0))
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

    def ritz(self, count: int) -> Ritz:
        """The most wanted Ritz pairs."""
        values, coordinates = np.linalg.eigh(self._matrix)
        self.scale, self.least = float(np.abs(values).max()), float(values[0])
        order = self._goal.order(values)[:count]
        chosen = torch.from_numpy(np.ascontiguousarray(coordinates[:, order]))
        vectors, images = (
            linear_combinations(rows[0], rows[1:], chosen)
            for rows in (self._vectors, self._images)
        )
        return Ritz(values[order].tolist(), vectors, images)

    def _extend(self) -> None:
        """One more row and column; what they differ by is noise."""
        vector, image = self._vectors[-1], self._images[-1]
        dots = [dot(v, image) for v in self._vectors]
        dots += [dot(vector, i) for i in self._images]
        numbers = torch.stack(dots).cpu().numpy()
        if not np.isfinite(numbers).all():
            raise ValueError(
                f"Product {self._problem.products} with the matrix is not finite. "
                "Check the parameters and the batch."
            )
        column, row = np.split(numbers, 2)
        self.gap = max(self.gap, float(np.abs(row - column).max()))
        self._matrix = np.pad(self._matrix, (0, 1))
        self._matrix[:, -1] = self._matrix[-1, :] = (row + column) / 2
