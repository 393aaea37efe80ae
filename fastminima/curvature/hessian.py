"""The Hessian of a mean loss, by differentiating its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._compared import ComparedOperator
from ._engines import EVALUATING, Engine, check_engine, chosen_engine
from ._evaluated import FiniteDifferences, ForwardOverReverse
from ._graph import GradientGraph, Graph, check_mean, differentiate
from ._guard import Buffers, buffers_of, put_copies
from ._random import RandomState
from ._trust import Suspicion
from .rop import EitherGraph

__all__ = ["Hessian"]


class Hessian(ComparedOperator):
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
        engine: How products are made, "auto" for what is the fastest: "tangents", the
            recorded graph is gone through forth and back with derivatives along the
            vector, where each node is known to have them, else as the next, which it is
            compared with at first; "cached", the graph of the gradient is kept and
            differentiated, the choice on a GPU; "recompute", it is recorded for each
            product, the choice where memory is short; "forward_over_reverse", the loss
            is evaluated with tangents and no graph of a gradient is made, which takes
            the least memory; "finite_differences" of gradients, to repeat what was done
            so: wrong near kinks, not looked at for symmetry, and with the changes of
            what the loss holds constant (`detach`, `no_grad`, `max_norm`).
        memory: Bytes that a kept graph may take; as many as are free beside it if None.
        step: Of finite differences: the length of the displacement over that of the
            parameters; the cube root of the machine precision if None.
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
        engine: Engine = "auto",
        memory: int | None = None,
        step: float | None = None,
    ) -> None:
        check_engine(engine, memory, step)
        super().__init__(model, (loss,), data, count, process_group)
        self._loss, self._memory, self._step = loss, memory, step
        self._asked = self._engine = engine
        self.evaluated: Tensor | None = None
        self._evaluated_again: Callable[[], tuple[Tensor, ...]] | None = None

    @property
    def engine(self) -> str:
        """How products are made; "auto" as long as none has been."""
        return self._engine

    def rough(self, dtype: torch.dtype = torch.bfloat16) -> Hessian:
        """The same matrix by cheaper products; ValueError for differences.

        A half precision would round them away.
        """
        if self._engine == "finite_differences":
            raise ValueError(
                f"Differences of gradients in {dtype} are mostly rounding: a Hessian "
                'with engine="finite_differences" has no cheaper products. Leave out '
                'precision="certified", or use engine="auto".'
            )
        return cast(Hessian, super().rough(dtype))

    @property
    def _first_order(self) -> int:
        return 0

    def _evaluate(self, batch: Any) -> tuple[Tensor, ...]:
        found = check_mean(self._ask(self._loss, self._model, batch))
        self.evaluated = found.detach()
        return (found,)

    def _record(self, batch: Any, weight: int) -> Graph:
        if self._engine in EVALUATING:
            state, buffers = self._generators(), buffers_of(self._model)
            put_copies(buffers)
            self._evaluated_again = functools.partial(
                self._again, batch, state, buffers
            )
        return super()._record(batch, weight)

    def _again(
        self, batch: Any, state: RandomState, buffers: Buffers
    ) -> tuple[Tensor, ...]:
        """The loss once more, from the random numbers and buffers of the first time."""
        state.restore()
        put_copies(buffers)
        return self._evaluate(batch)

    def _make(self, roots: tuple[Tensor, ...]) -> Graph:
        parameters, again = self._layout.parameters, self._evaluated_again
        if self._goes_by_tangents:
            return EitherGraph(roots, parameters, GradientGraph)
        if self._engine == "forward_over_reverse" and again is not None:
            return ForwardOverReverse(roots, parameters, self._model, again)
        if self._engine == "finite_differences" and again is not None:
            return FiniteDifferences(roots, parameters, again, self._step)
        return GradientGraph(roots, parameters)

    def _keeps(self, graph: Graph) -> bool:
        if self._engine == "auto":
            self._engine = chosen_engine(graph, self._memory)
        return self._engine != "recompute"

    def _differenced(self, roots: tuple[Tensor, ...]) -> Tensor:
        one = torch.ones_like(roots[0])
        parameters = self._layout.parameters
        return self._layout.join(
            differentiate(roots, parameters, [one], create_graph=False)
        )

    def _by_difference(
        self, batch: Any, roots: tuple[Tensor, ...], difference: Tensor
    ) -> Tensor:
        return difference

    @property
    def _is_by_tangents(self) -> bool:
        """Whether products are made by tangents.

        On a GPU what the host does for each node would be what counts.
        """
        is_default = self._asked == "auto" and self._engine != "cached"
        is_default &= self._layout.device.type == "cpu"
        return is_default or self._engine == "tangents"

    def _give_up_tangents(self) -> None:
        self._engine = "cached"

    def _judge(self, suspicion: Suspicion | None) -> None:
        # Between kinks, differences of gradients are no symmetric matrix.
        if self._engine != "finite_differences":
            super()._judge(suspicion)
