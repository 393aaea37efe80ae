"""What a symmetric matrix known by its products tells: eigenvalues, trace, density.

Public: `eigenpairs`, `blocks` (layer by layer), `sharpness` (along a run), `trace`,
`sums`, `product`, `noise`, `density`, `along` (the steps of training), `results`.

    matrix        _problem: what solvers ask of it; _start: where they begin
    Lanczos       _lanczos_run, _basis, _bound: one run, and what it cannot have missed
    eigenpairs    _pairs, _lanczos_pairs, _power, _certified, _finish
    along a run   _warm, _space: pairs followed from matrix to matrix
    estimates     _quadrature, _spectral_sum, _xtrace, _student
"""

from .along import batch_sharpness, directional_sharpness
from .blocks import block_eigenpairs
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
    "block_eigenpairs",
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
