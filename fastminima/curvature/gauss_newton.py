"""The generalised Gauss-Newton matrix: curvature of the loss through outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._compared import ComparedOperator
from ._graph import (
    GradientGraph,
    Graph,
    Parts,
    check_graph,
    check_mean,
    combine,
    differentiate,
    picked,
    spread,
)
from ._scale import norm
from .rop import ClosedForm, EitherGraph

__all__ = ["GaussNewton"]


class GaussNewton(ComparedOperator):
    """G = J^T (d^2 loss / d outputs^2) J over the data, J = d outputs / d theta.

    Positive semi-definite for a loss convex in the outputs, and then the Fisher matrix
    of softmax cross-entropy and squared losses. A product is J v (the vector-Jacobian
    product differentiated by its vector), the loss's own Hessian, and J^T: no second
    derivative of the model is formed. The loss's own Hessian is in closed form where
    the nodes of its graph say that it is cross-entropy, squared error or another sum of
    functions of one prediction, whatever weighs and adds up their terms, and by double
    backward otherwise. The first product is made in both ways.

    Args:
        model: The model; its parameters that require grad are the variables.
        outputs: `outputs(model, batch)`, the predictions, one tensor.
        loss: `loss(predictions, batch)`, a scalar: the mean over the batch.
        data: One batch or a re-iterable of batches, as for `Hessian`.
        count: Number of samples of a batch; the leading size of its tensors if None.
        process_group: The ranks that have the data between them: "world" or a group.
            If None, those that train the model together under `DistributedDataParallel`
            or `fully_shard`, else this one alone. All must ask for the same products.

    Raises:
        ValueError: As `Hessian`, and for predictions that are not one tensor with a
            graph.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> def squared(predictions, batch):
        ...     return 0.5 * predictions.square().mean()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> G = GaussNewton(model, lambda model, x: model(x), squared, x)
        >>> G @ torch.tensor([2.0, 2.0])
        tensor([1., 9.])

    Source: Schraudolph (2002), "Fast curvature matrix-vector products for second-order
    gradient descent".
    """

    def __init__(
        self,
        model: nn.Module,
        outputs: Callable[[Any, Any], Tensor],
        loss: Callable[[Any, Any], Tensor],
        data: Any,
        count: Callable[[Any], int] | None = None,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__(model, (outputs, loss), data, count, process_group)
        self._outputs = outputs
        self._loss = loss
        self._is_closed = True

    @property
    def _closure(self) -> str:
        return "outputs(model, batch)"

    def _evaluate(self, batch: Any) -> tuple[Tensor, ...]:
        predictions = self._ask(self._outputs, self._model, batch)
        if not isinstance(predictions, Tensor):
            raise ValueError(
                "outputs(model, batch) must return one tensor of predictions, got "
                f"{type(predictions).__name__}. Return e.g. its .logits."
            )
        check_graph(predictions, "outputs(model, batch)")
        leaf = predictions.detach().requires_grad_()
        loss = self._ask(self._loss, leaf, batch)
        return predictions, leaf, check_mean(loss, "loss(predictions, batch)")

    def _differenced(self, roots: tuple[Tensor, ...]) -> Tensor:
        return roots[0]

    def _by_difference(
        self, batch: Any, roots: tuple[Tensor, ...], difference: Tensor
    ) -> Tensor:
        outputs, size = roots[0].detach(), norm(difference.reshape(-1))
        if not size:
            return torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        length = max(norm(outputs.reshape(-1).double()), 1.0)
        step = torch.finfo(outputs.dtype).eps ** (1 / 3) * length / size
        moved = (step * difference).to(outputs)
        ends = [self._slope_by(outputs + s * moved, batch) for s in (1, -1)]
        curved = (ends[0] - ends[1]) / (2 * step)
        return self._layout.join(combine(roots[:1], self._layout.parameters, [curved]))

    def _slope_by(self, outputs: Tensor, batch: Any) -> Tensor:
        """The loss's gradient by the outputs."""
        leaf = outputs.detach().requires_grad_()
        loss = check_mean(self._ask(self._loss, leaf, batch))
        (slope,) = combine([loss], [leaf], [torch.ones_like(loss)])
        return torch.zeros_like(leaf) if slope is None else slope

    def _make(self, roots: tuple[Tensor, ...]) -> Graph:
        parameters = self._layout.parameters
        return _OutputsGraph(roots, parameters, is_closed=self._goes_by_tangents)

    @property
    def _is_by_tangents(self) -> bool:
        return self._is_closed

    def _give_up_tangents(self) -> None:
        self._is_closed = False


class _OutputsGraph(Graph):
    """Predictions, the loss as a function of them, and J^T u as a function of u."""

    def __init__(
        self,
        roots: tuple[Tensor, ...],
        parameters: tuple[Tensor, ...],
        *,
        is_closed: bool,
    ) -> None:
        self._predictions, leaf, loss = roots
        self._parameters = parameters
        self._curvature = _curvature(loss, leaf, is_closed=is_closed)
        (slope,) = self._curvature.gradient()
        if slope is None:
            raise ValueError(
                "loss(predictions, batch) does not use its predictions: its derivative "
                "by them is missing. Compute the loss from the first argument."
            )
        self._slope = slope.detach()
        self._cotangent = torch.zeros_like(self._predictions, requires_grad=True)
        self._pulled_back = differentiate(
            [self._predictions], parameters, [self._cotangent]
        )
        super().__init__(roots, self._pulled_back)

    def product(self, parts: list[Tensor], only: Sequence[int] | None = None) -> Parts:
        chosen = range(len(parts)) if only is None else only
        pulled, mine, v = picked(chosen, self._pulled_back, self._parameters, parts)
        (pushed,) = combine(pulled, [self._cotangent], v)
        if pushed is None:
            return [None] * len(self._parameters)
        (curved,) = self._curvature.product([pushed])
        if curved is None:
            return [None] * len(self._parameters)
        found = combine([self._predictions], mine, [curved])
        return found if only is None else spread(only, found, len(parts))

    def gradient(self) -> Parts:
        return combine([self._predictions], self._parameters, [self._slope])


def _curvature(loss: Tensor, leaf: Tensor, *, is_closed: bool) -> Graph:
    """The loss as a function of the predictions alone: products with its Hessian."""
    if is_closed:
        return EitherGraph((loss,), (leaf,), GradientGraph, ClosedForm)
    return GradientGraph((loss,), (leaf,))
