"""Gradient statistics and sharpness inside your own PyTorch training loop."""

from . import callbacks, monitor, optim, theory
from .capture import Audit, CaptureError, GradientProbe, MinibatchVariance, compile
from .curvature import (
    CriticalSharpness,
    GaussNewton,
    GradientCovariance,
    Hessian,
    critical_sharpness,
    preconditioner,
)
from .quantities import ThreeFactors, noise_scale, three_factors
from .spectrum import (
    Density,
    Eigenpairs,
    Estimate,
    NoiseAlong,
    SharpnessProbe,
    batch_sharpness,
    directional_sharpness,
    effective_dimension,
    frobenius_norm,
    hessian_noise_scale,
    log_determinant,
    noise_along,
    product_trace,
    spectral_density,
    spectral_sum,
    stability_ratio,
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
    "MinibatchVariance",
    "NoiseAlong",
    "SharpnessProbe",
    "ThreeFactors",
    "batch_sharpness",
    "callbacks",
    "compile",
    "critical_sharpness",
    "directional_sharpness",
    "effective_dimension",
    "frobenius_norm",
    "hessian_noise_scale",
    "log_determinant",
    "monitor",
    "noise_along",
    "noise_scale",
    "optim",
    "preconditioner",
    "product_trace",
    "spectral_density",
    "spectral_sum",
    "stability_ratio",
    "theory",
    "three_factors",
    "top_eigenpairs",
    "trace",
]
