"""The sharpness along a training run, each time from the last eigenvectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature import Hessian, LossHessian, Noise
from ..curvature._ranks import ranks_of
from ..curvature._shards import shards_of
from ._certified import certified_pair
from ._finish import finished
from ._lanczos_pairs import lanczos_pairs
from ._pairs import BestPairs, Goal
from ._problem import Problem
from ._start import cold_start
from ._warm import Course, followed_pairs
from .eigenpairs import (
    Criterion,
    Precision,
    check_arguments,
    check_basis,
    check_criterion,
    check_precision,
)
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

    `sharpness(batch)` evaluates the loss by itself. `sharpness.backward(losses)`, in
    place of `losses.mean().backward()`, takes the graph of the training step: the
    gradient that the step needs is the one that is differentiated further, and nothing
    is evaluated twice. `sharpness(loss=losses)` does that without touching `.grad`.

    That the loss has one symmetric Hessian is looked at as `Hessian` does, in the first
    call, in every 50th, and when the kind of data or a module's mode is another; the
    calls between look at the symmetry of their products alone (some 0.2 gradients on an
    MLP). Of a step's own graph that is all that can be looked at.

    Attributes:
        evaluated: The loss that the last call with a batch met.

    Args:
        model: The model.
        loss: `loss(model, batch)`, a scalar: the mean over the batch. Not needed where
            all calls are given losses.
        k: How many eigenpairs.
        rtol: Tolerance of the residuals, as in `top_eigenpairs`.
        cold_every: Calls between cold starts; 1 makes all of them cold.
        max_products: Where a call gives up, with a warning.
        count: Number of samples of a batch, as for `Hessian`.
        seed: Of the random parts; global generators are not touched.
        miss: The probability with which cold calls may miss a larger eigenvalue, as in
            `top_eigenpairs`.
        criterion: "residual", or "value": then `rtol` holds for the values. A cold call
            is as in `top_eigenpairs`. A warm one makes k products where the value's
            error, residual^2 over the distance to the runner-up, allows it, and the
            runner-up cannot have overtaken if it moves no faster than what was seen; it
            is multiplied in every third call at the least.
        budget: Products that a warm call may make, at least k + 1. What it does not
            bring within `rtol` the next calls do; `converged` says so, no warning.
        process_group: The ranks whose batches are meant, as for `Hessian`.
        basis_dtype: What the basis of cold calls is kept in, as in `top_eigenpairs`.
        precision: "certified" finds with products in bfloat16 in cold calls with a
            batch, as in `top_eigenpairs`; for k = 1.

    Raises:
        ValueError: As `Hessian`, `LossHessian` and `top_eigenpairs`, at the call.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> def loss(model, x):
        ...     return model(x).square().mean()
        >>> sharpness = SharpnessProbe(model, loss)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> pairs = sharpness(x)
        >>> round(float(pairs.values[0]), 3)
        9.0

        In the training step, which needs no second evaluation:

        >>> pairs = sharpness.backward(model(x).square())
        >>> round(float(pairs.values[0]), 3), model.weight.grad is not None
        (9.0, True)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor] | None = None,
        k: int = 1,
        rtol: float = 1e-2,
        *,
        cold_every: int = 50,
        max_products: int = 200,
        count: Callable[[Any], int] | None = None,
        seed: int = 0,
        miss: float = 0.002,
        criterion: Criterion = "residual",
        budget: int | None = None,
        process_group: Any = None,
        basis_dtype: torch.dtype | None = None,
        precision: Precision = "exact",
    ) -> None:
        if cold_every < 1:
            raise ValueError(f"cold_every must be at least 1, got {cold_every}.")
        if budget is not None and budget <= k:
            raise ValueError(
                f"A budget must be at least k + 1 = {k + 1} products, one of them for "
                f"what may overtake, got {budget}."
            )
        check_criterion(criterion)
        check_precision(precision, k)
        self._model, self._loss, self._count = model, loss, count
        check_basis(basis_dtype, rtol)
        self._goal = Goal(k, "largest", rtol, miss, criterion, basis_dtype)
        self._max_products, self._budget = max_products, budget
        self._cold_every, self._seed, self._precision = cold_every, seed, precision
        self._process_group = process_group
        self._calls = self._products = 0
        self._course = Course()
        self._followed: tuple[Any, ...] = ()  # the parameters that vectors are over
        self._noise: Noise | None = None
        self._checked: tuple[Any, ...] | None = None
        self._data: Any = None
        self.evaluated: Tensor | None = None

    def __call__(
        self, batch: Any = None, *, loss: Tensor | None = None, scale: float = 1.0
    ) -> Eigenpairs:
        """The eigenpairs on a batch (or several) at the present point.

        Args:
            batch: What the closure is given.
            loss: In its place the losses of samples, or their mean, with their graph,
                which is left as it is.
            scale: What these losses have been multiplied by.
        """
        if (batch is None) == (loss is None):
            raise ValueError("Pass either a batch or loss=, and not both.")
        if loss is not None:
            return self._pairs(self._of(loss, scale))
        if self._loss is None:
            raise ValueError(
                "The probe was made without a loss to evaluate on a batch. Pass it to "
                "SharpnessProbe(model, loss), or losses to this call: loss=losses."
            )
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
        try:
            pairs = self._pairs(operator)
        finally:
            self.evaluated = operator.evaluated
        self._noise, self._checked = operator.noise, kind
        self._data = None if kind[1] else batch
        return pairs

    def backward(self, losses: Tensor, *, scale: float = 1.0) -> Eigenpairs:
        """Run the backward pass of a training step, and return the eigenpairs.

        `.grad` is what `losses.mean().backward()` leaves, also if no eigenpairs can be
        had; bit for bit, but for layers whose gradient has another formula where it can
        be differentiated (LSTM, group norm: to rounding). Attention must have been
        computed within `fm.twice_differentiable()`. A GradientProbe reads the same
        pass: `probe.attach(losses)` before, `probe.collect()` after.

        Hooks run once, those of parameters (DistributedDataParallel's too), of modules
        and of activations, and have no part in eigenvalues; of activations those that
        were put there within `fm.twice_differentiable()`, as `retain_grad`: others,
        and those on nodes of the graph, PyTorch runs at every product. Hooks of modules
        and activations cost a backward pass of their own.

        Args:
            losses: The losses of samples, of which the mean counts, or that mean. Its
                graph is freed, as by any backward pass.
            scale: What they have been multiplied by, such as a GradScaler's factor.
                Eigenvalues are divided by it; `.grad` is that of the losses as given.

        Raises:
            ValueError: As `LossHessian` when it is made: `.grad` is untouched then. As
                its products, and as `top_eigenpairs`: then it is there.
        """
        operator = self._of(losses, scale)
        try:
            return self._pairs(operator)
        finally:
            operator.deliver()
            if not (losses._is_view() or losses.is_leaf):
                losses.detach_()

    def is_finite(self, losses: Tensor) -> bool:
        """Whether losses are finite, on all ranks that share the data: have curvature.

        Others are refused by `backward`. All of these ranks must ask.
        """
        is_finite = bool(losses.detach().isfinite().all())
        ranks = ranks_of(self._model, self._process_group, shards_of(self._model))
        return (
            is_finite if ranks is None else not ranks.any(not is_finite, losses.device)
        )

    def __repr__(self) -> str:
        calls, goal = self._calls, self._goal
        shown = f"{type(self._model).__name__}, k={goal.k}, rtol={goal.rtol:g}"
        cost = f", {self._products / calls:.3g} products each" if calls else ""
        return f"SharpnessProbe({shown}; {calls} calls{cost})"

    def state_dict(self, *, vectors: bool = False) -> dict[str, Any]:
        """What a run goes on with: when cold calls are due, and random parts.

        Args:
            vectors: keep the vectors that are followed too, k + 1 or more of the size
                of all parameters. Without them the next call is a cold one.
        """
        state: dict[str, Any] = {"calls": self._calls, "products": self._products}
        if vectors and self._course.vectors:
            state["course"] = dict(vars(self._course))
            state["followed"] = self._followed
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state; whether the loss has one Hessian is looked at anew."""
        self.reset()
        self._calls, self._products = state_dict["calls"], state_dict["products"]
        if "course" in state_dict:
            device = next(self._model.parameters()).device
            course = Course(**state_dict["course"])
            course.vectors = [v.to(device) for v in course.vectors]
            if course.challenger is not None:
                course.challenger = course.challenger.to(device)
            self._course, self._followed = course, tuple(state_dict["followed"])

    def reset(self) -> None:
        """Forget the vectors: the next call runs cold, and is checked."""
        self._course, self._checked = Course(), None

    def _of(self, losses: Tensor, scale: float) -> LossHessian:
        is_known = self._checked is not None
        return LossHessian(
            self._model,
            losses,
            scale=scale,
            functions_known=is_known,
            process_group=self._process_group,
        )

    def _pairs(self, operator: Hessian | LossHessian) -> Eigenpairs:
        goal, is_cold = self._goal, self._is_cold(operator)
        limit, is_limited = self._max_products, False
        if self._budget is not None and not is_cold:
            limit, is_limited = min(self._budget, limit), True
        size = operator.shape[0]
        check_arguments(
            size, goal.k, goal.which, "lanczos", goal.rtol, limit, goal.miss
        )
        problem = Problem(operator, self._seed + self._calls, limit, spare=goal.k)
        rough = None
        if is_cold and self._precision != "exact" and isinstance(operator, Hessian):
            rough = Problem(operator.rough(), self._seed + self._calls)
        best = self._best(problem, rough, is_cold=is_cold)
        others = 0 if rough is None else rough.products
        pairs = finished(problem, goal, best, others, is_quiet=is_limited)
        self._course = self._course.after(goal, best, is_cold=is_cold)
        self._followed = operator.names, operator.sizes
        self._calls += 1
        self._products += pairs.products
        return pairs

    def _is_cold(self, operator: Hessian | LossHessian) -> bool:
        """Whether it is time to start anew, or there is nothing to follow."""
        return (
            self._calls % self._cold_every == 0
            or len(self._course.vectors) < self._goal.k
            or self._followed != (operator.names, operator.sizes)
        )

    def _best(
        self, problem: Problem, rough: Problem | None, *, is_cold: bool
    ) -> BestPairs:
        if not is_cold:
            return followed_pairs(problem, self._goal, self._course)
        if rough is not None:
            return certified_pair(problem, rough, self._goal, with_challenger=True)
        problem.is_rounded = self._goal.basis_dtype is not None
        start = cold_start(problem)
        return lanczos_pairs(
            problem, self._goal, start, is_cold=True, with_challenger=True
        )

    def _kind(self, batch: Any) -> tuple[Any, ...]:
        """What is checked anew when it is another: not the values of batches."""
        modes = [module.training for module in self._model.modules()]
        return type(batch), isinstance(batch, Tensor | Mapping | tuple | list), modes
