"""Optimizers built on the three factors."""

from .langevin import Langevin

__all__ = ["Langevin"]
