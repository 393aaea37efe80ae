"""What is raised where numbers are not finite."""

from __future__ import annotations

__all__ = ["NotFiniteError"]


class NotFiniteError(ValueError):
    """A loss or a product with a matrix that is not finite: it has no curvature.

    A training run meets such steps (an overflow under a GradScaler, a loss that
    diverges), and goes on without the sharpness of that step.
    """
