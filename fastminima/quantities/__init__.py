"""Quantities of the paper, derived from an optimizer and gradient statistics."""

from .advice import BatchSizeAdvice, advise_batch_size
from .factors import ThreeFactors, noise_scale, takes_signs, three_factors

__all__ = [
    "BatchSizeAdvice",
    "ThreeFactors",
    "advise_batch_size",
    "noise_scale",
    "takes_signs",
    "three_factors",
]
