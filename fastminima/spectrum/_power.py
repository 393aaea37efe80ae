"""Eigenpairs by power iteration, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..curvature._finite import NotFiniteError
from ..curvature._scale import length
from ..ops.vector import linear_combinations, power_step, project_out
from ._lanczos_pairs import search_rest
from ._pairs import BestPairs, Goal
from ._problem import Problem
from ._start import Start

__all__ = ["power_pairs"]

_PATIENCE = 20  # steps in which the residual must have fallen, or the matrix is shifted


def power_pairs(problem: Problem, goal: Goal, start: Start) -> BestPairs:
    """The wanted eigenpairs, each with the earlier ones projected out.

    The power method says nothing of what it may have missed; that is searched by runs
    of Lanczos in the complement.
    """
    best = BestPairs(goal)
    is_within, vector = True, start.vector
    while is_within and len(best.values) < goal.k and problem.left > 0:
        is_within = _one_pair(problem, goal, best, vector)
        vector = problem.normal()
    if is_within and goal.miss < 1:
        search_rest(problem, goal, best)
    best.is_sure |= goal.miss >= 1
    return best


def _one_pair(problem: Problem, goal: Goal, best: BestPairs, start: Tensor) -> bool:
    v = start.clone()
    for _ in range(2):
        project_out(v, best.vectors)
    v /= length(v).to(v)
    shift, stalled = 0.0, _Stalled()
    strictness = 0.7 if goal.k > 1 else 1.0  # combining pairs mixes their errors
    while True:
        w = problem.multiply(v)
        leak = project_out(w, best.vectors)
        following = torch.empty_like(v)
        value, residual, norm = power_step(w, v, shift, following).tolist()
        if not norm < float("inf"):
            raise NotFiniteError(
                f"Product {problem.products} with the matrix is not finite. Check the "
                "parameters and the batch."
            )
        best.scale = max(best.scale, abs(value) + residual, norm - abs(shift))
        is_within = residual <= strictness * goal.tolerance(value, best.scale)
        is_wrong = _is_wrong_end(value - shift, goal.which) and value != 0.0
        if is_within and not is_wrong:
            break
        if problem.left <= 0:
            is_within = False
            break
        is_settled = is_wrong and residual <= 0.1 * abs(value)
        if is_settled or (shift == 0.0 and stalled.after(residual)):
            # The dominant eigenvalue has the other sign, or both signs dominate alike.
            shift = best.scale if goal.which == "smallest" else -best.scale
            following = problem.normal() if is_settled else following
        project_out(following, best.vectors)
        v = following / length(following).to(following)
    image = linear_combinations(
        w, best.vectors, torch.cat([leak.new_ones(1), leak])[:, None]
    )
    best.add([v], list(image.unbind()))
    return is_within


def _is_wrong_end(shifted: float, which: str) -> bool:
    return (which == "largest" and shifted < 0) or (which == "smallest" and shifted > 0)


class _Stalled:
    """Whether a residual has stopped falling."""

    def __init__(self) -> None:
        self._best, self._since = float("inf"), 0

    def after(self, residual: float) -> bool:
        if residual < 0.9 * self._best:
            self._best, self._since = residual, 0
        else:
            self._since += 1
        return self._since >= _PATIENCE
