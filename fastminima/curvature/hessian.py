"""The Hessian of a mean loss, by differentiating its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._graph import Graph, Parts, check_mean, combine, differentiate
from ._mean import MeanOperator

__all__ = ["Hessian"]


class Hessian(MeanOperator):
    """H, the matrix of second derivatives of the mean loss over the data.

    `H @ v` is exact (double backward), for a vector [P] or each column of [P, k]. For
    one batch the gradient's graph is recorded once and kept, so that a product costs
    about 1.7 gradients instead of 2.7; delete the operator to free it. A parameter that
    the loss does not reach has zero rows. Attention needs no switch: it is recorded in
    a form that can be differentiated twice. The model is left as it was, also by an
    exception.

    The first product is made twice, from two evaluations, and the first pairs of
    products must be those of a symmetric matrix: see docs/curvature.md.

    Args:
        model: The model; its parameters that require grad are the variables.
        loss: `loss(model, batch)`, a scalar: the mean over the samples of the batch.
        data: One batch (a tensor, a mapping, a tuple or list that holds tensors) or any
            other re-iterable of batches.
        count: Number of samples of a batch; the leading size of its tensors if None.
        process_group: The ranks that have the data between them: "world" or a group.
            If None, those that train the model together under `DistributedDataParallel`
            or `fully_shard`, else this one alone. All must ask for the same products.

    Raises:
        ValueError: No trainable parameter; empty or one-shot data; a loss that is not a
            finite scalar with a graph; a vector of another shape, dtype or device. At a
            product: evaluations that are not the same twice; a matrix that is not
            symmetric; a node without a second derivative; batches whose weight is
            unclear; a closure that reads another model, calls backward or overwrites
            parameters; parameters that are not those of when the operator was made.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> def loss(model, x):
        ...     return model(x).square().mean()
        >>> H = Hessian(model, loss, torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> H @ torch.tensor([1.0, 1.0])
        tensor([1., 9.])

    Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian".
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        data: Any,
        count: Callable[[Any], int] | None = None,
        *,
        process_group: Any = None,
    ) -> None:
        super().__init__(model, (loss,), data, count, process_group)
        self._loss = loss

    @property
    def _first_order(self) -> int:
        return 0

    def _evaluate(self, batch: Any) -> tuple[Tensor, ...]:
        return (check_mean(self._ask(self._loss, self._model, batch)),)

    def _make(self, roots: tuple[Tensor, ...]) -> Graph:
        return _GradientGraph(roots, self._layout.parameters)


class _GradientGraph(Graph):
    """A gradient that can be differentiated again, any number of times."""

    def __init__(
        self, roots: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
    ) -> None:
        self._parameters = parameters
        one = torch.ones_like(roots[0])
        self._gradient = differentiate(roots, parameters, [one])
        super().__init__(roots, self._gradient)

    def product(self, parts: list[Tensor]) -> Parts:
        return combine(self._gradient, self._parameters, parts)

    def gradient(self) -> Parts:
        return self._gradient
