"""Eigenpairs followed from matrix to matrix, with a challenger that may overtake."""

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

__all__ = ["followed_pairs"]

_RANDOM_PART = 0.05  # beside the unit challenger, so that it can become another
_MORE = 2  # products beside one for each pair: the challenger's and one of a residual
_DOUBT = 2  # more of them, where the challenger may be the larger one


def followed_pairs(
    problem: Problem, goal: Goal, known: list[Tensor], challenger: Tensor | None
) -> BestPairs:
    """The pairs near known ones, of a space that also holds the challenger.

    The space is that of the known vectors, of the challenger with a random part, and of
    residuals: of the worst wanted pair as long as it is beyond its tolerance, else of
    the runner-up, once, and twice more if its residual allows it to be a wanted one.
    The runner-up's product is the next challenger, so that it is further
    multiplied from one matrix to the next without a product of its own.

    All residuals are those of products. What was missed is not bounded: a few products
    with fresh random numbers cannot say.
    """
    space, best = _Space(problem, goal), BestPairs(goal)
    for vector in [*known, _mixed(problem, challenger)]:
        space.add(vector)
    while True:
        ritz = space.ritz(goal.k + 1)
        best.scale = space.scale
        best.add_noise(space.gap, space.size)
        problem.refuse_noise(best.noise)
        errors = ritz.images - ritz.vectors * ritz.column
        residuals = torch.stack([length(error) for error in errors]).tolist()
        worst = _worst(goal, ritz.values, residuals, space.scale)
        needed = (
            goal.k + _MORE + (_DOUBT if _may_overtake(goal, ritz, residuals) else 0)
        )
        is_enough = worst is None and space.size >= needed
        lead = len(residuals) - 1 if worst is None else worst
        if is_enough or problem.left <= 0 or not space.add(errors[lead]):
            break
    best.values, best.residuals = ritz.values[: goal.k], residuals[: goal.k]
    best.vectors = list(ritz.vectors[: goal.k].unbind())
    best.is_sure = True
    # Sums of products are products, but for what a half precision rounds.
    best.is_measured = not problem.is_half
    if len(ritz.values) > goal.k:
        # Half of the way to the other end: then that is not the dominant one.
        shift = min(space.least, 0.0) / 2
        best.challenger = ritz.images[-1] - shift * ritz.vectors[-1]
    return best


def _mixed(problem: Problem, challenger: Tensor | None) -> Tensor:
    """A unit challenger with a random part, or that alone."""
    random = problem.normal()
    if challenger is None:
        return random
    size = float(length(challenger))
    if not 0 < size < float("inf"):
        return random
    return random.mul_(_RANDOM_PART).add_(challenger, alpha=1 / size)


def _may_overtake(goal: Goal, ritz: _Ritz, residuals: list[float]) -> bool:
    """Whether an eigenvalue within the runner-up's residual can be a wanted one."""
    if len(residuals) <= goal.k:
        return False
    last, runner_up = goal.rank(ritz.values)[-2:]
    return bool(runner_up + residuals[-1] > last)


def _worst(
    goal: Goal, values: list[float], residuals: list[float], scale: float
) -> int | None:
    """Which wanted pair is furthest beyond its tolerance; None if all are within."""
    shares = [
        residual / max(goal.tolerance(value, scale), 1e-300)
        for value, residual in zip(values[: goal.k], residuals, strict=False)
    ]
    worst = int(np.argmax(shares))
    return worst if shares[worst] > 1 else None


class _Ritz(NamedTuple):
    """Ritz pairs, the most wanted first, with the products of their vectors."""

    values: list[float]
    vectors: Float[Tensor, "k params"]
    images: Float[Tensor, "k params"]

    @property
    def column(self) -> Tensor:
        """The values, to be multiplied with the rows of vectors."""
        column = torch.tensor(self.values, dtype=torch.float64, device="cpu")
        return column.to(self.vectors)[:, None]


class _Space:
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

    def ritz(self, count: int) -> _Ritz:
        """The most wanted Ritz pairs."""
        values, coordinates = np.linalg.eigh(self._matrix)
        self.scale, self.least = float(np.abs(values).max()), float(values[0])
        order = self._goal.order(values)[:count]
        chosen = torch.from_numpy(np.ascontiguousarray(coordinates[:, order]))
        vectors, images = (
            linear_combinations(rows[0], rows[1:], chosen)
            for rows in (self._vectors, self._images)
        )
        return _Ritz(values[order].tolist(), vectors, images)

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
