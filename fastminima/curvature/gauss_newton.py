"""The generalised Gauss-Newton matrix: curvature of the loss through outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._graph import Graph, Parts, check_graph, check_mean, combine, differentiate
from ._mean import MeanOperator
from ._scale import norm

__all__ = ["GaussNewton"]


class GaussNewton(MeanOperator):
    """G = J^T (d^2 loss / d outputs^2) J over the data, J = d outputs / d theta.

    Positive semi-definite for a loss convex in the outputs, and then the Fisher matrix
    of softmax cross-entropy and squared losses. A product is J v (the vector-Jacobian
    product differentiated by its vector), the loss's own Hessian, and J^T: no second
    derivative of the model is formed.

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
        return _OutputsGraph(roots, self._layout.parameters)


class _OutputsGraph(Graph):
    """Predictions, the loss's gradient by them, and J^T u as a function of u."""

    def __init__(
        self, roots: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
    ) -> None:
        self._predictions, self._leaf, loss = roots
        self._parameters = parameters
        (slope,) = differentiate([loss], [self._leaf], [torch.ones_like(loss)])
        if slope is None:
            raise ValueError(
                "loss(predictions, batch) does not use its predictions: its derivative "
                "by them is missing. Compute the loss from the first argument."
            )
        self._slope = slope
        self._cotangent = torch.zeros_like(self._predictions, requires_grad=True)
        self._pulled_back = differentiate(
            [self._predictions], parameters, [self._cotangent]
        )
        super().__init__(roots, self._pulled_back)

    def product(self, parts: list[Tensor]) -> Parts:
        (pushed,) = combine(self._pulled_back, [self._cotangent], parts)
        if pushed is None:
            return [None] * len(self._parameters)
        (curved,) = combine([self._slope], [self._leaf], [pushed])
        if curved is None:
            return [None] * len(self._parameters)
        return combine([self._predictions], self._parameters, [curved])

    def gradient(self) -> Parts:
        return combine([self._predictions], self._parameters, [self._slope.detach()])
