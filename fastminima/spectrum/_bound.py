"""How large an eigenvalue may be that a Lanczos run has not shown."""

from __future__ import annotations

import numpy as np

__all__ = ["Recurrence", "outermost"]

# The basis may be as little orthogonal as 1e-5: the squares sum to 1 and that at most.
_BESSEL = 1.001
_FIRST, _LAST = 1e-14, 1e8  # distances that are looked at, in units of the scale
_POINTS, _ROUNDS = 48, 4


class Recurrence:
    """How the vectors of a basis follow from its first one.

    A v_j = sum_i c_ij v_i + b_j v_(j+1). So an eigenvector x of the eigenvalue t has
    along v_j the p_j(t)-fold of what it has along v_0, p_j the orthogonal polynomials
    of the run, by their own recurrence. Along all of them it has no more than its
    length: <v_0, x>^2 <= 1 / sum_j p_j(t)^2, the Christoffel function at t.

    Source: van Dorsselaer, Hochstenbach, van der Vorst (2000), SIAM J. Matrix Anal.
    Appl. 22(3), who use the last p_j alone; Szego (1939), section 3.1, for the sum.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, float | None]] = []

    def extend(self, column: np.ndarray, norm: float) -> None:
        """A v_j = sum_i column_i v_i + norm v_(j+1)."""
        self._parts.append((column, norm))

    def restart(self, coordinates: np.ndarray) -> None:
        """All but the last vector are replaced by these combinations of them."""
        self._parts.append((coordinates, None))

    def sum_of_squares(self, values: np.ndarray) -> np.ndarray:
        """The sum of p_j(t)^2 over the basis, for each t; inf if too large."""
        rows = np.ones((1, len(values)))
        with np.errstate(all="ignore"):
            for numbers, norm in self._parts:
                if norm is None:
                    rows = np.vstack([numbers.T @ rows[:-1], rows[-1:]])
                else:
                    following = (values * rows[-1] - numbers @ rows) / norm
                    rows = np.vstack([rows, following])
            total = np.square(rows).sum(axis=0)
        return np.where(np.isfinite(total), total, np.inf)


def outermost(
    recurrence: Recurrence, edge: float, sign: int, overlap: float, scale: float
) -> float:
    """How far beyond `edge` an eigenvalue may lie, on the side of `sign` (1 or -1).

    Of those whose eigenvectors have at least `overlap` along the start. `edge` is the
    outermost Ritz value on that side: beyond it the sum of squares only grows.
    """
    if overlap <= 0:
        return float("inf")
    if scale == 0:
        return 0.0
    allowed = _BESSEL / overlap**2
    low, high = _FIRST * scale, _LAST * scale
    for _ in range(_ROUNDS):
        distances = np.geomspace(low, high, _POINTS)
        sums = recurrence.sum_of_squares(edge + sign * distances)
        beyond = np.nonzero(sums > allowed)[0]
        if len(beyond) == 0:
            return float("inf")
        first = int(beyond[0])
        high = distances[first]
        if first == 0:
            break
        low = distances[first - 1]
    return float(high)
