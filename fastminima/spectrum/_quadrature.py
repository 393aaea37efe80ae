"""Gauss quadrature of the spectrum that a vector sees, from Lanczos' recurrence."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..curvature._finite import NotFiniteError
from ..curvature._scale import length
from ..ops.vector import lanczos_step, project_out
from ._problem import Problem

__all__ = ["KrylovSpace", "eigensystems", "gauss", "orthogonalize", "recurrence"]

_TINY = torch.finfo(torch.float32).tiny  # its reciprocal is finite in float32


def recurrence(problem: Problem, v: Float[Tensor, " params"], steps: int) -> np.ndarray:
    """The alphas and betas [2, steps] of Lanczos from a unit vector.

    Three vectors of memory: the basis is not kept, and what it loses in orthogonality
    only splits nodes without moving weight.

    Source: Chen, Trogdon, Ubaru (2021), arXiv:2105.06595.
    """
    previous, norm = None, torch.zeros((), dtype=torch.float64, device=problem.device)
    results = []
    for _ in range(steps):
        w = problem.multiply(v)
        results.append(lanczos_step(w, v, previous, norm))
        norm = results[-1][1]
        previous, v = v, w.mul_(norm.clamp_min(_TINY).reciprocal().to(w.dtype))
    numbers = torch.stack(results).cpu().numpy().T
    if not np.isfinite(numbers[0]).all():
        raise NotFiniteError(
            f"One of {problem.products} products with the matrix is not finite. Check "
            "the parameters and the batch."
        )
    return numbers


def gauss(
    alpha: np.ndarray, beta: np.ndarray, counts: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights [runs, steps] of the first `counts` steps of each run.

    Weight 0 pads what was not counted, and what came after a space was exhausted.
    """
    steps = alpha.shape[1]
    floor = 10 * eps * np.maximum(np.abs(alpha).max(axis=1), beta.max(axis=1))
    ends = beta <= floor[:, None]
    sizes = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, steps)
    values, vectors = eigensystems(alpha, beta, np.minimum(sizes, counts))
    return values, vectors[:, 0] ** 2


def eigensystems(
    alpha: np.ndarray, beta: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [runs, steps] and -vectors of the first rows of tridiagonal matrices.

    The rows after them are made diagonal, with the first number of the run.
    """
    steps = alpha.shape[1]
    is_counted = np.arange(steps) < counts[:, None]
    diagonal = np.where(is_counted, alpha, alpha[:, :1])
    beside = np.where(is_counted[:, 1:], beta[:, :-1], 0.0)
    matrices = np.zeros((len(alpha), steps, steps))
    places = np.arange(steps)
    matrices[:, places, places] = diagonal
    matrices[:, places[1:], places[:-1]] = beside  # eigh reads the lower triangle
    return np.linalg.eigh(matrices)


def orthogonalize(w: Tensor, basis: list[Tensor]) -> tuple[Tensor, float]:
    """Remove from w its part in the space of the basis: that part, and |w| then."""
    inside = project_out(w, basis)
    inside = inside + project_out(w, basis)
    return inside, float(length(w))


class KrylovSpace:
    """Lanczos from a unit vector with the basis kept, orthonormal to rounding.

    Where a space is exhausted it goes on from another random vector: the tridiagonal
    matrix then has a zero beside its diagonal.

    Attributes:
        basis: Orthonormal vectors; the last has not been multiplied yet.
        size: How many have been.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.basis = [problem.normal()]
        self._alpha: list[float] = []
        self._beta: list[float] = []

    @property
    def size(self) -> int:
        """The number of vectors that have been multiplied."""
        return len(self._alpha)

    def extend(self) -> None:
        """Multiply the last vector, and find the next."""
        w = self._problem.multiply(self.basis[-1])
        before = float(length(w))
        inside, rest = orthogonalize(w, self.basis)
        alpha = float(inside[-1])
        if not math.isfinite(alpha + rest):
            raise NotFiniteError(
                f"Product {self._problem.products} with the matrix is not finite. "
                "Check the parameters and the batch."
            )
        beta = rest
        if rest <= 100 * torch.finfo(w.dtype).eps * before:
            beta, w = 0.0, self._problem.normal()
            _, rest = orthogonalize(w, self.basis)
        self._alpha.append(alpha)
        self._beta.append(beta)
        self.basis.append(w.div_(rest))

    def numbers(self) -> tuple[np.ndarray, np.ndarray]:
        """The alphas and betas [size] of the tridiagonal matrix."""
        return np.array(self._alpha), np.array(self._beta)
