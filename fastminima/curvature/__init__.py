"""Curvature operators: matrices over the parameters, known by their products."""

from ._operator import CurvatureOperator
from ._trust import Noise, Suspicion, SymmetryWatch
from .covariance import GradientCovariance
from .critical import CriticalSharpness, critical_sharpness
from .derived import DerivedOperator, preconditioner
from .gauss_newton import GaussNewton
from .hessian import Hessian

__all__ = [
    "CriticalSharpness",
    "CurvatureOperator",
    "DerivedOperator",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "Noise",
    "Suspicion",
    "SymmetryWatch",
    "critical_sharpness",
    "preconditioner",
]
