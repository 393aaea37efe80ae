"""Gradient statistics and sharpness inside your own PyTorch training loop."""

from . import optim
from .quantities import ThreeFactors, noise_scale, three_factors

__all__ = ["ThreeFactors", "noise_scale", "optim", "three_factors"]

__version__ = "0.1.0"
