"""The eigenvalues at one end of the spectrum, each with its residual."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ._lanczos_pairs import lanczos_pairs
from ._pairs import BestPairs, Goal
from ._power import power_pairs
from ._problem import Problem
from .results import Eigenpairs

__all__ = ["ConvergenceWarning", "top_eigenpairs"]

# The random part beside unit directions that are given. It must be there, or the Krylov
# space never leaves theirs; it hardly matters how large it is, see docs/curvature.md.
_RANDOM_PART = 0.1


class ConvergenceWarning(RuntimeWarning):
    """A solver ran out of products before it reached the tolerance."""


def top_eigenpairs(
    H: Any,
    k: int = 1,
    which: str = "largest",
    method: str = "lanczos",
    rtol: float = 1e-2,
    max_products: int = 200,
    start: Float[Tensor, "vectors params"] | Float[Tensor, " params"] | None = None,
    seed: int = 0,
) -> Eigenpairs:
    """The k eigenpairs of a symmetric matrix at the wanted end of its spectrum.

    Every value comes with its residual |H v - value v|: some eigenvalue lies within it.
    That no *other* eigenvalue belongs in the list is tested, not proven: every run
    starts with a random part, and for k > 1 `lanczos` searches the complement of what
    it found from a fresh random vector until the probability that an eigenvalue beyond
    the last one is missing is below 5 %. That also finds every copy of a multiple
    eigenvalue, of which one Krylov space sees only one.

    Args:
        H: Anything symmetric with `.shape` and `@`. A `.gradient` (the operators have
            it) is where a cold run starts, with a random part.
        k: How many.
        which: The "largest", "smallest" (the most negative) or largest in "magnitude".
        method: "lanczos", or "power" iteration as in older papers, which takes
            several times the products.
        rtol: Tolerance: residual <= rtol * max(|value|, 1e-3 |H|), |H| as estimated.
        max_products: Where to give up; a product by which a fresh operator compares
            itself comes on top.
        start: Approximate eigenvectors [j, P] to start from, such as the last ones.
        seed: Of the random vectors; global generators are not touched.

    Raises:
        ValueError: An argument out of its range, a product that is not finite, or a
            matrix that is not symmetric.

    Warns:
        ConvergenceWarning: Out of products; what there is is returned.

    Example:
        >>> import torch
        >>> pairs = top_eigenpairs(torch.diag(torch.tensor([1.0, 5.0, 5.0])), k=2)
        >>> [round(value, 3) for value in pairs.values.tolist()], pairs.converged
        ([5.0, 5.0], True)

    Source: Lanczos (1950); Kuczynski and Wozniakowski (1992), SIAM J. Matrix Anal.
    Appl. 13(4), theorem 4.2, for the probability.
    """
    problem = Problem(H, seed)
    _check(problem.size, k, which, method, rtol, max_products)
    goal = Goal(k, which, rtol)
    first = _start(problem, start)
    solve = {"lanczos": lanczos_pairs, "power": power_pairs}[method]
    best = solve(problem, goal, first, max_products)
    if not best.is_converged:
        _warn(best, goal, problem.products)
    return Eigenpairs(
        values=torch.tensor(best.values, dtype=problem.dtype, device="cpu"),
        vectors=torch.stack(best.vectors),
        residuals=torch.tensor(best.residuals, dtype=problem.dtype, device="cpu"),
        products=problem.products,
        converged=best.is_converged,
    )


def _check(
    size: int, k: int, which: str, method: str, rtol: float, max_products: int
) -> None:
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the matrix's size {size}, got {k}.")
    if which not in ("largest", "smallest", "magnitude"):
        raise ValueError(
            f"which must be 'largest', 'smallest' or 'magnitude', got {which!r}."
        )
    if method not in ("lanczos", "power"):
        raise ValueError(f"method must be 'lanczos' or 'power', got {method!r}.")
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}.")
    if max_products < k:
        raise ValueError(
            f"{k} eigenpairs need at least {k} products, got "
            f"max_products={max_products}."
        )


def _start(problem: Problem, start: Tensor | None) -> Tensor:
    """The first vector: what is given, or the gradient, with a random part."""
    random = problem.normal()
    if start is None:
        gradient = problem.gradient()
        return random if gradient is None else gradient.add_(random, alpha=_RANDOM_PART)
    rows = start.detach().to(problem.device, problem.dtype).reshape(-1, start.shape[-1])
    if start.dim() not in (1, 2) or rows.shape[1] != problem.size or len(rows) == 0:
        raise ValueError(
            f"start must be vectors [j, {problem.size}], got {tuple(start.shape)}."
        )
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool(torch.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError(
            "start must hold finite vectors other than zero, got norms "
            f"{norms.tolist()}."
        )
    return (rows / norms).sum(dim=0).add_(random, alpha=_RANDOM_PART)


def _warn(best: BestPairs, goal: Goal, products: int) -> None:
    worst = max(
        residual / max(abs(value), 1e-300)
        for value, residual in zip(best.values, best.residuals, strict=True)
    )
    lacking = goal.k - len(best.values)
    missing = f"; {lacking} missing" if lacking else ""
    warnings.warn(
        f"top_eigenpairs stopped after {products} products: the largest residual is "
        f"{worst:.2g} of its value, rtol={goal.rtol:g}{missing}. Raise "
        "max_products, or rtol.",
        ConvergenceWarning,
        stacklevel=3,
    )
