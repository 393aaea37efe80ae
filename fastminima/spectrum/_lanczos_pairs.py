"""Eigenpairs by Lanczos runs: one that finds them, others that search what is left."""

from __future__ import annotations

import numpy as np

from ..curvature._finite import NotFiniteError
from ..curvature._scale import length
from ._bound import outermost
from ._lanczos_run import LanczosRun, Ritz
from ._pairs import BestPairs, Goal
from ._problem import Problem
from ._start import Start, overlap, random_start

__all__ = ["lanczos_pairs", "search_rest"]

_BASIS_BYTES = 1 << 30  # of a basis before it is restarted
_STRICTNESS = 0.7  # combining pairs of several runs mixes their errors
_NEARLY = 30.0  # tolerances from which on a bound is looked at
_STRICTNESS_HALF = 0.5  # leaves room for what products, or vectors, are rounded by


def lanczos_pairs(
    problem: Problem,
    goal: Goal,
    start: Start,
    *,
    is_cold: bool,
    with_challenger: bool = False,
) -> BestPairs:
    """The wanted eigenpairs, by as many runs as multiplicities ask for.

    The run of a cold start for one pair says itself what it may have missed; else the
    complement of what was found is searched from random vectors.
    """
    best = BestPairs(goal)
    run = LanczosRun(problem.multiply, start, basis_dtype=goal.basis_dtype)
    finding = _Search(problem, goal, best, run)
    is_alone = is_cold and goal.k == 1
    finding.find(goal.miss, is_alone=is_alone)
    if goal.miss >= 1:
        best.is_sure = True
    if is_alone or goal.miss >= 1:
        if with_challenger:
            finding.keep_challenger(goal.k)
        return best
    search_rest(problem, goal, best, with_challenger=with_challenger)
    return best


def search_rest(
    problem: Problem, goal: Goal, best: BestPairs, *, with_challenger: bool = False
) -> None:
    """Look for eigenvalues beyond those found, until none can be missing.

    Each search starts from a fresh random vector, for whatever was found before. The
    probabilities with which they may fail, halved from one to the next, sum to no more
    than what is allowed.
    """
    miss, search = goal.miss, None
    while not best.is_sure:
        if len(best.values) == problem.size:
            best.is_sure = True
            rank = float(goal.rank(best.values)[0])
            best.bound(rank, is_of_rest=True)
            return
        if problem.left <= 0:
            break
        miss /= 2
        start = random_start(problem)
        run = LanczosRun(
            problem.multiply,
            start,
            deflate=best.vectors,
            scale=best.scale,
            basis_dtype=goal.basis_dtype,
        )
        search = _Search(problem, goal, best, run)
        search.search(miss)
    if search is not None and with_challenger:
        search.keep_challenger(0)


class _Search:
    """One run: until it has what is missing, or shows that nothing is."""

    def __init__(
        self, problem: Problem, goal: Goal, best: BestPairs, run: LanczosRun
    ) -> None:
        self._problem, self._goal, self._best = problem, goal, best
        self._run = run
        self._strictness = _STRICTNESS if best.vectors else 1.0
        self._missing = goal.k - len(best.values)
        kept_in = goal.basis_dtype or problem.dtype
        vector_bytes = problem.size * kept_in.itemsize
        self._capacity = max(_BASIS_BYTES // vector_bytes, 2 * goal.k + 16)
        self._ritz: Ritz | None = None
        self._excess = float("inf")  # of the bound over the value, a product before

    def find(self, miss: float, *, is_alone: bool) -> None:
        """Take in what is wanted; with `is_alone` once nothing beyond can be missed."""
        while True:
            ritz = self._advance()
            wanted = self._goal.order(ritz.values)[: self._missing]
            is_done = self._is_over or self._all_within(ritz, wanted)
            is_value = self._goal.is_of_values and self._goal.which != "magnitude"
            if is_alone and miss < 1 and (is_done or self._is_nearly(ritz, wanted[0])):
                rank = self._beyond(ritz, miss)
                is_near, is_worth = self._progress(rank, float(ritz.values[wanted[0]]))
                self._best.bound(rank, is_of_rest=False)
                self._best.is_sure = is_near or self._run.is_exhausted
                if is_value:  # what bounds the value is all that counts
                    is_done = self._is_over or is_near
                else:
                    is_done &= self._is_over or (is_near and not is_worth)
            if is_done:
                self._take(ritz, wanted, is_alone=is_alone)
                return
            self._shrink(ritz)

    def search(self, miss: float) -> None:
        """Take in what belongs before the last one found; be sure if nothing does."""
        while True:
            ritz = self._advance()
            newcomers = self._newcomers(ritz)
            if len(newcomers):
                if self._is_over or self._all_within(ritz, newcomers):
                    if self._is_out and not self._missing:
                        within = [self._is_within(ritz, i) for i in newcomers]
                        newcomers = newcomers[within]
                    self._take(ritz, newcomers)
                    return
            else:
                rank = self._beyond(ritz, miss)
                is_near = self._is_near(rank, self._best.values[-1])
                if self._is_over or is_near:
                    self._best.bound(rank, is_of_rest=True)
                    self._best.is_sure = is_near or self._run.is_exhausted
                    return
            self._shrink(ritz)

    def keep_challenger(self, place: int) -> None:
        """Keep the product with the vector that comes at this place."""
        ritz = self._ritz
        if ritz is None or len(ritz.values) <= place:
            return
        index = self._goal.order(ritz.values)[[place]]
        self._best.challenger = self._run.images(ritz, index)[0]
        value, residual = float(ritz.values[index[0]]), float(ritz.residuals[index[0]])
        self._best.runner_up = value, residual

    @property
    def _is_out(self) -> bool:
        return self._run.products > 0 and self._problem.left <= 0

    @property
    def _is_over(self) -> bool:
        return self._run.is_exhausted or self._is_out

    def _advance(self) -> Ritz:
        """One more product, and a look at what there is.

        In every step, on GPUs too: orthogonality is gone three steps after a residual
        has become small, and what is found then is wrong.
        """
        if not self._is_out:
            self._run.step()
        if not self._run.is_finite:
            raise NotFiniteError(
                f"Product {self._problem.products} with the matrix is not finite. "
                "Check the parameters and the batch."
            )
        ritz = self._ritz = self._run.ritz()
        best = self._best
        best.scale = max(best.scale, float(np.abs(ritz.values).max()))
        best.add_noise(self._run.gap, self._run.products)
        self._problem.refuse_noise(best.noise)
        return ritz

    def _shrink(self, ritz: Ritz) -> None:
        if self._run.size >= self._capacity:
            half = max(self._goal.k + 8, self._capacity // 2)
            order = self._goal.order(ritz.values)
            self._run.restart(ritz, order[: min(half, self._run.size - 1)])

    def _newcomers(self, ritz: Ritz) -> np.ndarray:
        """Ritz pairs that are missing, or beyond the last value and its tolerance."""
        order = self._goal.order(ritz.values)
        if self._missing:
            return order[: self._missing]
        last = self._best.values[-1]
        slack = self._goal.tolerance(last, self._best.scale)
        ranks = self._goal.rank(ritz.values)
        is_beyond = ranks[order] > self._goal.rank([last])[0] + slack
        return order[is_beyond][: self._goal.k]

    def _beyond(self, ritz: Ritz, miss: float) -> float:
        """The rank that nothing the run acts on exceeds, but with this probability."""
        if self._run.is_whole and self._run.is_exhausted:
            return float(self._goal.rank(ritz.values).max())
        seen = overlap(self._run.deviation, miss)
        scale = self._best.scale
        ranks = []
        for sign, edge, end in (
            (1, ritz.values[-1], "smallest"),
            (-1, ritz.values[0], "largest"),
        ):
            if self._goal.which != end:
                recurrence = self._run.recurrence
                further = outermost(recurrence, float(edge), sign, seen, scale)
                ranks.append(sign * float(edge) + further)
        return max(ranks) + self._run.gap + self._run.rounding

    def _progress(self, rank: float, value: float) -> tuple[bool, bool]:
        """Whether the bound is near the value, and whether to go on all the same.

        That is so while each product halves what is between them: then nearly all of it
        is to be had for two or three products more.
        """
        excess = rank - float(self._goal.rank([value])[0])
        is_halved = excess <= self._excess / 2
        is_little = excess <= self._goal.tolerance(value, self._best.scale)
        self._excess = excess
        return self._is_near(rank, value), is_halved and not is_little

    def _is_near(self, rank: float, last: float) -> bool:
        """Whether nothing beyond the last value can be far beyond it."""
        slack = self._goal.slack(last, self._best.scale)
        return rank <= float(self._goal.rank([last])[0]) + slack

    def _is_within(self, ritz: Ritz, index: np.integer) -> bool:
        value = float(ritz.values[index])
        allowed = self._goal.tolerance(value, self._best.scale)
        is_rounded = self._problem.is_half or self._problem.is_rounded
        half = _STRICTNESS_HALF if is_rounded else 1.0
        return bool(ritz.residuals[index] <= half * self._strictness * allowed)

    def _is_nearly(self, ritz: Ritz, index: np.integer) -> bool:
        """Whether a residual is within some times its tolerance."""
        allowed = self._goal.tolerance(float(ritz.values[index]), self._best.scale)
        return bool(ritz.residuals[index] <= _NEARLY * allowed)

    def _all_within(self, ritz: Ritz, indices: np.ndarray) -> bool:
        return len(indices) >= self._missing and all(
            self._is_within(ritz, i) for i in indices
        )

    def _take(self, ritz: Ritz, indices: np.ndarray, *, is_alone: bool = False) -> None:
        if len(indices) == 0:
            return
        vectors = self._run.vectors(ritz.coordinates[:, indices])
        if is_alone:
            (vector,), (index,) = vectors, indices
            size = float(length(vector))
            residual = float(ritz.residuals[index]) / size
            self._best.add_only(float(ritz.values[index]), vector / size, residual)
        else:
            images = self._run.images(ritz, indices)
            self._best.add(list(vectors.unbind()), list(images.unbind()))
