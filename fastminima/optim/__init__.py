"""Optimizers and schedules built on the three factors."""

from .langevin import Langevin
from .sampler import BatchSizeSampler

__all__ = ["BatchSizeSampler", "Langevin"]
