"""Eigenpairs followed from matrix to matrix, with a challenger that may overtake."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..curvature._scale import length
from ._pairs import BestPairs, Goal
from ._problem import Problem
from ._space import Ritz, Space

__all__ = ["Course", "followed_pairs"]

_RANDOM_PART = 0.05  # beside the unit challenger, so that it can become another
_MORE = 2  # products beside one for each pair: the challenger's and one of a residual
_DOUBT = 2  # more of them, where the challenger may be the larger one
_RESTS = 2  # matrices in a row for which the challenger may not be multiplied
_FORGOTTEN = 0.7  # of how fast the runner-up was seen to move, a matrix


@dataclass
class Course:
    """What is followed from one matrix to the next.

    Attributes:
        vectors: Near those of the wanted pairs, of any length; empty before the first.
        last: The last of the wanted values.
        challenger: The product with the best vector that is not wanted, if known.
        runner_up: Its value over the last wanted one, when both were multiplied.
        reach: What no eigenvalue that is not wanted ranks above, over the last that is,
            as far as is known.
        drift: The most that the runner-up's share moved, a matrix.
        rested: Matrices since the challenger was multiplied.
    """

    vectors: list[Tensor] = field(default_factory=list)
    last: float = 0.0
    challenger: Tensor | None = None
    runner_up: float | None = None
    reach: float = float("inf")
    drift: float = 0.0
    rested: int = _RESTS

    def at(self, goal: Goal, values: list[float]) -> float:
        """The rank that the rest may have come to, at a matrix of these values."""
        last = float(goal.rank(values)[-1])
        return (self.reach + self.drift) * last if last > 0 else float("inf")

    def after(self, goal: Goal, best: BestPairs, *, is_cold: bool) -> Course:
        """The course once these pairs are known."""
        following = best.following or best.vectors
        last = float(goal.rank(best.values)[-1])
        course = Course(following, last, best.challenger)
        if last <= 0:
            return course
        if best.runner_up is None:
            course.runner_up, course.drift = self.runner_up, self.drift
            course.reach, course.rested = self.reach + self.drift, self.rested + 1
            return course
        value, residual = best.runner_up
        share = float(goal.rank([value])[0]) / last
        course.runner_up, course.reach = share, share + residual / last
        if not is_cold:
            course.rested = 0
            known = self.reach + self.drift
            if self.runner_up is not None:
                moved = abs(share - self.runner_up) / (self.rested + 1)
                course.drift = max(moved, _FORGOTTEN * self.drift)
            # One that is met beyond what was thought: then that was wrong.
            if share <= known:
                course.reach = min(course.reach, known)
        return course


def followed_pairs(problem: Problem, goal: Goal, course: Course) -> BestPairs:
    """The pairs near known ones, of a space that also holds the challenger.

    The space is that of the known vectors, of the challenger with a random part, and of
    residuals: of the worst wanted pair as long as it is beyond its tolerance and more
    than rounding, else of the runner-up, once, and twice more if it may be a wanted
    one, as far as its residual tells. What is followed next are the products with the
    vectors and with the runner-up, so that they are further multiplied from one matrix
    to the next without products of their own.

    If errors of values count, an error is residual^2 / gap, the gap being that to what
    the runner-up can have come to since it was met, as fast as it was seen to come
    nearer; and nothing is multiplied beside the wanted vectors where they are within
    their tolerance by that, twice in a row at the most.

    All residuals are those of products. What was missed is not bounded: a few products
    with fresh random numbers cannot say.
    """
    space, best = Space(problem, goal), BestPairs(goal)
    for vector in course.vectors:
        space.add(vector)
    if goal.is_of_values:
        ritz = space.pairs(best)
        _separate(goal, best, course.at(goal, best.values))
        is_noise = best.noise > problem.allowed_noise
        if course.rested < _RESTS and best.are_within() and not is_noise:
            best.challenger = course.challenger
            best.vectors, best.following = space.vectors(ritz), _ahead(space, ritz)
            return best
    space.add(_mixed(problem, course.challenger))
    stall = _Stall(problem)
    while True:
        ritz = space.pairs(best)
        reach = _reach(goal, ritz, course.at(goal, best.values))
        _separate(goal, best, reach)
        worst = _worst(goal, best)
        if worst is not None and stall.is_at(worst, best):
            worst = None
        may_overtake = reach > goal.rank(best.values)[-1]
        needed = goal.k + (1 if goal.is_of_values else _MORE)
        needed += _DOUBT if may_overtake and len(ritz.values) > goal.k else 0
        is_enough = worst is None and space.size >= needed
        lead = len(ritz.values) - 1 if worst is None else worst
        if is_enough or problem.left <= 0 or not space.add(space.error(ritz, lead)):
            break
    following = _ahead(space, ritz)
    best.vectors, best.following = space.vectors(ritz), following[: goal.k]
    if len(ritz.values) > goal.k:
        best.challenger = following[-1]
        best.runner_up = ritz.values[-1], ritz.residuals[-1]
    return best


def _reach(goal: Goal, ritz: Ritz, known: float) -> float:
    """What the rest of the spectrum ranks no higher than, as far as is known.

    By the runner-up and its residual; if errors of values count, also by what was known
    before, unless the runner-up is beyond it.
    """
    if len(ritz.values) <= goal.k:
        return known if goal.is_of_values else float("inf")
    rank = float(goal.rank(ritz.values)[-1])
    met = rank + ritz.residuals[-1]
    return min(met, known) if goal.is_of_values and rank <= known else met


def _separate(goal: Goal, best: BestPairs, reach: float) -> None:
    best.separate([float(rank) - reach for rank in goal.rank(best.values)])


def _ahead(space: Space, ritz: Ritz) -> list[Tensor]:
    """The vectors multiplied once more, by the products that there are.

    Shifted half of the way to the other end: then that is not the dominant one. What
    that leaves nothing of but rounding is kept as it is.
    """
    shift = min(space.least, 0.0) / 2
    weights = ritz.coordinates
    is_moved = np.array([space.is_moved(shift, column) for column in weights.T])
    of_vectors = np.where(is_moved, -shift * weights, weights)
    return list(space.combined(of_vectors, weights * is_moved).unbind())


def _mixed(problem: Problem, challenger: Tensor | None) -> Tensor:
    """A unit challenger with a random part, or that alone."""
    random = problem.direction()
    if challenger is None:
        return random
    size = float(length(challenger))
    if not 0 < size < float("inf"):
        return random
    share = _RANDOM_PART / float(length(random))
    return random.mul_(share).add_(challenger, alpha=1 / size)


def _worst(goal: Goal, best: BestPairs) -> int | None:
    """Which wanted pair is furthest beyond its tolerance; None if all are within."""
    met = best.errors if goal.is_of_values else best.residuals
    shares = [
        error / max(goal.tolerance(value, best.scale), 1e-300)
        for value, error in zip(best.values, met, strict=True)
    ]
    worst = int(np.argmax(shares))
    return worst if shares[worst] > 1 else None


class _Stall:
    """Notices residuals that further products leave where they are."""

    def __init__(self, problem: Problem) -> None:
        self._share = 0.0 if problem.is_half else problem.smallest
        self._met: dict[int, float] = {}

    def is_at(self, place: int, best: BestPairs) -> bool:
        """Whether this residual is rounding, and was not halved by its last product."""
        residual = best.residuals[place]
        before = self._met.get(place, float("inf"))
        self._met[place] = residual
        return before / 2 < residual <= self._share * best.scale
