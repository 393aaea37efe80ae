"""The recorded graph of one batch, and what its derivatives are made with."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ._finite import NotFiniteError

__all__ = [
    "GradientGraph",
    "Graph",
    "Parts",
    "accumulate",
    "check_graph",
    "check_mean",
    "combine",
    "differentiate",
    "picked",
    "spread",
]

Parts = Sequence[Tensor | None]


class Graph(abc.ABC):
    """The recorded graph of one batch.

    Attributes:
        roots: What the closures returned, first by the model, last the loss.
        reached: The first derivative by each parameter; None for those not reached.
        calls_closures: Whether products may run what a user has written: functions in
            Python, checkpointed regions, hooks.
    """

    calls_closures = True

    def __init__(self, roots: tuple[Tensor, ...], reached: Parts) -> None:
        self.roots, self.reached = roots, reached

    @property
    def value(self) -> Tensor:
        """The mean loss."""
        return self.roots[-1].detach().mean()

    def product(self, parts: list[Tensor], only: Sequence[int] | None = None) -> Parts:
        """The product with a vector, given by its parts; where that is all it takes.

        With `only`, the numbers of some parameters: their rows, where the vector is
        zero for all others. What else is returned then means nothing.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def gradient(self) -> Parts:
        """The gradient of the loss."""


class GradientGraph(Graph):
    """A gradient that can be differentiated again, any number of times.

    Args:
        roots: The loss.
        parameters: What the matrix is about.
        others: Further leaves to make gradients by.
    """

    def __init__(
        self,
        roots: tuple[Tensor, ...],
        parameters: Sequence[Tensor],
        others: Sequence[Tensor] = (),
    ) -> None:
        self._parameters = parameters
        one = torch.ones_like(roots[0])
        self.all_gradients = differentiate(roots, [*parameters, *others], [one])
        super().__init__(roots, self.all_gradients[: len(parameters)])

    def product(self, parts: list[Tensor], only: Sequence[int] | None = None) -> Parts:
        """The product with a vector, in parts."""
        if only is None:
            return combine(self.reached, self._parameters, parts)
        chosen = picked(only, self.reached, self._parameters, parts)
        return spread(only, combine(*chosen), len(parts))

    def gradient(self) -> Parts:
        """The gradient, with its graph."""
        return self.reached


def check_mean(loss: Any, closure: str = "loss(model, batch)") -> Tensor:
    """The scalar that a closure returned; ValueError unless it is one and usable."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        met = (
            f"shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else type(loss).__name__
        )
        raise ValueError(
            f"{closure} must return a scalar tensor, the mean over the batch; got "
            f"{met}. Return losses.mean()."
        )
    check_graph(loss, closure)
    if not torch.isfinite(loss).all():
        raise NotFiniteError(
            f"{closure} returned {loss.item()}: a non-finite loss has no derivatives. "
            "Check the batch and the parameters."
        )
    return loss.reshape(())


def check_graph(value: Tensor, closure: str) -> None:
    """ValueError unless `value` can be differentiated."""
    if not value.requires_grad:
        raise ValueError(
            f"{closure} returned a tensor without a graph: no trainable parameter was "
            "reached. Compute it with the model's own parameters, without detach() or "
            "no_grad()."
        )


def combine(
    outputs: Parts, inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradient of sum_i <outputs_i, weights_i> by the inputs, keeping the graph.

    Outputs that are None or constant contribute nothing; an input not reached gets
    None.
    """
    used = [
        (o, w)
        for o, w in zip(outputs, weights, strict=True)
        if o is not None and o.requires_grad
    ]
    if not used:
        return [None] * len(inputs)
    outputs, weights = zip(*used, strict=True)
    return list(differentiate(outputs, inputs, weights, create_graph=False))


def picked(only: Sequence[int], *lists: Sequence[Any]) -> list[list[Any]]:
    """Of each list the entries of those numbers."""
    return [[entries[index] for index in only] for entries in lists]


def spread(only: Sequence[int], found: Parts, count: int) -> list[Tensor | None]:
    """So many parts, those of some numbers found, the others None."""
    parts = dict(zip(only, found, strict=True))
    return [parts.get(index) for index in range(count)]


def differentiate(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor | GradientEdge],
    weights: Sequence[Tensor],
    *,
    create_graph: bool = True,
    keep_graph: bool = True,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of sum_i <outputs_i, weights_i>.

    That function is itself one that function modes intercept, and are switched off in:
    a checkpointed region would be computed again without `Rewrites`.
    """
    return torch.autograd.graph._engine_run_backward(
        tuple(outputs),
        tuple(weights),
        keep_graph,
        create_graph,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )


def accumulate(roots: Sequence[Tensor]) -> None:
    """`torch.autograd.backward` that keeps the graph, and function modes."""
    weights = tuple(map(torch.ones_like, roots))
    torch.autograd.graph._engine_run_backward(
        tuple(roots),
        weights,
        True,
        False,
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )
