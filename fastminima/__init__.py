"""Gradient statistics and sharpness inside your own PyTorch training loop."""

from . import optim
from .capture import Audit, CaptureError, GradientProbe, MinibatchVariance
from .quantities import ThreeFactors, noise_scale, three_factors
from .statistics import GradientStatistics

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "CaptureError",
    "GradientProbe",
    "GradientStatistics",
    "MinibatchVariance",
    "ThreeFactors",
    "noise_scale",
    "optim",
    "three_factors",
]
