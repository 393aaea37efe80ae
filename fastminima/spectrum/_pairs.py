"""Which eigenpairs are wanted, and those found so far."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from torch import Tensor

__all__ = ["Found", "Wanted"]


class Wanted(NamedTuple):
    """k eigenvalues at one end of the spectrum, to a tolerance."""

    k: int
    which: str
    rtol: float

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
        """The residual that a value may have; `scale` estimates the norm."""
        return self.rtol * max(abs(value), 1e-3 * scale)


@dataclasses.dataclass
class Found:
    """Eigenpairs found so far, the most wanted first."""

    values: list[float] = dataclasses.field(default_factory=list)
    vectors: list[Tensor] = dataclasses.field(default_factory=list)
    residuals: list[float] = dataclasses.field(default_factory=list)
    scale: float = 0.0
    is_converged: bool = False

    def add(self, values: list[float], vectors: list[Tensor], residuals: list[float]):
        """Take in more pairs."""
        self.values += values
        self.vectors += vectors
        self.residuals += residuals

    def keep(self, wanted: Wanted) -> None:
        """Sort, and drop what is not among the k most wanted."""
        order = wanted.order(self.values)[: wanted.k]
        self.values = [self.values[i] for i in order]
        self.vectors = [self.vectors[i] for i in order]
        self.residuals = [self.residuals[i] for i in order]

    def are_within(self, wanted: Wanted) -> bool:
        """Whether there are k, each to its tolerance."""
        return len(self.values) == wanted.k and all(
            residual <= wanted.tolerance(value, self.scale)
            for value, residual in zip(self.values, self.residuals, strict=True)
        )
