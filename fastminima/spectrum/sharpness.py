"""The sharpness along a training run, each time from the last eigenvectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import Hessian, Noise
from ._finish import finished
from ._lanczos_pairs import lanczos_pairs
from ._pairs import BestPairs, Goal
from ._problem import Problem
from ._start import cold_start
from ._warm import followed_pairs
from .eigenpairs import check_arguments, check_basis
from .results import Eigenpairs

__all__ = ["SharpnessProbe"]

_CHECK_EVERY = 50  # calls between looks at whether the loss has one Hessian


class SharpnessProbe:
    """The largest eigenvalues of the Hessian, step after step of a training run.

    The first call runs cold and is certified as `top_eigenpairs` is: `upper` says what
    no eigenvalue is beyond. Later ones follow the vectors of the last call, and the
    runner-up with them, which is multiplied further from call to call and has a fresh
    random part: k + 2 products where little has moved. So an eigenvalue that overtakes
    is noticed. That none is larger is not certain in these calls, which have an
    infinite `upper`, and in which `converged` speaks of residuals alone; every
    `cold_every`-th call is cold again.

    That the loss has one symmetric Hessian is looked at as `Hessian` does, in the first
    call, in every 50th, and when the kind of data or a module's mode is another; the
    calls between pay nothing for it but two dot products.

    Args:
        model: The model.
        loss: `loss(model, batch)`, a scalar: the mean over the batch.
        k: How many eigenpairs.
        rtol: Tolerance of the residuals, as in `top_eigenpairs`.
        cold_every: Calls between cold starts; 1 makes all of them cold.
        max_products: Where a call gives up, with a warning.
        count: Number of samples of a batch, as for `Hessian`.
        seed: Of the random parts; global generators are not touched.
        miss: The probability with which cold calls may miss a larger eigenvalue, as in
            `top_eigenpairs`.
        process_group: The ranks whose batches are meant, as for `Hessian`.
        basis_dtype: What the basis of cold calls is kept in, as in `top_eigenpairs`.

    Raises:
        ValueError: As `Hessian` and `top_eigenpairs`, at the call.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> def loss(model, x):
        ...     return model(x).square().mean()
        >>> sharpness = SharpnessProbe(model, loss)
        >>> pairs = sharpness(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> round(float(pairs.values[0]), 3)
        9.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        k: int = 1,
        rtol: float = 1e-2,
        *,
        cold_every: int = 50,
        max_products: int = 200,
        count: Callable[[Any], int] | None = None,
        seed: int = 0,
        miss: float = 0.002,
        process_group: Any = None,
        basis_dtype: torch.dtype | None = None,
    ) -> None:
        if cold_every < 1:
            raise ValueError(f"cold_every must be at least 1, got {cold_every}.")
        self._model, self._loss, self._count = model, loss, count
        check_basis(basis_dtype, rtol)
        self._goal = Goal(k, "largest", rtol, miss, basis_dtype)
        self._max_products = max_products
        self._cold_every, self._seed = cold_every, seed
        self._process_group = process_group
        self._calls = 0
        self._known: list[Tensor] = []
        self._challenger: Tensor | None = None
        self._noise: Noise | None = None
        self._checked: tuple[Any, ...] | None = None
        self._data: Any = None

    def __call__(self, batch: Any) -> Eigenpairs:
        """The eigenpairs on a batch (or several) at the present point."""
        operator = Hessian(
            self._model,
            self._loss,
            batch,
            self._count,
            process_group=self._process_group,
        )
        kind = self._kind(batch)
        is_known = kind == self._checked and (kind[1] or batch is self._data)
        if is_known and self._calls % _CHECK_EVERY:
            operator.trust(self._noise)
        problem = self._problem(operator)
        best = self._solve(problem)
        pairs = finished(problem, self._goal, best)
        self._known, self._challenger = best.vectors, best.challenger
        self._noise, self._checked = operator.noise, kind
        self._data = None if kind[1] else batch
        self._calls += 1
        return pairs

    def reset(self) -> None:
        """Forget the vectors: the next call runs cold, and is checked."""
        self._known, self._challenger, self._checked = [], None, None

    def _problem(self, operator: Hessian) -> Problem:
        goal, limit = self._goal, self._max_products
        size = operator.shape[0]
        check_arguments(
            size, goal.k, goal.which, "lanczos", goal.rtol, limit, goal.miss
        )
        return Problem(operator, self._seed + self._calls, limit, spare=goal.k)

    def _solve(self, problem: Problem) -> BestPairs:
        known, is_cold = self._known, self._calls % self._cold_every == 0
        if is_cold or len(known) < self._goal.k or len(known[0]) != problem.size:
            problem.is_rounded = self._goal.basis_dtype is not None
            start = cold_start(problem)
            return lanczos_pairs(
                problem, self._goal, start, is_cold=True, with_challenger=True
            )
        return followed_pairs(problem, self._goal, known, self._challenger)

    def _kind(self, batch: Any) -> tuple[Any, ...]:
        """What is checked anew when it is another: not the values of batches."""
        modes = [module.training for module in self._model.modules()]
        return type(batch), isinstance(batch, Tensor | Mapping | tuple | list), modes
