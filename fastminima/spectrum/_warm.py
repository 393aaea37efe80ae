"""Eigenpairs followed from matrix to matrix, with a challenger that may overtake."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..curvature._scale import dot, length
from ..ops.vector import linear_combinations, project_out
from ._pairs import BestPairs, Goal
from ._problem import Problem

__all__ = ["Course", "Space", "followed_pairs", "take"]

_RANDOM_PART = 0.05  # beside the unit challenger, so that it can become another
_MORE = 2  # products beside one for each pair: the challenger's and one of a residual
_DOUBT = 2  # more of them, where the challenger may be the larger one
_RESTS = 2  # matrices in a row for which the challenger may not be multiplied
_FORGOTTEN = 0.7  # of what values were seen to move, a matrix


@dataclass
class Course:
    """What is followed from one matrix to the next.

    Attributes:
        vectors: Near those of the wanted pairs, of any length; empty before the first.
        challenger: The product with the best vector that is not wanted, if known.
        runner_up: Its value and residual, as they were when it was last multiplied.
        values: Of the wanted pairs, at the last matrix.
        drift: The most that values and the runner-up's moved, a matrix.
        rested: Matrices since the challenger was multiplied.
    """

    vectors: list[Tensor] = field(default_factory=list)
    challenger: Tensor | None = None
    runner_up: tuple[float, float] | None = None
    values: list[float] = field(default_factory=list)
    drift: float = 0.0
    rested: int = 0

    def after(self, best: BestPairs, unit: float) -> Course:
        """The course once these pairs are known."""
        values = [unit * value for value in best.values]
        moves = [abs(a - b) for a, b in zip(values, self.values, strict=False)]
        drift = max([*moves, _FORGOTTEN * self.drift]) if self.values else float("inf")
        if best.has_rested:
            runner_up, rested = self.runner_up, self.rested + 1
        else:
            runner_up, rested = None, 0
            if best.runner_up is not None:
                runner_up = unit * best.runner_up[0], unit * best.runner_up[1]
        following = best.following or best.vectors
        return Course(following, best.challenger, runner_up, values, drift, rested)

    def reach(self, goal: Goal) -> float:
        """How far the runner-up may have come, as a rank."""
        if self.runner_up is None:
            return float("inf")
        value, residual = self.runner_up
        return float(goal.rank([value])[0]) + residual + (self.rested + 1) * self.drift


def followed_pairs(problem: Problem, goal: Goal, course: Course) -> BestPairs:
    """The pairs near known ones, of a space that also holds the challenger.

    The space is that of the known vectors, of the challenger with a random part, and of
    residuals: of the worst wanted pair as long as it is beyond its tolerance, else of
    the runner-up, once, and twice more if its residual allows it to be a wanted one.
    What is followed next are the products with the vectors and with the runner-up, so
    that they are further multiplied from one matrix to the next without products of
    their own.

    If errors of values count, the wanted vectors are multiplied alone where they are
    within their tolerance by residual^2 / gap, the gap being that to what the
    runner-up may have come to since it was met, as fast as values were seen to move;
    twice in a row at the most.

    All residuals are those of products. What was missed is not bounded: a few products
    with fresh random numbers cannot say.
    """
    space, best = Space(problem, goal), BestPairs(goal)
    for vector in course.vectors:
        space.add(vector)
    if goal.is_of_values and course.rested < _RESTS:
        take(problem, goal, space, best)
        reach = course.reach(goal) / problem.unit
        best.separate([float(rank) - reach for rank in goal.rank(best.values)])
        if best.are_within():
            best.challenger, best.has_rested = course.challenger, True
            best.following = _ahead(space, space.ritz(goal.k))
            return best
    space.add(_mixed(problem, course.challenger))
    while True:
        ritz, residuals = take(problem, goal, space, best)
        worst = _worst(goal, best)
        doubt = _DOUBT if _may_overtake(goal, ritz, residuals) else 0
        needed = goal.k + (1 if goal.is_of_values else _MORE) + doubt
        is_enough = worst is None and space.size >= needed
        lead = len(residuals) - 1 if worst is None else worst
        errors = ritz.images - ritz.vectors * ritz.column
        if is_enough or problem.left <= 0 or not space.add(errors[lead]):
            break
    following = _ahead(space, ritz)
    best.following = following[: goal.k]
    if len(ritz.values) > goal.k:
        best.challenger = following[-1]
        best.runner_up = ritz.values[-1], residuals[-1]
    return best


def _ahead(space: Space, ritz: SpaceRitz) -> list[Tensor]:
    """The vectors multiplied once more, by the products that there are.

    Shifted half of the way to the other end: then that is not the dominant one.
    """
    shift = min(space.least, 0.0) / 2
    return list((ritz.images - shift * ritz.vectors).unbind())


def take(
    problem: Problem, goal: Goal, space: Space, best: BestPairs
) -> tuple[SpaceRitz, list[float]]:
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
    if len(residuals) > goal.k:
        reach = float(goal.rank(ritz.values)[-1]) + residuals[-1]
        best.separate([float(rank) - reach for rank in goal.rank(best.values)])
    return ritz, residuals


def _mixed(problem: Problem, challenger: Tensor | None) -> Tensor:
    """A unit challenger with a random part, or that alone."""
    random = problem.normal()
    if challenger is None:
        return random
    size = float(length(challenger))
    if not 0 < size < float("inf"):
        return random
    return random.mul_(_RANDOM_PART).add_(challenger, alpha=1 / size)


def _may_overtake(goal: Goal, ritz: SpaceRitz, residuals: list[float]) -> bool:
    """Whether an eigenvalue within the runner-up's residual can be a wanted one."""
    if len(residuals) <= goal.k:
        return False
    last, runner_up = goal.rank(ritz.values)[-2:]
    return bool(runner_up + residuals[-1] > last)


def _worst(goal: Goal, best: BestPairs) -> int | None:
    """Which wanted pair is furthest beyond its tolerance; None if all are within."""
    met = best.errors if goal.is_of_values else best.residuals
    shares = [
        error / max(goal.tolerance(value, best.scale), 1e-300)
        for value, error in zip(best.values, met, strict=True)
    ]
    worst = int(np.argmax(shares))
    return worst if shares[worst] > 1 else None


class SpaceRitz(NamedTuple):
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

    def ritz(self, count: int) -> SpaceRitz:
        """The most wanted Ritz pairs."""
        values, coordinates = np.linalg.eigh(self._matrix)
        self.scale, self.least = float(np.abs(values).max()), float(values[0])
        order = self._goal.order(values)[:count]
        chosen = torch.from_numpy(np.ascontiguousarray(coordinates[:, order]))
        vectors, images = (
            linear_combinations(rows[0], rows[1:], chosen)
            for rows in (self._vectors, self._images)
        )
        return SpaceRitz(values[order].tolist(), vectors, images)

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
