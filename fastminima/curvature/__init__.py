"""Curvature operators: matrices over the parameters, known by their products."""

from ._matrix import FlatMatrix
from ._operator import CurvatureOperator
from ._trust import Noise, Suspicion, SymmetryWatch
from .audit import CurvatureAudit, CurvatureCheck
from .covariance import GradientCovariance
from .critical import CriticalSharpness, critical_sharpness
from .derived import DerivedOperator, preconditioner
from .gauss_newton import GaussNewton
from .hessian import Hessian
from .loss_hessian import LossHessian
from .recording import twice_differentiable

__all__ = [
    "CriticalSharpness",
    "CurvatureAudit",
    "CurvatureCheck",
    "CurvatureOperator",
    "DerivedOperator",
    "FlatMatrix",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "LossHessian",
    "Noise",
    "Suspicion",
    "SymmetryWatch",
    "critical_sharpness",
    "preconditioner",
    "twice_differentiable",
]
