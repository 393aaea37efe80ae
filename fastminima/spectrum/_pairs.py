"""Which eigenpairs are asked for, and the best found so far."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..curvature._scale import dots, length
from ..ops.vector import linear_combinations

__all__ = ["BestPairs", "Goal"]


# Beside a value that is known to rtol, what nothing larger exceeds: ten times rtol, but
# no more than 10 % unless rtol is. docs/curvature.md has the products that it takes.
_SLACK, _MOST = 10.0, 0.1


class Goal(NamedTuple):
    """k eigenvalues at one end of the spectrum, to a tolerance.

    Attributes:
        k: How many.
        which: "largest", "smallest" or "magnitude".
        rtol: Tolerance of residuals.
        miss: The probability with which something beyond them may be missed.
        criterion: What is held to `rtol`: a "residual", or the error of a "value".
        most: The share of a value beyond which nothing may be missed, whatever `rtol`.
        basis_dtype: What vectors of a basis are kept in; None for as they are.
    """

    k: int
    which: str
    rtol: float
    miss: float = 0.002
    criterion: str = "residual"
    basis_dtype: torch.dtype | None = None
    most: float = _MOST

    @property
    def is_of_values(self) -> bool:
        """Whether errors of values count, and not residuals."""
        return self.criterion == "value"

    def rank(self, values: np.ndarray | list[float]) -> np.ndarray:
        """Larger for what is wanted more."""
        signed = np.asarray(values, dtype=float)
        if self.which == "magnitude":
            return np.abs(signed)
        return signed if self.which == "largest" else -signed

    def order(self, values: np.ndarray | list[float]) -> np.ndarray:
        """Indices of the values, the most wanted first."""
        return np.argsort(-self.rank(values), kind="stable")

    def tolerance(self, value: float, scale: float) -> float:
        """The residual or error that a value may have; `scale` estimates the norm."""
        return self.rtol * max(abs(value), 1e-3 * scale)

    def slack(self, value: float, scale: float) -> float:
        """By how much what may be missed may lie beyond a value."""
        if self.is_of_values:
            return self.tolerance(value, scale)
        share = max(self.rtol, min(_SLACK * self.rtol, self.most))
        return share / self.rtol * self.tolerance(value, scale)


class BestPairs:
    """The k best eigenpairs found so far, the most wanted first.

    Attributes:
        values: The eigenvalues.
        vectors: Orthonormal vectors.
        residuals: |A v - value v| of each.
        errors: How far each value may be from the eigenvalue in its place.
        scale: An estimate of |A|, from below.
        noise: What products are not symmetric by, relative to |A|; NaN if no two were
            compared.
        is_sure: Whether nothing beyond them is missing, but with the probability given.
        is_measured: Whether residuals are those of products with the vectors.
        challenger: The product with the best vector that is not wanted, if known.
        following: Products with the vectors, if known.
        runner_up: Its value and residual.
    """

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self.values: list[float] = []
        self.vectors: list[Tensor] = []
        self.residuals: list[float] = []
        self._gaps: list[float] | None = None
        self._images: list[Tensor] = []
        self.scale, self.noise = 0.0, float("nan")
        self.is_sure, self.is_measured = False, False
        self.challenger: Tensor | None = None
        self.following: list[Tensor] = []
        self.runner_up: tuple[float, float] | None = None
        self._bound, self._is_bound_of_rest = float("inf"), False

    @property
    def is_converged(self) -> bool:
        """Whether each is within its tolerance, and nothing is missing."""
        return self.is_sure and self.are_within()

    def add_noise(self, gap: float, compared: int) -> None:
        """Two of so many products differ from those of a symmetric matrix by `gap`."""
        if compared > 1 and self.scale:
            self.noise = float(np.fmax(self.noise, gap / self.scale))

    def bound(self, rank: float, *, is_of_rest: bool) -> None:
        """Nothing is beyond this; or nothing in the complement of what was found."""
        self._bound, self._is_bound_of_rest = rank, is_of_rest

    @property
    def upper(self) -> float:
        """What no eigenvalue is beyond; inf, or -inf for the smallest, if unknown."""
        rank = self._bound
        if self.values and rank < float("inf"):
            rank = self._beyond(float(self._goal.rank(self.values)[0]))
        return 0.0 - rank if self._goal.which == "smallest" else rank

    @property
    def errors(self) -> list[float]:
        """How far each value may be from the eigenvalue in its place.

        Up to what bounds that one; where nothing does, some eigenvalue is within the
        residual r, and it is no further than r^2 / gap, if nothing is within that gap.
        """
        ranks = self._goal.rank(self.values)
        if self._goal.which != "magnitude" and self._bound < float("inf"):
            return [self._beyond(float(rank)) - float(rank) for rank in ranks]
        if self._gaps is None:
            return list(self.residuals)
        pairs = zip(self.residuals, self._gaps, strict=True)
        return [min(r, r * r / gap) if gap > 0 else r for r, gap in pairs]

    def _beyond(self, rank: float) -> float:
        """What the eigenvalue that a value of this rank stands for is not beyond.

        A restricted to what was found and to the rest are two blocks; what couples them
        is no longer than the residuals. So A, without what ranks higher, is no larger
        than the 2 x 2 matrix of their norms.
        """
        if not self._is_bound_of_rest:
            return self._bound
        coupling = math.hypot(*self.residuals)
        middle, half = (rank + self._bound) / 2, (rank - self._bound) / 2
        return middle + math.hypot(half, coupling)

    def separate(self, gaps: list[float]) -> None:
        """Between each value and the rest of the spectrum there are these gaps."""
        self._gaps = gaps

    def measure(self, multiply: Callable[[Tensor], Tensor]) -> None:
        """Make the products with the vectors, and everything from them."""
        vectors, self.vectors, self._images = self.vectors, [], []
        self.add(vectors, [multiply(vector) for vector in vectors])
        self.is_measured = True

    def add_only(self, value: float, vector: Tensor, residual: float) -> None:
        """Take in the one pair that is wanted, with its residual."""
        self.values, self.vectors = [value], [vector]
        self.residuals = [residual]

    def add(self, vectors: list[Tensor], images: list[Tensor]) -> None:
        """Take in more vectors, with the matrix's products with them; keep k pairs.

        All are combined anew (Rayleigh-Ritz), since the error of one is a part of
        another: of vectors found one after the other, the later could never be better
        than the earlier.
        """
        basis, images = [*self.vectors, *vectors], [*self._images, *images]
        values, weights = _rayleigh_ritz(
            _products(basis, basis), _products(basis, images)
        )
        order = self._goal.order(values)[: self._goal.k]
        chosen = torch.from_numpy(np.ascontiguousarray(weights[:, order]))
        rows = linear_combinations(basis[0], basis[1:], chosen)
        moved = linear_combinations(images[0], images[1:], chosen)
        self.values = values[order].tolist()
        column = torch.tensor(self.values, dtype=torch.float64, device="cpu")
        errors = moved - rows * column.to(rows)[:, None]
        self.residuals = torch.stack([length(error) for error in errors]).tolist()
        self.vectors, self._images = list(rows.unbind()), list(moved.unbind())

    def loosen(self, error: float) -> None:
        """Residuals may be larger by this."""
        self.residuals = [residual + error for residual in self.residuals]

    def are_within(self) -> bool:
        """Whether there are k, each to its tolerance."""
        met = self.errors if self._goal.is_of_values else self.residuals
        return len(self.values) == self._goal.k and all(
            error <= self._goal.tolerance(value, self.scale)
            for value, error in zip(self.values, met, strict=True)
        )


def _products(left: list[Tensor], right: list[Tensor]) -> np.ndarray:
    return torch.stack([dots(x, right) for x in left]).cpu().numpy()


def _rayleigh_ritz(
    gram: np.ndarray, matrix: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, and coordinates a column each, of matrix x = value gram x."""
    factor = np.linalg.cholesky(gram)
    half = np.linalg.solve(factor, (matrix + matrix.T) / 2)
    white = np.linalg.solve(factor, half.T)
    values, weights = np.linalg.eigh((white + white.T) / 2)
    return values, np.linalg.solve(factor.T, weights)
