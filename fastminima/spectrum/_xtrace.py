"""XTrace: each random vector is a sample of what the images of the others leave.

With random vectors w_1, ..., w_n, Q an orthonormal basis of all A w_i and Q_i one of
all but the i-th, tr(Q_i' A Q_i) plus the form of A in what w_i has in the complement of
Q_i is an unbiased estimate of tr A. The mean over i is the result, for 2n products. All
of it comes from small matrices: R of A W = Q R, Q'W and Q'AQ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..curvature._finite import NotFiniteError
from ..curvature._scale import dots, length
from ._problem import Problem
from ._quadrature import orthogonalize

__all__ = ["Samples", "XTrace"]


_NOTHING = 1e-30  # of products, which are of ordinary size


@dataclass(frozen=True)
class Samples:
    """Estimates of one trace, one from each random vector, and their mean.

    Attributes:
        mean: The estimate.
        error: Its standard error.
        count: How many there are.
    """

    mean: float
    error: float
    count: int


class XTrace:
    """The vectors so far: two products for each.

    The standard error is not the spread s / sqrt(n) that the paper suggests: the
    samples share their spaces, which that does not show (it covers 77 to 95 % where it
    says 95, and 41 % where eigenvalues end at a step). Let d_ij be what the j-th
    vector, joining the space, changes in the i-th sample. Given all other vectors, a
    sample is without bias before and after; so samples i and j have the covariance
    E[d_ij d_ji], and the mean of n has the variance E[s^2 / n + mean over pairs of
    d_ij d_ji].

    Source: Epperly, Tropp, Webber (2024), SIAM J. Matrix Anal. Appl. 45(1), algorithm
    2.1 and section 2.3 for the sphere, with the vectors' lengths as there.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._vectors: list[Tensor] = []
        self._basis: list[Tensor] = []
        self._images = np.zeros((0, 0))  # R [n, n], A W = Q R
        self._inside = np.zeros((0, 0))  # Q'W [n, n]
        self._matrix = np.zeros((0, 0))  # Q'AQ [n, n]

    @property
    def count(self) -> int:
        """The number of random vectors."""
        return len(self._vectors)

    def extend(self) -> None:
        """Draw one more vector."""
        problem, n = self._problem, self.count
        vector = problem.normal()
        image = _finite(problem, problem.multiply(vector))
        before = float(length(image))
        column, rest = orthogonalize(image, self._basis)
        diagonal = rest
        least = 100 * torch.finfo(image.dtype).eps * before
        if rest <= least:
            # The images have no more dimensions: any other is as good, and what is
            # small but not zero in R says that none of the others depends on it.
            diagonal = least or _NOTHING
            image = problem.normal()
            _, rest = orthogonalize(image, self._basis)
        q = image.div_(rest)
        row = _dots(self._vectors, q)
        self._vectors.append(vector)
        self._basis.append(q)
        self._images = _bordered(
            self._images, np.append(column.cpu().numpy(), diagonal)
        )
        self._inside = _bordered(self._inside, _dots(self._basis, vector))
        self._inside[n, :n] = row
        moved = _finite(problem, problem.multiply(q))
        self._matrix = _bordered(self._matrix, _dots(self._basis, moved))
        self._matrix[n, :n] = self._matrix[:n, n]

    def samples(self) -> Samples:
        """The estimate, of two vectors at least."""
        size, n = self._problem.size, self.count
        left_out = np.linalg.inv(self._images).T
        left_out /= np.linalg.norm(left_out, axis=0)
        samples, changes = np.zeros(n), np.zeros((n, n))
        for i in range(n):
            gone = left_out[:, i]
            # With each of the others left out as well; itself: with nothing more.
            also = left_out - np.outer(gone, gone @ left_out)
            also[:, i] = 0
            also /= np.maximum(np.linalg.norm(also, axis=0), 1e-300)
            both = self._left(i, gone, also, size - n + 2)
            alone = self._left(i, gone, also[:, i : i + 1], size - n + 1)
            samples[i], changes[i] = alone[0], alone[0] - both
            changes[i, i] = 0
        spread = samples.var(ddof=1) / n
        shared = float((changes * changes.T).sum()) / (n * (n - 1))
        return Samples(float(samples.mean()), math.sqrt(spread + max(shared, 0.0)), n)

    def _left(
        self, i: int, gone: np.ndarray, also: np.ndarray, outside: int
    ) -> np.ndarray:
        """Sample i [k] from Q without `gone` and, for each k, without `also[:, k]`."""
        within, image, matrix = self._inside[:, i], self._images[:, i], self._matrix
        trace = np.trace(matrix) - gone @ matrix @ gone
        trace = trace - np.einsum("ik,ik->k", also, matrix @ also)
        kept = (within - gone * (gone @ within))[:, None] - also * (within @ also)
        form = within @ image - 2 * (image @ kept)
        form = form + np.einsum("ik,ik->k", kept, matrix @ kept)
        return trace + outside * form / (1 - np.square(kept).sum(axis=0))


def _finite(problem: Problem, image: Tensor) -> Tensor:
    if not bool(torch.isfinite(length(image))):
        raise NotFiniteError(
            f"Product {problem.products} with the matrix is not finite. Check the "
            "parameters and the batch."
        )
    return image


def _bordered(matrix: np.ndarray, column: np.ndarray) -> np.ndarray:
    """The matrix [n, n] with one more column [n + 1], and a row of zeros."""
    n = len(matrix)
    wider = np.zeros((n + 1, n + 1))
    wider[:n, :n] = matrix
    wider[:, n] = column
    return wider


def _dots(vectors: list[Tensor], x: Tensor) -> np.ndarray:
    """<v, x> of each [vectors]."""
    if not vectors:
        return np.zeros(0)
    return dots(x, vectors).cpu().numpy()
