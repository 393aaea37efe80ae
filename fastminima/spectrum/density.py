"""The density of the eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ._problem import Problem
from ._quadrature import gauss, recurrence
from .results import Density

__all__ = ["spectral_density"]

_GRID = 1024
_MARGIN = 6  # widths of the Gaussian beyond the outermost nodes


def spectral_density(
    H: Any,
    steps: int = 64,
    probes: int = 4,
    width: float | None = None,
    seed: int = 0,
) -> Density:
    """The eigenvalues of a symmetric matrix as a density that integrates to one.

    Each probe runs Lanczos from random signs: Ritz values and the squared first
    components of their coordinates are the nodes and weights of a quadrature of the
    spectrum, exact for polynomials of degree 2 * steps - 1 in the mean over probes.
    Every node is drawn as a Gaussian. Needs three vectors of memory: the basis is not
    kept, and what it loses in orthogonality only splits nodes without moving weight.

    Args:
        H: Anything symmetric with `.shape` and `@`.
        steps: Lanczos steps of a probe; resolution grows with it.
        probes: Independent probes; from two on their spread is the standard error.
        width: Standard deviation of the Gaussians; 1 % of the spectrum's spread if
            None.
        seed: Of the random vectors; global generators are not touched.

    Raises:
        ValueError: An argument that is not positive, a product that is not finite, or a
            matrix that is not symmetric.

    Example:
        >>> import torch
        >>> density = spectral_density(torch.eye(3), steps=2, probes=2)
        >>> round(float(torch.trapezoid(density.density, density.grid)), 6)
        1.0

    Source: Ghorbani, Krishnan, Xiao (2019), arXiv:1901.10159; Chen, Trogdon, Ubaru
    (2021), arXiv:2105.06595, for Lanczos without reorthogonalisation.
    """
    if steps < 1 or probes < 1:
        raise ValueError(
            f"steps and probes must be at least 1, got steps={steps}, probes={probes}."
        )
    if width is not None and not width > 0:
        raise ValueError(f"width must be positive, got {width}.")
    problem = Problem(H, seed)
    steps = min(steps, problem.size)
    start = 1 / math.sqrt(problem.size)
    runs = [
        recurrence(problem, problem.signs().mul_(start), steps) for _ in range(probes)
    ]
    whole, half = (
        _Quadrature.of(runs, problem, count) for count in (steps, (steps + 1) // 2)
    )
    unit_width = None if width is None else width / problem.unit
    return _density(whole, half, unit_width, problem)


class _Quadrature(NamedTuple):
    """Nodes and weights [probes, steps]."""

    nodes: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, runs: list[np.ndarray], problem: Problem, steps: int) -> _Quadrature:
        """Those of the first steps of some runs."""
        alpha, beta = np.stack(runs, axis=1)[:, :, :steps]
        eps = torch.finfo(problem.dtype).eps
        return cls(*gauss(alpha, beta, np.full(len(alpha), steps), eps))


def _density(
    whole: _Quadrature, half: _Quadrature, width: float | None, problem: Problem
) -> Density:
    low, high = float(whole.nodes.min()), float(whole.nodes.max())
    if width is None:
        size = max(abs(low), abs(high))
        width = 0.01 * max(high - low, 0.1 * size) or 0.01
    # Five points a width at least, whatever the width is of the spread.
    points = max(_GRID, math.ceil(5 * (high - low) / width) + 10 * _MARGIN)
    margin = _MARGIN * width
    grid = np.linspace(low - margin, high + margin, points)
    each = _drawn(whole, grid, width)
    spread = each.std(axis=0, ddof=1) if len(each) > 1 else np.full(points, np.nan)
    gap = np.abs(each.mean(axis=0) - _drawn(half, grid, width).mean(axis=0))
    if whole.nodes.shape[1] == 1:
        gap = np.full(points, np.nan)
    # The two cross here and there, where neither is right: so the largest nearby, as
    # far as the nodes of the shorter run are apart.
    apart = (high - low) / half.nodes.shape[1] / (grid[1] - grid[0])
    gap = _largest_nearby(gap, int(apart))
    unit = problem.unit

    def wrap(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    return Density(
        grid=wrap(grid * unit),
        density=wrap(each.mean(axis=0) / unit),
        standard_error=wrap(spread / math.sqrt(len(each)) / unit),
        nodes=wrap(whole.nodes * unit),
        weights=wrap(whole.weights),
        width=width * unit,
        products=problem.products,
        truncation=wrap(gap / unit),
    )


def _largest_nearby(values: np.ndarray, reach: int) -> np.ndarray:
    """The largest of the values at most so many places away."""
    largest = np.pad(values, reach, mode="edge")
    seen, window = 1, 2 * reach + 1
    while seen < window:
        step = min(seen, window - seen)
        largest = np.maximum(largest[:-step], largest[step:])
        seen += step
    return largest


def _drawn(quadrature: _Quadrature, grid: np.ndarray, width: float) -> np.ndarray:
    """Each probe's nodes as Gaussians on the grid [probes, grid]."""
    each = np.zeros((len(quadrature.nodes), len(grid)))
    for probe, (centres, shares) in enumerate(zip(*quadrature, strict=True)):
        z = (grid[:, None] - centres) / width
        each[probe] = np.exp(-0.5 * z**2) @ shares / (width * math.sqrt(2 * math.pi))
    return each
