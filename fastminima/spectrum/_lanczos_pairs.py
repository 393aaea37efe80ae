"""Eigenpairs by Lanczos runs: one that finds them, others that search what is left."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ._lanczos_run import LanczosRun, Ritz
from ._pairs import BestPairs, Goal
from ._problem import Problem

__all__ = ["lanczos_pairs", "miss_probability"]

_BASIS_BYTES = 1 << 30  # of a basis before it is restarted
_MISS_PROBABILITY = 0.05
_STRICTNESS = 0.7


def lanczos_pairs(
    problem: Problem, goal: Goal, start: Tensor, max_products: int
) -> BestPairs:
    """The wanted eigenpairs, by as many runs as multiplicities ask for."""
    best = BestPairs(goal)
    is_sure = False
    while not is_sure and problem.asked < max_products:
        run = LanczosRun(problem.multiply, start, deflate=best.vectors)
        search = _Search(problem, goal, best, run, max_products)
        is_sure = search.run_on()
        if len(best.values) == problem.size or (goal.k == 1 and best.values):
            is_sure = True
        start = problem.normal()
    best.is_converged = is_sure and best.are_within()
    return best


def miss_probability(size: int, gap: float, steps: int) -> float:
    """Bound on the probability that `steps` of Lanczos are below the top by `gap`.

    The top Ritz value of a random start is below (1 - gap) times the spread of the
    spectrum, counted from its lower end, with at most this probability.

    Source: Kuczynski and Wozniakowski (1992), theorem 4.2.
    """
    if steps >= size:
        return 0.0
    return min(
        1.0, 1.648 * math.sqrt(size) * math.exp(-math.sqrt(gap) * (2 * steps - 1))
    )


class _Search:
    """One run: until it has what is missing, or shows that nothing is."""

    def __init__(
        self,
        problem: Problem,
        goal: Goal,
        best: BestPairs,
        run: LanczosRun,
        max_products: int,
    ) -> None:
        self._problem, self._goal, self._best = problem, goal, best
        self._run = run
        # Combining pairs of several runs mixes their errors.
        self._strictness = _STRICTNESS if best.vectors else 1.0
        self._left = max_products - problem.asked
        self._missing = goal.k - len(best.values)
        vector_bytes = problem.size * run.basis[0].element_size()
        self._capacity = max(_BASIS_BYTES // vector_bytes, 2 * goal.k + 16)

    def run_on(self) -> bool:
        """Adds to `best` what it finds; True if nothing can be missing any more."""
        while True:
            if self._run.products < self._left:
                self._run.step()
            # A look in every step, on GPUs too: orthogonality is gone three steps after
            # a residual has become small, and what is found then is wrong.
            ritz = self._run.ritz()
            self._check(ritz)
            self._best.scale = max(self._best.scale, float(np.abs(ritz.values).max()))
            order = self._goal.order(ritz.values)
            newcomers = order[: self._missing] if self._missing else self._beyond(ritz)
            is_out = self._run.products >= self._left
            if self._run.is_exhausted or is_out or self._all_within(ritz, newcomers):
                if self._missing or len(newcomers):
                    if is_out and not self._missing:
                        newcomers = newcomers[
                            [self._is_within(ritz, i) for i in newcomers]
                        ]
                    self._take(ritz, newcomers)
                    return False
                if self._run.is_exhausted or self._is_searched(ritz, order[0]):
                    return True
                if is_out:
                    return False
            if self._run.size >= self._capacity:
                half = max(self._goal.k + 8, self._capacity // 2)
                self._run.restart(ritz, order[: min(half, self._run.size - 1)])

    def _check(self, ritz: Ritz) -> None:
        if not np.isfinite(ritz.values).all():
            raise ValueError(
                f"Product {self._problem.products} with the matrix is not finite. "
                "Check the parameters and the batch."
            )

    def _beyond(self, ritz: Ritz) -> np.ndarray:
        """Ritz pairs that belong before the last one found, beyond its tolerance."""
        last = self._best.values[-1]
        slack = self._goal.tolerance(last, self._best.scale)
        ranks = self._goal.rank(ritz.values)
        order = self._goal.order(ritz.values)
        is_beyond = ranks[order] > self._goal.rank([last])[0] + slack
        return order[is_beyond][: self._goal.k]

    def _is_within(self, ritz: Ritz, index: np.integer) -> bool:
        value = float(ritz.values[index])
        allowed = self._goal.tolerance(value, self._best.scale)
        return bool(ritz.residuals[index] <= self._strictness * allowed)

    def _all_within(self, ritz: Ritz, indices: np.ndarray) -> bool:
        return len(indices) >= self._missing and all(
            self._is_within(ritz, i) for i in indices
        )

    def _take(self, ritz: Ritz, indices: np.ndarray) -> None:
        if len(indices) == 0:
            return
        vectors = self._run.vectors(ritz.coordinates[:, indices])
        if self._goal.k == 1:
            (vector,), (index,) = vectors, indices
            norm = torch.linalg.vector_norm(vector)
            residual = float(ritz.residuals[index] / norm)
            self._best.add_only(float(ritz.values[index]), vector / norm, residual)
        else:
            images = self._run.images(ritz, indices)
            self._best.add(list(vectors.unbind()), list(images.unbind()))

    def _is_searched(self, ritz: Ritz, top: np.integer) -> bool:
        """Whether a copy or a better value would have shown by now."""
        if self._is_within(ritz, top):
            return True
        last = self._goal.rank(self._best.values)[-1]
        low, high = float(ritz.values[0]), float(ritz.values[-1])
        gaps = []
        if self._goal.which != "smallest":
            gaps.append((last - high) / max(last - low, 1e-300))
        if self._goal.which != "largest":
            gaps.append((last + low) / max(last + high, 1e-300))
        gap = max(min(gaps), 0.0)
        steps = self._run.products
        return miss_probability(self._problem.size, gap, steps) <= _MISS_PROBABILITY
