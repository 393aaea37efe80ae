"""Trace and Frobenius norm, estimated with an honest standard error."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.vector import project_out
from ._problem import Problem
from .results import Estimate

__all__ = ["frobenius_norm", "trace"]

_BASIS_BYTES = 1 << 30
_SHARE_EXACT = 3  # one product in so many goes into the subspace treated exactly


def trace(H: Any, products: int = 100, seed: int = 0) -> Estimate:
    """The sum of the eigenvalues.

    A third of the products span a Krylov space, in which the trace is exact; there lie
    the outlying eigenvalues, which make nearly all of the variance. The others are
    independent random directions in its complement, each times its dimension, so the
    estimate is unbiased and the standard error is that of their mean. Multiples of the
    identity add no variance. Exact, from P products, if `products` >= P.

    Args:
        H: Anything symmetric with `.shape` and `@`.
        products: How many matrix-vector products to spend, at least 3; those by which
            an operator looks at itself come on top.
        seed: Of the random vectors; global generators are not touched.

    Raises:
        ValueError: Fewer than 3 products (unless P is smaller), or a matrix that is not
            symmetric.

    Example:
        >>> import torch
        >>> trace(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        Estimate(value=7.0, standard_error=0.0, products=3)

    Source: Hutchinson (1990); Meyer, Musco, Musco, Woodruff (2021), "Hutch++", for the
    split; Chen and Hallman (2023), arXiv:2205.01736, for the Krylov space.
    """
    return _estimate(Problem(H, seed), products, is_squared=False)


def frobenius_norm(H: Any, products: int = 100, seed: int = 0) -> Estimate:
    """The square root of the sum of the squared eigenvalues.

    Made as `trace` makes the trace of H^2, which takes one product a vector: |H r|^2.
    The standard error follows by the delta method; the square root biases the value
    down by standard_error^2 / (2 value).

    Args:
        H: Anything symmetric with `.shape` and `@`.
        products: How many matrix-vector products to spend, at least 3; those by which
            an operator looks at itself come on top.
        seed: Of the random vectors; global generators are not touched.

    Raises:
        ValueError: Fewer than 3 products (unless P is smaller), or a matrix that is not
            symmetric.

    Example:
        >>> import torch
        >>> frobenius_norm(torch.diag(torch.tensor([3.0, 4.0])))
        Estimate(value=5.0, standard_error=0.0, products=2)
    """
    square = _estimate(Problem(H, seed), products, is_squared=True)
    value = math.sqrt(square.value)
    error = square.standard_error / (2 * value) if value else 0.0
    return Estimate(value, error, square.products)


def _estimate(problem: Problem, products: int, is_squared: bool) -> Estimate:
    if products >= problem.size:
        value = _exact(problem, is_squared)
        return Estimate(value, 0.0, problem.products)
    if products < 3:
        raise ValueError(
            "An estimate with a standard error needs at least 3 products, got "
            f"{products}."
        )
    room = _BASIS_BYTES // (problem.size * problem.dtype.itemsize)
    basis, exact = _krylov(problem, min(products // _SHARE_EXACT, room), is_squared)
    samples = []
    dimensions = problem.size - len(basis)
    while problem.asked < products:
        u = problem.normal()
        u /= _project(u, basis)
        samples.append(dimensions * _form(problem, u, is_squared)[0])
    drawn = torch.tensor(samples, dtype=torch.float64, device="cpu")
    error = float(drawn.std() / len(samples) ** 0.5)
    return Estimate(exact + float(drawn.mean()), error, problem.products)


def _exact(problem: Problem, is_squared: bool) -> float:
    """The trace of the matrix or its square, from products with all unit vectors."""
    total, images = 0.0, []
    for e in _unit_vectors(problem):
        value, w = _form(problem, e, is_squared)
        total += value
        images.append(w)
    problem.look_at_rows(torch.stack(images))
    return total


def _form(problem: Problem, v: Tensor, is_squared: bool) -> tuple[float, Tensor]:
    """<v, H v>, or <v, H^2 v>, with H v."""
    w = problem.multiply(v)
    value = float(torch.linalg.vecdot(w.double(), (w if is_squared else v).double()))
    if not math.isfinite(value):
        raise ValueError(
            f"Product {problem.products} with the matrix is not finite. Check the "
            "parameters and the batch."
        )
    return value, w


def _krylov(
    problem: Problem, steps: int, is_squared: bool
) -> tuple[list[Tensor], float]:
    """An orthonormal basis of a Krylov space, and the trace of the matrix in it."""
    basis: list[Tensor] = []
    total = 0.0
    v = problem.normal()
    for _ in range(steps):
        value, w = _form(problem, v, is_squared)
        total += value
        basis.append(v)
        length = float(torch.linalg.vector_norm(w))
        rest = _project(w, basis)
        if (
            rest <= 100 * torch.finfo(w.dtype).eps * length
        ):  # the space is invariant: go on from another
            w = problem.normal()
            rest = _project(w, basis)
        v = w.div_(rest)
    return basis, total


def _project(w: Tensor, basis: list[Tensor]) -> float:
    """Remove from w its part in the space of the basis; the norm of what is left."""
    project_out(w, basis)
    project_out(w, basis)
    return float(torch.linalg.vector_norm(w))


def _unit_vectors(problem: Problem):
    for i in range(problem.size):
        e = torch.zeros(problem.size, dtype=problem.dtype, device=problem.device)
        e[i] = 1
        yield e
