"""The eigenvalues at one end of the spectrum, each with its residual."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ._certified import certified_pair
from ._finish import ConvergenceWarning, NoiseWarning, finished
from ._lanczos_pairs import lanczos_pairs
from ._pairs import Goal
from ._power import power_pairs
from ._problem import Problem
from ._start import cold_start, warm_start
from .results import Eigenpairs

__all__ = [
    "ConvergenceWarning",
    "Criterion",
    "NoiseWarning",
    "Precision",
    "check_arguments",
    "check_basis",
    "check_criterion",
    "check_precision",
    "rough_problem",
    "top_eigenpairs",
]

Which = Literal["largest", "smallest", "magnitude"]
"""Which eigenvalues `top_eigenpairs` and `block_eigenpairs` find."""
Method = Literal["lanczos", "power"]
"""How `top_eigenpairs` finds them."""
Criterion = Literal["residual", "value"]
"""What the tolerance of eigenpairs is about."""
Precision = Literal["exact", "certified"]
"""In what arithmetic eigenpairs are found."""


def top_eigenpairs(
    H: Any,
    k: int = 1,
    which: Which = "largest",
    method: Method = "lanczos",
    rtol: float = 1e-2,
    max_products: int = 200,
    start: Float[Tensor, "vectors params"] | Float[Tensor, " params"] | None = None,
    seed: int = 0,
    *,
    miss: float = 0.002,
    criterion: Criterion = "residual",
    basis_dtype: torch.dtype | None = None,
    precision: Precision = "exact",
) -> Eigenpairs:
    """The k eigenpairs of a symmetric matrix at the wanted end of its spectrum.

    Every value comes with its residual |H v - value v|: some eigenvalue lies within it.
    That no *other* eigenvalue belongs in the list cannot be proven by products; it
    holds with a probability. Every eigenvector has some length along a random vector,
    but with probability `miss`; that much of it would have shown, had its eigenvalue
    been beyond `upper`. A run goes on until `upper` is near the value. Several pairs,
    those of a warm start, and those of the power method are searched for in the
    complement of what was found, from fresh random vectors. That also finds every copy
    of a multiple eigenvalue, of which one Krylov space sees only one.

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
            They are found sooner; what else there is is searched as ever.
        seed: Of the random vectors; global generators are not touched.
        miss: The probability with which an eigenvalue may be missed that lies beyond
            the last one by more than 10 * rtol (at most 10 %, or rtol) of it, and with
            which `upper` may be wrong. With 1 nothing is searched for: the pairs are
            eigenpairs, but not always those at the end, and copies are not found.
        criterion: What `rtol` is about. "residual", as above; or the "value": what may
            be missed lies beyond no value by more than rtol of it either, and of the
            one pair of a cold run nothing more is asked, so that value and `upper` are
            that near.
        basis_dtype: `torch.bfloat16` keeps all but two vectors of a basis in that: half
            of its memory, which counts from some ten million parameters. Residuals are
            those of products then, one more a pair, and some 0.2 % of |H| at least.
        precision: "certified" finds the pair with products in bfloat16, and certifies
            it with two or three exact ones: for k = 1, a `Hessian` or `GaussNewton`,
            and hardware that multiplies bfloat16 faster. `upper` then rests on how far
            the two kinds of products are apart along the vector found. All are counted
            in `products`, and in `max_products`, of which finding may take half.

    Raises:
        ValueError: An argument out of its range, a product that is not finite, or a
            matrix that is not symmetric.

    Warns:
        ConvergenceWarning: Out of products, or rounding leaves larger residuals than
            asked for; what there is is returned.
        NoiseWarning: Products are less symmetric than their precision explains.

    Example:
        >>> import torch
        >>> pairs = top_eigenpairs(torch.diag(torch.tensor([1.0, 5.0, 5.0])), k=2)
        >>> [round(value, 3) for value in pairs.values.tolist()], pairs.converged
        ([5.0, 5.0], True)

    Source: Lanczos (1950); van Dorsselaer, Hochstenbach, van der Vorst (2000), SIAM J.
    Matrix Anal. Appl. 22(3), for the probability.
    """
    is_rounded = basis_dtype is not None and method == "lanczos"
    problem = Problem(H, seed, max_products, spare=k, is_rounded=is_rounded)
    check_arguments(problem.size, k, which, method, rtol, max_products, miss)
    check_criterion(criterion)
    check_basis(basis_dtype, rtol)
    goal = Goal(k, which, rtol, miss, criterion, basis_dtype)
    if precision != "exact":
        rough = rough_problem(H, goal, precision, method, seed)
        if start is not None:
            raise ValueError('precision="certified" starts cold: leave out start.')
        best = certified_pair(problem, rough, goal)
        return finished(problem, goal, best, rough.products)
    first = cold_start(problem) if start is None else warm_start(problem, start)
    if method == "power":
        best = power_pairs(problem, goal, first)
    else:
        best = lanczos_pairs(problem, goal, first, is_cold=start is None)
    return finished(problem, goal, best)


def check_arguments(
    size: int,
    k: int,
    which: str,
    method: str,
    rtol: float,
    max_products: int,
    miss: float,
) -> None:
    """ValueError for what is out of its range."""
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and the matrix's size {size}, got {k}.")
    if which not in get_args(Which):
        raise ValueError(
            f"which must be 'largest', 'smallest' or 'magnitude', got {which!r}."
        )
    if method not in get_args(Method):
        raise ValueError(f"method must be 'lanczos' or 'power', got {method!r}.")
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}.")
    if max_products < k:
        raise ValueError(
            f"{k} eigenpairs need at least {k} products, got "
            f"max_products={max_products}."
        )
    if not 0 < miss <= 1:
        raise ValueError(f"miss is a probability, above 0 and at most 1, got {miss}.")


def check_criterion(criterion: str) -> None:
    """ValueError unless it is one that there is."""
    if criterion not in get_args(Criterion):
        raise ValueError(f"criterion must be 'residual' or 'value', got {criterion!r}.")


def check_basis(dtype: torch.dtype | None, rtol: float) -> None:
    """ValueError for what a basis cannot be kept in, or is too coarse for `rtol`."""
    if dtype not in (None, torch.bfloat16, torch.float32):
        raise ValueError(
            f"basis_dtype must be torch.bfloat16, torch.float32 or None, got {dtype}. "
            "(The entries of long unit vectors are too small for float16.)"
        )
    if dtype is not None and rtol < (least := torch.finfo(dtype).eps / 2):
        raise ValueError(
            f"A basis in {dtype} leaves residuals above rtol={rtol:g}. Raise rtol to "
            f"{least:.1g} at least, or leave out basis_dtype."
        )


def rough_problem(
    H: Any, goal: Goal, precision: str, method: str, seed: int
) -> Problem:
    """The same matrix with cheap products.

    Raises:
        ValueError: Another precision than "certified", or what it is not for.
    """
    check_precision(precision, goal.k)
    if method != "lanczos" or not hasattr(H, "rough"):
        raise ValueError(
            'precision="certified" is for a Hessian or GaussNewton by Lanczos; got '
            f"method={method!r}, {type(H).__name__}."
        )
    if H.dtype != torch.float32:
        raise ValueError(
            'precision="certified" finds in bfloat16 what float32 certifies; the '
            f"operator's vectors are {H.dtype}."
        )
    return Problem(H.rough(), seed)


def check_precision(precision: str, k: int) -> None:
    """ValueError unless it is one that there is, for so many pairs."""
    if precision not in get_args(Precision):
        raise ValueError(
            f"precision must be 'exact' or 'certified', got {precision!r}."
        )
    if precision == "certified" and k != 1:
        raise ValueError(f'precision="certified" is for one pair, got k={k}.')
