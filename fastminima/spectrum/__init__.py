"""What a symmetric matrix known by its products tells: eigenvalues, trace, density."""

from .along import batch_sharpness, directional_sharpness
from .density import spectral_density
from .eigenpairs import ConvergenceWarning, NoiseWarning, top_eigenpairs
from .noise import NoiseAlong, hessian_noise_scale, noise_along
from .product import product_trace
from .results import Density, Eigenpairs, Estimate
from .sharpness import SharpnessProbe
from .sums import effective_dimension, log_determinant, spectral_sum, stability_ratio
from .trace import frobenius_norm, trace

__all__ = [
    "ConvergenceWarning",
    "Density",
    "Eigenpairs",
    "Estimate",
    "NoiseAlong",
    "NoiseWarning",
    "SharpnessProbe",
    "batch_sharpness",
    "directional_sharpness",
    "effective_dimension",
    "frobenius_norm",
    "hessian_noise_scale",
    "log_determinant",
    "noise_along",
    "product_trace",
    "spectral_density",
    "spectral_sum",
    "stability_ratio",
    "top_eigenpairs",
    "trace",
]
