"""Gradient statistics and sharpness inside your own PyTorch training loop."""

import torch

from . import callbacks, monitor, optim, theory, typing
from .capture import (
    Audit,
    CaptureError,
    GradientProbe,
    MinibatchVariance,
    compile,
    sample_gradients,
)
from .capture.audit import AuditRow
from .curvature import (
    CriticalSharpness,
    CurvatureAudit,
    CurvatureCheck,
    GaussNewton,
    GradientCovariance,
    Hessian,
    LossHessian,
    critical_sharpness,
    preconditioner,
    twice_differentiable,
)
from .quantities import (
    BatchSizeAdvice,
    ThreeFactors,
    advise_batch_size,
    noise_scale,
    three_factors,
)
from .spectrum import (
    Density,
    Eigenpairs,
    Estimate,
    NoiseAlong,
    SharpnessProbe,
    batch_sharpness,
    block_eigenpairs,
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

# Results are data: `torch.load` may read them without being told so.
torch.serialization.add_safe_globals(
    [
        *(Audit, AuditRow, CurvatureAudit, CurvatureCheck, GradientStatistics),
        BatchSizeAdvice,
        *(CriticalSharpness, Density, Eigenpairs, Estimate, NoiseAlong, ThreeFactors),
    ]
)

__all__ = [
    "Audit",
    "BatchSizeAdvice",
    "CaptureError",
    "CriticalSharpness",
    "CurvatureAudit",
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
    "NoiseAlong",
    "SharpnessProbe",
    "ThreeFactors",
    "advise_batch_size",
    "batch_sharpness",
    "block_eigenpairs",
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
    "sample_gradients",
    "spectral_density",
    "spectral_sum",
    "stability_ratio",
    "theory",
    "three_factors",
    "top_eigenpairs",
    "trace",
    "twice_differentiable",
    "typing",
]
