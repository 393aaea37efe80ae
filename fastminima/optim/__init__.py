"""Optimizers and schedules built on the three factors."""

from .cyclic import CyclicRatio
from .langevin import Langevin
from .sampler import BatchSizeSampler

__all__ = ["BatchSizeSampler", "CyclicRatio", "Langevin"]
