"""What a symmetric matrix known by its products tells: eigenvalues, trace, density."""

from .eigenpairs import ConvergenceWarning, top_eigenpairs
from .results import Density, Eigenpairs, Estimate

__all__ = [
    "ConvergenceWarning",
    "Density",
    "Eigenpairs",
    "Estimate",
    "top_eigenpairs",
]
