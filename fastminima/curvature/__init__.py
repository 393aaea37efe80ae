"""Curvature operators: matrices over the parameters, known by their products."""

from .covariance import GradientCovariance
from .gauss_newton import GaussNewton
from .hessian import Hessian

__all__ = ["GaussNewton", "GradientCovariance", "Hessian"]
