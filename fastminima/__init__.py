"""Gradient statistics and sharpness inside your own PyTorch training loop."""

from .curvature import GaussNewton, GradientCovariance, Hessian
from .spectrum import (
    Density,
    Eigenpairs,
    Estimate,
    SharpnessProbe,
    frobenius_norm,
    spectral_density,
    top_eigenpairs,
    trace,
)

__all__ = [
    "Density",
    "Eigenpairs",
    "Estimate",
    "GaussNewton",
    "GradientCovariance",
    "Hessian",
    "SharpnessProbe",
    "frobenius_norm",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]

__version__ = "0.1.0"
