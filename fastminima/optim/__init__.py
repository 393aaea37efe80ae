"""Optimizers and schedules built on the three factors."""

from .congregation import Congregation
from .cyclic import CyclicRatio
from .langevin import Langevin
from .noise_scale import NoiseScaleBatchSize
from .sampler import BatchSizeSampler
from .svag import SVAG

__all__ = [
    "SVAG",
    "BatchSizeSampler",
    "Congregation",
    "CyclicRatio",
    "Langevin",
    "NoiseScaleBatchSize",
]
