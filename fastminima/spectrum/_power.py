"""Eigenpairs by power iteration, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.vector import linear_combinations, power_step, project_out
from ._pairs import Found, Wanted
from ._problem import Problem

__all__ = ["power_pairs"]

_PATIENCE = 20  # steps in which the residual must have fallen, or the matrix is shifted


def power_pairs(
    problem: Problem, wanted: Wanted, start: Tensor, max_products: int
) -> Found:
    """The wanted eigenpairs, each with the earlier ones projected out."""
    found = Found(wanted)
    is_within = True
    while len(found.values) < wanted.k and problem.asked < max_products:
        is_within &= _one_pair(problem, wanted, found, start, max_products)
        start = problem.normal()
    found.is_converged = is_within and found.are_within()
    return found


def _one_pair(
    problem: Problem, wanted: Wanted, found: Found, start: Tensor, max_products: int
) -> bool:
    v = start.clone()
    for _ in range(2):
        project_out(v, found.vectors)
    v /= torch.linalg.vector_norm(v)
    shift, stalled = 0.0, _Stalled()
    strictness = 0.7 if wanted.k > 1 else 1.0  # combining pairs mixes their errors
    while True:
        w = problem.multiply(v)
        leak = project_out(w, found.vectors)
        following = torch.empty_like(v)
        value, residual, norm = power_step(w, v, shift, following).tolist()
        if not norm < float("inf"):
            raise ValueError(
                f"Product {problem.products} with the matrix is not finite. Check the "
                "parameters and the batch."
            )
        found.scale = max(found.scale, abs(value) + residual, norm - abs(shift))
        is_within = residual <= strictness * wanted.tolerance(value, found.scale)
        is_wrong = _is_wrong_end(value - shift, wanted.which) and value != 0.0
        if is_within and not is_wrong:
            break
        if problem.asked >= max_products:
            is_within = False
            break
        is_settled = is_wrong and residual <= 0.1 * abs(value)
        if is_settled or (shift == 0.0 and stalled.after(residual)):
            # The dominant eigenvalue has the other sign, or both signs dominate alike.
            shift = found.scale if wanted.which == "smallest" else -found.scale
            following = problem.normal() if is_settled else following
        project_out(following, found.vectors)
        v = following / torch.linalg.vector_norm(following)
    image = linear_combinations(
        w, found.vectors, torch.cat([leak.new_ones(1), leak])[:, None]
    )
    found.add([v], list(image.unbind()))
    return is_within


def _is_wrong_end(shifted: float, which: str) -> bool:
    return (which == "largest" and shifted < 0) or (which == "smallest" and shifted > 0)


class _Stalled:
    """Whether a residual has stopped falling."""

    def __init__(self) -> None:
        self._best, self._since = float("inf"), 0

    def after(self, residual: float) -> bool:
        if residual < 0.9 * self._best:
            self._best, self._since = residual, 0
        else:
            self._since += 1
        return self._since >= _PATIENCE
