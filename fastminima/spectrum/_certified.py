"""An eigenpair found with cheap products, and certified with few exact ones."""

from __future__ import annotations

from ..curvature._scale import length
from ._lanczos_pairs import lanczos_pairs
from ._pairs import BestPairs, Goal
from ._problem import Problem
from ._space import Space, take
from ._start import cold_start

__all__ = ["certified_pair"]

_ROUGH = 0.03  # the residual to which a half precision finds a pair
_HALF = (
    0.5  # of what may be beyond a value, for the cheap run; the rest is for rounding
)


def certified_pair(
    problem: Problem, rough: Problem, goal: Goal, *, with_challenger: bool = False
) -> BestPairs:
    """The pair at the end of the spectrum, by a Lanczos run with cheap products.

    From there on a space of exact products grows by residuals until the pair is within
    its tolerance: two or three. What nothing is beyond is known of the cheap matrix
    A + E, and |E x| of the vector found; so nothing of A is beyond that bound and
    |E x|, if E is no larger elsewhere among what matters. If that is too far to be
    sure, a run with exact products follows.
    """
    found = lanczos_pairs(
        rough,
        goal._replace(rtol=max(goal.rtol, _ROUGH), most=_HALF * goal.most),
        cold_start(rough),
        is_cold=True,
        with_challenger=with_challenger,
    )
    best, space = BestPairs(goal), Space(problem, goal)
    vector = found.vectors[0]
    space.add(vector)
    while True:
        ritz, residuals = take(problem, goal, space, best)
        error = ritz.images[0] - ritz.vectors[0] * best.values[0]
        allowed = goal.tolerance(best.values[0], best.scale)
        if residuals[0] <= allowed or problem.left <= 0 or not space.add(error):
            break
    exact = space.image(0) * problem.unit
    apart = exact - rough.multiply(space.vector(0)) * rough.unit
    rank = goal.rank([found.upper * rough.unit])[0] + float(length(apart))
    best.bound(float(rank) / problem.unit, is_of_rest=False)
    slack = goal.slack(best.values[0], best.scale)
    best.is_sure = rank / problem.unit <= goal.rank(best.values)[0] + slack
    if goal.is_of_values:
        best.is_sure &= best.are_within()
    if not best.is_sure and problem.left > 0:
        return lanczos_pairs(
            problem,
            goal,
            cold_start(problem),
            is_cold=True,
            with_challenger=with_challenger,
        )
    if found.challenger is not None:
        best.challenger, best.runner_up = found.challenger, found.runner_up
    return best
