"""The vectors that runs start from, and how random they are."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..curvature._scale import length, ordinary
from ._problem import Problem

__all__ = [
    "Start",
    "cold_start",
    "overlap",
    "random_start",
    "unit_rows",
    "warm_start",
]

# The length of the random part beside a unit gradient. What a bound can say grows with
# it, and no more products are needed than with less: docs/curvature.md has the numbers.
_COLD = 30.0
# Beside vectors that are given it is there only so that the space leaves theirs; what
# they do not show is searched from a random vector of its own.
_WARM = 0.1


class Start(NamedTuple):
    """A vector d + r, d fixed before the Gaussian r was drawn.

    Attributes:
        vector: d + r, of any length.
        deviation: Standard deviation of each entry of r.
    """

    vector: Float[Tensor, " params"]
    deviation: float


def random_start(problem: Problem) -> Start:
    """Nothing but a random direction."""
    return Start(problem.gaussian(), 1.0)


def cold_start(problem: Problem) -> Start:
    """The direction of the gradient, where there is one, with a random part."""
    gradient = problem.gradient()
    if gradient is None:
        return random_start(problem)
    return _with_random(problem, gradient, _COLD)


def warm_start(problem: Problem, start: Tensor) -> Start:
    """The sum of some directions [j, P], or one [P], with a random part.

    Raises:
        ValueError: Vectors of another size, zero, or not finite.
    """
    rows = unit_rows(problem, start)
    # The vectors may have been made from the same seed; the random part must not be.
    problem.mix(rows)
    return _with_random(problem, rows.sum(dim=0), _WARM)


def unit_rows(problem: Problem, start: Tensor) -> Float[Tensor, "vectors params"]:
    """The vectors that were given as a start, each of length one.

    Raises:
        ValueError: Vectors of another size, zero, or not finite.
    """
    rows = start.detach().reshape(-1, start.shape[-1] if start.dim() else 1)
    if start.dim() not in (1, 2) or rows.shape[1] != problem.size or len(rows) == 0:
        raise ValueError(
            f"start must be vectors [j, {problem.size}], got {tuple(start.shape)}."
        )
    rows, _ = ordinary(rows)
    norms = torch.stack([length(row) for row in rows])
    if not bool(torch.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError(
            "start must hold finite vectors other than zero, got norms "
            f"{norms.tolist()}."
        )
    return (rows / norms.to(rows)[:, None]).to(problem.device, problem.dtype)


def overlap(deviation: float, miss: float) -> float:
    """What a unit start has along a fixed unit vector, but with probability `miss`.

    <start, x> is a fixed number d plus a normal one with this `deviation`. By
    Anderson's inequality that is small with the highest probability if d = 0: so what
    is fixed, such as the gradient, can only help, whatever it is.

    Source: Anderson (1955), Proc. Amer. Math. Soc. 6(2).
    """
    return NormalDist().inv_cdf((1 + miss) / 2) * deviation if miss < 1 else 0.0


def _with_random(problem: Problem, directions: Tensor, size: float) -> Start:
    deviation = size / problem.size**0.5
    return Start(directions.add_(problem.gaussian(), alpha=deviation), deviation)
