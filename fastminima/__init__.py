"""Gradient statistics and sharpness inside your own PyTorch training loop."""

from .capture import Audit, CaptureError, GradientProbe, MinibatchVariance
from .statistics import GradientStatistics

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "CaptureError",
    "GradientProbe",
    "GradientStatistics",
    "MinibatchVariance",
]
