"""What the curvature operators share: data, vectors, the recorded graph."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._flat import FlatLayout
from ._data import Batches
from ._guard import RandomState, differentiable, unchanged
from ._state import Snapshot

__all__ = ["CurvatureOperator", "MeanOperator", "Parts", "check_mean", "combine"]

Parts = Sequence[Tensor | None]


class CurvatureOperator(abc.ABC):
    """A symmetric matrix [P, P] over the flat parameters, known by its products.

    The graph of a single batch is recorded once and kept until the operator goes or a
    parameter, a buffer, a module's mode or the batch changes. Several batches are
    recorded again for each pass, one at a time.

    Random numbers that the closure draws (dropout) are those that would have been drawn
    when the operator was made, in every pass: the operator is one fixed matrix.
    """

    def __init__(
        self, model: nn.Module, data: Any, count: Callable[[Any], int] | None
    ) -> None:
        self._model = model
        self._layout = FlatLayout(model)
        self._batches = Batches(data, count)
        self._random = RandomState(self._layout.device)
        self._kept: tuple[Snapshot, Any] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), P the number of trainable scalars."""
        return (self._layout.size, self._layout.size)

    @property
    def dtype(self) -> torch.dtype:
        """What vectors must have; float32 for half-precision models."""
        return self._layout.dtype

    @property
    def device(self) -> torch.device:
        """Where vectors must be."""
        return self._layout.device

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of the flat vector."""
        return self._layout.names

    def named(self, vector: Float[Tensor, " params"]) -> dict[str, Tensor]:
        """A flat vector as tensors shaped like the parameters, by name."""
        self._check(vector)
        return self._layout.named(vector)

    def __matmul__(
        self, other: Float[Tensor, " params"] | Float[Tensor, "params probes"]
    ) -> Float[Tensor, " params"] | Float[Tensor, "params probes"]:
        """The product with a vector [P], or with each column of a matrix [P, k]."""
        self._check(other)
        columns = [other] if other.dim() == 1 else [c.contiguous() for c in other.T]
        if not columns:
            return torch.zeros_like(other)
        products = self._multiply([c.detach() for c in columns])
        return products[0] if other.dim() == 1 else torch.stack(products, dim=1)

    @property
    def gradient(self) -> Float[Tensor, " params"]:
        """The mean gradient over the data: where `top_eigenpairs` starts from."""
        return self._gradient()

    @abc.abstractmethod
    def _record(self, batch: Any) -> Any:
        """The graph of one batch, ready for products."""

    @abc.abstractmethod
    def _multiply(self, columns: list[Tensor]) -> list[Tensor]:
        """The product with each of several flat vectors."""

    @abc.abstractmethod
    def _gradient(self) -> Tensor:
        """The flat mean gradient."""

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[Iterator[tuple[Any, int]]]:
        """Within, each batch's recorded graph with its number of samples."""
        device = self.device
        with unchanged(self._model, device), differentiable(device):
            yield self._recordings()

    def _recordings(self) -> Iterator[tuple[Any, int]]:
        if self._batches.is_single:
            yield self._single()
            return
        self._kept = None
        self._random.restore()
        for batch, weight in self._batches:
            yield self._record(batch), weight

    def _single(self) -> tuple[Any, int]:
        if self._kept is not None and self._kept[0].is_current():
            return self._kept[1]
        self._kept = None
        batch, weight = next(iter(self._batches))
        snapshot = Snapshot(self._model, batch)
        self._random.restore()
        kept = self._record(batch), weight
        self._kept = snapshot, kept
        return kept

    def _check(self, other: Tensor) -> None:
        size, name = self.shape[0], type(self).__name__
        if not isinstance(other, Tensor):
            raise ValueError(
                f"{name} multiplies tensors, got {type(other).__name__}. Pass "
                "torch.as_tensor(v)."
            )
        if other.dim() not in (1, 2) or other.shape[0] != size:
            raise ValueError(
                f"{name} of shape {self.shape} cannot multiply a tensor of shape "
                f"{tuple(other.shape)}. Pass a vector [{size}] or a matrix [{size}, k]."
            )
        if other.dtype != self.dtype or other.device != self.device:
            raise ValueError(
                f"{name} multiplies {self.dtype} on {self.device}, got {other.dtype} "
                f"on {other.device}. Pass v.to({str(self.device)!r}, {self.dtype})."
            )


class MeanTape(Protocol):
    """The recorded graph of one batch of an operator that is a mean over samples."""

    def product(self, parts: list[Tensor]) -> Parts:
        """The operator on this batch, times a vector."""
        ...

    def gradient(self) -> Parts:
        """The gradient of this batch's loss."""
        ...


class MeanOperator(CurvatureOperator):
    """An operator over the data that is the mean of its samples' operators."""

    def _multiply(self, columns: list[Tensor]) -> list[Tensor]:
        split = [self._layout.split(column) for column in columns]
        return self._mean(lambda tape: [tape.product(parts) for parts in split])

    def _gradient(self) -> Tensor:
        return self._mean(lambda tape: [tape.gradient()])[0]

    def _mean(self, visit: Callable[[Any], list[Parts]]) -> list[Tensor]:
        with self._recorded() as recordings:
            tape, total = next(recordings)
            sums = [self._layout.join(parts) for parts in visit(tape)]
            if self._batches.is_single:
                return sums
            for s in sums:
                s.mul_(total)
            del tape
            for tape, weight in recordings:
                for s, parts in zip(sums, visit(tape), strict=True):
                    s.add_(self._layout.join(parts), alpha=weight)
                total += weight
                del tape
            return [s.div_(total) for s in sums]


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
    check_tape(loss, closure)
    if not torch.isfinite(loss).all():
        raise ValueError(
            f"{closure} returned {loss.item()}: a non-finite loss has no derivatives. "
            "Check the batch and the parameters."
        )
    return loss.reshape(())


def check_tape(value: Tensor, closure: str) -> None:
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
    return list(
        torch.autograd.grad(
            [o for o, _ in used],
            inputs,
            [w for _, w in used],
            retain_graph=True,
            allow_unused=True,
        )
    )
