"""From the best pairs found to what is returned, with what has to be said of them."""

from __future__ import annotations

import warnings

import torch

from ._pairs import BestPairs, Goal
from ._problem import Problem
from .results import Eigenpairs

__all__ = ["ConvergenceWarning", "NoiseWarning", "finished"]

# Residuals this near to the rounding of products are made from products, not by the
# recurrence: the errors of a vector's entries add up there, in the recurrence they do
# not show. In halves they are 10 to 40 times as large.
_NEAR = 1e3


class ConvergenceWarning(RuntimeWarning):
    """A solver ended before it reached the tolerance, or could not be sure."""


class NoiseWarning(RuntimeWarning):
    """Products are less symmetric than rounding explains."""


def finished(
    problem: Problem,
    goal: Goal,
    best: BestPairs,
    others: int = 0,
    *,
    is_quiet: bool = False,
) -> Eigenpairs:
    """The result, its residuals measured where they need be; warns if it must.

    `others` are products that were made of another matrix. With `is_quiet` it is no
    surprise that not all is converged.
    """
    if _needs_products(problem, goal, best):
        best.measure(problem.multiply)
    elif problem.is_rounded and goal.basis_dtype and not best.is_measured:
        best.loosen(torch.finfo(goal.basis_dtype).eps * best.scale)
    if best.noise > problem.allowed_noise:
        warnings.warn(_noise_text(problem, best), NoiseWarning, stacklevel=3)
    if not best.is_converged and not is_quiet:
        warnings.warn(_text(problem, goal, best), ConvergenceWarning, stacklevel=3)
    unit = problem.unit
    return Eigenpairs(
        values=_wrapped([unit * value for value in best.values], problem),
        vectors=torch.stack(best.vectors),
        residuals=_wrapped([unit * residual for residual in best.residuals], problem),
        errors=_wrapped([unit * error for error in best.errors], problem),
        products=problem.products + others,
        converged=best.is_converged,
        upper=unit * best.upper,
        noise=best.noise,
    )


def _wrapped(numbers: list[float], problem: Problem) -> torch.Tensor:
    return torch.tensor(numbers, dtype=problem.dtype, device="cpu")


def _needs_products(problem: Problem, goal: Goal, best: BestPairs) -> bool:
    if best.is_measured or problem.asked + len(best.vectors) > problem.limit:
        return False
    if problem.is_half or problem.is_rounded:
        return True
    eps = torch.finfo(problem.dtype).eps
    least = min(goal.tolerance(value, best.scale) for value in best.values)
    return least <= _NEAR * max(eps, best.noise) * best.scale and best.scale > 0


def _noise_text(problem: Problem, best: BestPairs) -> str:
    return (
        f"<u, A v> and <A u, v> of {problem.name} differ by {best.noise:.1e} of its "
        f"norm; rounding explains {problem.allowed_noise:.0e}. What is below that "
        "share of the norm means nothing, residuals too. Look at what makes products "
        "so: lower precisions, random numbers, backward passes of your own."
    )


def _text(problem: Problem, goal: Goal, best: BestPairs) -> str:
    worst = max(
        residual / max(abs(value), 1e-300)
        for value, residual in zip(best.values, best.residuals, strict=True)
    )
    lacking = goal.k - len(best.values)
    missing = f"; {lacking} missing" if lacking else ""
    stopped = (
        f"top_eigenpairs stopped after {problem.products} products: the largest "
        f"residual is {worst:.2g} of its value, rtol={goal.rtol:g}{missing}"
    )
    is_limit = best.is_measured and not problem.is_rounded
    if is_limit and not best.are_within() and not lacking and best.is_sure:
        precision = "half precision" if problem.is_half else problem.dtype
        return (
            f"{stopped}. That is what rounding leaves of the products ({precision}): "
            f"raise rtol to {2 * worst:.1g}, or make the products more precise."
        )
    if best.are_within():
        stopped += (
            f", and nothing beyond {problem.unit * best.upper:.4g} was missed with "
            f"probability {1 - goal.miss:g}; that is too far to be sure"
        )
    other = ", or leave out basis_dtype" if problem.is_rounded else ""
    return f"{stopped}. Raise max_products, or rtol{other}."
