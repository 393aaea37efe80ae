"""What a symmetric matrix known by its products tells: eigenvalues, trace, density."""

from .along import batch_sharpness, directional_sharpness
from .density import spectral_density
from .eigenpairs import ConvergenceWarning, NoiseWarning, top_eigenpairs
from .results import Density, Eigenpairs, Estimate
from .sharpness import SharpnessProbe
from .trace import frobenius_norm, trace

__all__ = [
    "ConvergenceWarning",
    "Density",
    "Eigenpairs",
    "Estimate",
    "NoiseWarning",
    "SharpnessProbe",
    "batch_sharpness",
    "directional_sharpness",
    "frobenius_norm",
    "spectral_density",
    "top_eigenpairs",
    "trace",
]
