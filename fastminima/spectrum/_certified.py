"""An eigenpair found with cheap products, and certified with few exact ones."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..curvature._scale import length
from ._lanczos_pairs import lanczos_pairs
from ._pairs import BestPairs, Goal
from ._problem import Problem
from ._space import Space
from ._start import cold_start

__all__ = ["certified_pair"]

_ROUGH = 0.03  # the residual to which a half precision finds a pair
_HALF = 0.5  # of what may be beyond a value is the cheap run's; the rest is rounding's


def certified_pair(
    problem: Problem, rough: Problem, goal: Goal, *, with_challenger: bool = False
) -> BestPairs:
    """The pair at the end of the spectrum, by a Lanczos run with cheap products.

    From there on a space of exact products grows by residuals until the pair is within
    its tolerance: two or three. If what the cheap run says of the rest is too little to
    be sure, a run with exact products follows. Cheap products are counted in the limit
    of exact ones, of which they may take half.
    """
    rough.limit = max(problem.limit // 2, 1)
    found = lanczos_pairs(
        rough,
        goal._replace(rtol=max(goal.rtol, _ROUGH), most=_HALF * goal.most),
        cold_start(rough),
        is_cold=True,
        with_challenger=with_challenger,
    )
    problem.limit -= rough.asked
    best, space = _refined(problem, goal, found.vectors[0])
    _bound(best, goal, problem, rough, space, found.upper)
    if not best.is_sure and problem.left > 0:
        return lanczos_pairs(
            problem,
            goal,
            cold_start(problem),
            is_cold=True,
            with_challenger=with_challenger,
        )
    if found.challenger is not None and found.runner_up is not None:
        value, residual = found.runner_up
        ratio = rough.unit / problem.unit
        best.challenger = found.challenger
        best.runner_up = ratio * value, ratio * residual
    return best


def _refined(
    problem: Problem, goal: Goal, vector: Float[Tensor, " params"]
) -> tuple[BestPairs, Space]:
    """The pair near a vector, and the space of exact products that it is from."""
    best, space = BestPairs(goal), Space(problem, goal)
    space.add(vector)
    while True:
        ritz = space.pairs(best)
        allowed = goal.tolerance(best.values[0], best.scale)
        is_enough = ritz.residuals[0] <= allowed or problem.left <= 0
        if is_enough or not space.add(space.error(ritz, 0)):
            best.vectors = space.vectors(ritz)
            return best, space


def _bound(
    best: BestPairs,
    goal: Goal,
    problem: Problem,
    rough: Problem,
    space: Space,
    upper: float,
) -> None:
    """What nothing is beyond, by a bound on the cheap matrix A + E.

    |E x| is known of the vector x that was found; so nothing of A is beyond that bound
    and |E x|, if E is no larger elsewhere among what matters. It is larger if there is
    an eigenvalue beyond them: then nothing is known.
    """
    exact = space.image(0) * problem.unit
    apart = exact - rough.multiply(space.vector(0)) * rough.unit
    rank = float(goal.rank([upper * rough.unit])[0]) + float(length(apart))
    rank /= problem.unit
    value = float(goal.rank(best.values)[0])
    if rank < value - best.residuals[0]:
        rank = float("inf")
    best.bound(rank, is_of_rest=False)
    best.is_sure = rank <= value + goal.slack(best.values[0], best.scale)
    if goal.is_of_values:
        best.is_sure &= best.are_within()
