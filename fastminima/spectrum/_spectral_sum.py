"""The sum of a function of all eigenvalues, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from ..curvature._finite import NotFiniteError
from ._problem import Problem
from ._quadrature import KrylovSpace, eigensystems, gauss, orthogonalize, recurrence
from ._student import student_quantile
from .results import Estimate

__all__ = ["Function", "sum_over_spectrum"]

Function = Callable[[Float64[Tensor, " values"]], Tensor]

_BASIS_BYTES = 1 << 30
_FEWEST = 12  # products: four probes beside the first run
_PROBES = 4  # at least; also those before a small spread is believed
_SHARE_FIRST = 3  # one product in so many goes into the first run
_FIRST = 32  # its products where probes are made until they suffice
_STEPS = 32  # of a probe where there is no room for a first run
_SLOWEST = 0.75  # by which what a doubling of steps changes is taken to fall at least
_AGAINST = 0.1  # of the way, a move against the others that is not rounding
_SMALL = 0.2  # what truncation may be of the standard error that is expected


def sum_over_spectrum(
    problem: Problem,
    function: Function,
    products: int,
    rtol: float | None,
    steps: int | None,
) -> Estimate:
    """Tr f(A): exact from P products, or in a Krylov space and estimated beside it.

    The first run, from a random vector, makes the space, and says how many steps a
    probe needs. Without room for its vectors there is none.
    """
    _check(products, problem.size, rtol, steps)
    if products >= problem.size and (rtol is None or problem.size < _FEWEST):
        return _exact(problem, function)
    if products < _FEWEST:
        raise ValueError(
            f"An estimate with a standard error needs at least {_FEWEST} products, got "
            f"{products}."
        )
    products = min(products, problem.size)  # as many tell it exactly
    first = products // _SHARE_FIRST
    if rtol is not None:  # how many products there will be is not known yet
        first = min(first, _FIRST)
    most = (products - first) // _PROBES
    kept, within = [], _Part(0.0, 0.0)
    if _BASIS_BYTES // (problem.size * problem.dtype.itemsize) < first:
        steps = min(_STEPS, most) if steps is None else steps
    else:
        run = _FirstRun(problem, function, first)
        steps = run.enough_steps(most, rtol) if steps is None else steps
        kept, within = run.treat_exactly(steps)
    samples: list[np.ndarray] = []
    while problem.asked + steps <= products:
        samples.append(_probe(problem, function, kept, steps))
        if rtol is not None and _is_close(_estimate(problem, within, samples), rtol):
            break
    return _estimate(problem, within, samples)


class _Part(NamedTuple):
    """A number, and how far it may be off for want of steps."""

    value: float
    moved: float


def _check(products: int, size: int, rtol: float | None, steps: int | None) -> None:
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}.")
    if steps is None:
        return
    if not 2 <= steps <= size:
        raise ValueError(
            f"steps must be between 2 and the matrix's size {size}, got {steps}."
        )
    if 2 * _PROBES * steps > products:
        raise ValueError(
            f"{products} products do not suffice for {_PROBES} probes of {steps} "
            f"steps and a first run. Raise products to {2 * _PROBES * steps}, or lower "
            "steps."
        )


def _exact(problem: Problem, function: Function) -> Estimate:
    eye = torch.eye(problem.size, dtype=problem.dtype, device=problem.device)
    images = torch.stack([problem.multiply(e) for e in eye])
    if not bool(torch.isfinite(images).all()):
        raise NotFiniteError(
            f"One of {problem.products} products with the matrix is not finite. Check "
            "the parameters and the batch."
        )
    problem.look_at_rows(images)
    matrix = images.double().cpu().numpy()
    values = np.linalg.eigvalsh((matrix + matrix.T) / 2)
    total = float(_evaluated(problem, function, values).sum())
    return Estimate(total, 0.0, problem.products)


def _evaluated(problem: Problem, function: Function, values: np.ndarray) -> np.ndarray:
    """The function of numbers, of any shape, that are in units of the problem."""
    at = torch.from_numpy(values * problem.unit).flatten()
    found = torch.as_tensor(function(at), dtype=torch.float64, device="cpu")
    if found.shape != at.shape:
        raise ValueError(
            f"The function must map a tensor to one of its shape, got "
            f"{tuple(found.shape)} for {tuple(at.shape)}."
        )
    if not bool(torch.isfinite(found).all()):
        bad = int((~torch.isfinite(found)).nonzero()[0])
        raise ValueError(
            f"The function is {found[bad].item()} at {at[bad].item():.6g}, where "
            f"{problem.name} has about an eigenvalue. Pass one that is finite on the "
            "whole spectrum."
        )
    return found.numpy().reshape(values.shape)


class _FirstRun:
    """A Krylov space from a random vector, and f of the matrix within it."""

    def __init__(self, problem: Problem, function: Function, size: int) -> None:
        self._problem, self._function, self._size = problem, function, size
        self._space = KrylovSpace(problem)
        while self._space.size < size:
            self._space.extend()

    def enough_steps(self, most: int, rtol: float | None) -> int:
        """As many as make truncation small beside the error to be expected.

        By what the first vector sees of the spectrum; the whole run knows it better.
        """
        corners = self._corners()
        eps = torch.finfo(self._problem.dtype).eps
        inside, total = self._variances()
        # Of a random direction the variance is 2 |f(A) - mean|^2 / P^2.
        rest = 2 * max(total - inside, 0.01 * total)
        for steps in range(4, most, 2):
            scale = math.sqrt(rest * steps / (most * _PROBES))
            if rtol is not None:
                scale = max(scale, rtol * abs(corners[-1]) / 2)
            reached = corners[min(steps, self._size) - 1]
            moved = np.abs(corners[steps // 2 - 1 :] - reached).max()
            if moved <= _SMALL * scale + eps * abs(reached):
                return steps
        return most

    def treat_exactly(self, steps: int) -> tuple[list[Tensor], _Part]:
        """The first vectors and the trace of f(A) there; the last are for precision."""
        kept = max(self._size - max(steps // 2, 1), self._size // 2, 1)
        counts = np.arange(kept + (self._size - kept) // 4, self._size + 1)
        values, vectors = self._eigensystems(counts)
        found = _evaluated(self._problem, self._function, values)
        traces = np.einsum("cik,ck->c", vectors[:, :kept] ** 2, found)
        (value,), moved = _settled(traces[None])
        return self._space.basis[:kept], _Part(float(value), moved)

    def _corners(self) -> np.ndarray:
        """P times the form of f(A) in the first vector, by the number of steps."""
        numbers = self._space.numbers()
        return self._problem.size * _forms(self._problem, self._function, numbers, 1)

    def _eigensystems(self, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        alpha, beta = (
            np.broadcast_to(x, (len(counts), self._size)) for x in self._space.numbers()
        )
        return eigensystems(alpha, beta, counts)

    def _variances(self) -> tuple[float, float]:
        """|f(A) - mean|^2 of what the first half of the space holds, and of all."""
        (values,), (vectors,) = self._eigensystems(np.array([self._size]))
        found = _evaluated(self._problem, self._function, values)
        weights = vectors[0] ** 2
        mean = float(weights @ found)
        apart = (vectors * (found - mean)) @ vectors.T
        half = self._size // 2
        inside = float(np.square(apart[:half, :half]).sum())
        total = self._problem.size * float(weights @ (found - mean) ** 2)
        return inside, max(total, inside)


def _forms(
    problem: Problem,
    function: Function,
    run: tuple[np.ndarray, np.ndarray] | np.ndarray,
    fewest: int,
) -> np.ndarray:
    """The form of f(A) in a run's first vector, by the number of steps."""
    alpha, beta = run
    counts = np.arange(fewest, len(alpha) + 1)
    shape = (len(counts), len(alpha))
    values, weights = gauss(
        np.broadcast_to(alpha, shape),
        np.broadcast_to(beta, shape),
        counts,
        torch.finfo(problem.dtype).eps,
    )
    return (weights * _evaluated(problem, function, values)).sum(axis=1)


def _settled(each: np.ndarray) -> tuple[np.ndarray, float]:
    """What values by number of steps [runs, counts] come to, and how far it may be off.

    The counts are those from a quarter of the steps on. Where the mean over runs goes
    one way in the second half, the last value is taken. It is off by what that half has
    changed, if each doubling changes half as much as the one before, or less; if more,
    by what all further ones would change if they went on so. Where it goes to and fro,
    as nodes cross a jump of f, the mean over that half is taken, and how far it went.
    """
    half = each.shape[1] // 3
    values = each.mean(axis=0)
    later, last = values[half:], values[-1]
    moves = np.diff(later)
    width = float(later.max() - later.min())
    if min(moves.max(initial=0.0), -moves.min(initial=0.0)) > _AGAINST * width:
        middle = later.mean()
        return each[:, half:].mean(axis=1), float(np.abs(later - middle).max())
    moved = float(np.abs(later - last).max())
    earlier = float(abs(values[half] - values[0]))
    share = min(moved / earlier if earlier else 1.0, _SLOWEST)
    return each[:, -1], moved * max(share / (1 - share), 1.0)


def _probe(
    problem: Problem, function: Function, kept: list[Tensor], steps: int
) -> np.ndarray:
    """An unbiased estimate of the trace of f(A) in the complement of some vectors.

    By the number of steps, from a quarter of them on.
    """
    v = problem.normal()
    _, size = orthogonalize(v, kept)
    run = recurrence(problem, v.div_(size), steps)
    found = _forms(problem, function, run, max(steps // 4, 1))
    return (problem.size - len(kept)) * found


def _estimate(problem: Problem, within: _Part, samples: list[np.ndarray]) -> Estimate:
    values, moved = _settled(np.stack(samples))
    count = len(values)
    error = values.std(ddof=1) / math.sqrt(count) if count > 1 else math.inf
    mean = float(values.mean())
    rounding = problem.smallest * (abs(within.value) + abs(mean))
    return Estimate(
        within.value + mean,
        float(error),
        problem.products,
        count - 1,
        within.moved + moved + rounding,
    )


def _is_close(estimate: Estimate, rtol: float) -> bool:
    if estimate.degrees + 1 < _PROBES:
        return False
    half = student_quantile(estimate.degrees, 0.95) * estimate.standard_error
    return half + estimate.truncation <= rtol * abs(estimate.value)
