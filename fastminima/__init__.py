"""Gradient statistics and sharpness inside your own PyTorch training loop."""

from . import callbacks, monitor, optim, theory
from .capture import Audit, CaptureError, GradientProbe, MinibatchVariance, compile
from .curvature import (
    CriticalSharpness,
    GaussNewton,
    GradientCovariance,
    Hessian,
    LossHessian,
    critical_sharpness,
    preconditioner,
    twice_differentiable,
)
from .quantities import ThreeFactors, noise_scale, three_factors
from .spectrum import (
    Density,
    Eigenpairs,
    Estimate,
    SharpnessProbe,
    batch_sharpness,
    directional_sharpness,
    frobenius_norm,
    spectral_density,
    top_eigenpairs,
    trace,
)
from .statistics import GradientStatistics

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "CaptureError",
    "CriticalSharpness",
    "Density",
    "Eigenpairs",
    "Estimate",
    "GaussNewton",
    "GradientCovariance",
    "GradientProbe",
    "GradientStatistics",
    "Hessian",
    "LossHessian",
    "MinibatchVariance",
    "SharpnessProbe",
    "ThreeFactors",
    "batch_sharpness",
    "callbacks",
    "compile",
    "critical_sharpness",
    "directional_sharpness",
    "frobenius_norm",
    "monitor",
    "noise_scale",
    "optim",
    "preconditioner",
    "spectral_density",
    "theory",
    "three_factors",
    "top_eigenpairs",
    "trace",
    "twice_differentiable",
]
