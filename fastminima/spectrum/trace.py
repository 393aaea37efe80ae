"""Trace and Frobenius norm, estimated with an honest standard error."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..curvature._finite import NotFiniteError
from ..curvature._scale import length
from ._problem import Problem
from ._quadrature import orthogonalize
from ._student import student_quantile
from ._xtrace import XTrace
from .results import Estimate

__all__ = ["frobenius_norm", "trace"]

_BASIS_BYTES = 1 << 30
_FIRST = 16  # products of the subspace where samples are drawn until they suffice
_FEWEST = 10  # random vectors before a small spread is believed
Method = Literal["krylov", "hutchinson", "xtrace"]
"""How `trace` estimates."""
_SHARE_EXACT = 3  # one product in so many goes into the subspace treated exactly


def trace(
    H: Any,
    products: int = 100,
    seed: int = 0,
    *,
    method: Method = "krylov",
    rtol: float | None = None,
) -> Estimate:
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
        method: "krylov" as above; "hutchinson", random directions alone, which keeps no
            vectors; or "xtrace", whose random vectors serve for both: it is better
            where eigenvalues fall off fast (1 / i^2, or few that are not zero, exact
            with two vectors more than their number), and worse where many are alike.
            It keeps as many vectors as products, 1 GiB at most, and needs 4 products.
        rtol: Stop sooner, once the interval that holds the value with 95 % reaches no
            further than this share of it, and there are ten random vectors.

    Raises:
        ValueError: Too few products (unless P is smaller), another method, an rtol that
            is not positive, or a matrix that is not symmetric.

    Example:
        >>> import torch
        >>> trace(torch.diag(torch.tensor([1.0, 2.0, 4.0])))
        Estimate(7 exactly; 3 products)

    Source: Hutchinson (1990); Meyer, Musco, Musco, Woodruff (2021), "Hutch++", for the
    split; Chen and Hallman (2023), arXiv:2205.01736, for the Krylov space; Epperly,
    Tropp, Webber (2024), SIAM J. Matrix Anal. Appl. 45(1), for XTrace.
    """
    if method not in get_args(Method):
        raise ValueError(
            f"method must be one of {', '.join(get_args(Method))}, got {method!r}."
        )
    problem = Problem(H, seed)
    if method == "xtrace":
        return _xtrace(problem, products, rtol)
    share = _SHARE_EXACT if method == "krylov" else math.inf
    return _estimate(problem, products, rtol, is_squared=False, share=share)


def frobenius_norm(
    H: Any, products: int = 100, seed: int = 0, *, rtol: float | None = None
) -> Estimate:
    """The square root of the sum of the squared eigenvalues.

    Made as `trace` makes the trace of H^2, which takes one product a vector: |H r|^2.
    The standard error follows by the delta method; the square root biases the value
    down by standard_error^2 / (2 value).

    Args:
        H: Anything symmetric with `.shape` and `@`.
        products: How many matrix-vector products to spend, at least 3; those by which
            an operator looks at itself come on top.
        seed: Of the random vectors; global generators are not touched.
        rtol: Stop sooner, once the interval that holds the value with 95 % reaches no
            further than this share of it, and there are ten random vectors.

    Raises:
        ValueError: Fewer than 3 products (unless P is smaller), an rtol that is not
            positive, or a matrix that is not symmetric.

    Example:
        >>> import torch
        >>> frobenius_norm(torch.diag(torch.tensor([3.0, 4.0])))
        Estimate(5 exactly; 2 products)
    """
    # A relative error of the square is twice that of its root.
    twice = None if rtol is None else 2 * rtol
    square = _estimate(Problem(H, seed), products, twice, is_squared=True)
    value = math.sqrt(square.value)
    error = square.standard_error / (2 * value) if value else 0.0
    return Estimate(value, error, square.products, square.degrees)


def _estimate(
    problem: Problem,
    products: int,
    rtol: float | None,
    *,
    is_squared: bool,
    share: float = _SHARE_EXACT,
) -> Estimate:
    if _is_exact(problem, products, rtol, fewest=3):
        value = _exact(problem, is_squared)
        return _scaled(problem, is_squared, value, 0.0, math.inf)
    room = _BASIS_BYTES // (problem.size * problem.dtype.itemsize)
    if rtol is not None:  # how many products there will be is not known yet
        products, room = min(products, problem.size), min(room, _FIRST)
    basis, exact = _krylov(problem, min(int(products / share), room), is_squared)
    samples: list[float] = []
    dimensions = problem.size - len(basis)
    while problem.asked < products:
        u = problem.normal()
        u /= orthogonalize(u, basis)[1]
        samples.append(dimensions * _form(problem, u, is_squared)[0])
        if rtol is not None and _is_close(exact, samples, rtol):
            break
    mean, error = _mean(samples)
    return _scaled(problem, is_squared, exact + mean, error, len(samples) - 1)


def _is_exact(problem: Problem, products: int, rtol: float | None, fewest: int) -> bool:
    """Whether to multiply all unit vectors; ValueError for too few products."""
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}.")
    if products >= problem.size and (rtol is None or problem.size < _FEWEST):
        return True
    if products < fewest:
        raise ValueError(
            f"An estimate with a standard error needs at least {fewest} products, got "
            f"{products}."
        )
    return False


def _xtrace(problem: Problem, products: int, rtol: float | None) -> Estimate:
    if _is_exact(problem, products, rtol, fewest=4):
        value = _exact(problem, is_squared=False)
        return _scaled(problem, False, value, 0.0, math.inf)
    run = XTrace(problem)
    room = _BASIS_BYTES // (2 * problem.size * problem.dtype.itemsize)
    most = min(products, problem.size) // 2
    while run.count < max(2, min(most, room)):
        run.extend()
        if rtol is not None and run.count >= _FEWEST:
            found = run.samples()
            half = student_quantile(found.count - 1, 0.95) * found.error
            if half <= rtol * abs(found.mean):
                break
    found = run.samples()
    return _scaled(problem, False, found.mean, found.error, found.count - 1)


def _mean(samples: list[float]) -> tuple[float, float]:
    drawn = torch.tensor(samples, dtype=torch.float64, device="cpu")
    return float(drawn.mean()), float(drawn.std() / len(samples) ** 0.5)


def _is_close(exact: float, samples: list[float], rtol: float) -> bool:
    if len(samples) < _FEWEST:
        return False
    mean, error = _mean(samples)
    half = student_quantile(len(samples) - 1, 0.95) * error
    return half <= rtol * abs(exact + mean)


def _scaled(
    problem: Problem, is_squared: bool, value: float, error: float, degrees: float
) -> Estimate:
    unit = problem.unit**2 if is_squared else problem.unit
    return Estimate(unit * value, unit * error, problem.products, degrees)


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
        raise NotFiniteError(
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
        before = float(length(w))
        _, rest = orthogonalize(w, basis)
        if (
            rest <= 100 * torch.finfo(w.dtype).eps * before
        ):  # the space is invariant: go on from another
            w = problem.normal()
            _, rest = orthogonalize(w, basis)
        v = w.div_(rest)
    return basis, total


def _unit_vectors(problem: Problem):
    for i in range(problem.size):
        e = torch.zeros(problem.size, dtype=problem.dtype, device=problem.device)
        e[i] = 1
        yield e
