"""The covariance of per-sample gradients, without per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._auditing import AuditedOperator
from ._finite import NotFiniteError
from ._graph import Graph, Parts, check_graph, combine, differentiate, picked, spread
from ._scale import dot

__all__ = ["GradientCovariance"]


class GradientCovariance(AuditedOperator):
    """Sigma, the unbiased covariance of the per-sample gradients g_n over the data.

    Sigma v = 1/(N - 1) sum_n (<g_n, v> - mean) g_n: all <g_n, v> at once by a
    Jacobian-vector product of the losses, then one backward pass weighted with them. So
    no gradient of a single sample is ever formed. A sample is an entry of the vector of
    losses; where a layer mixes samples (batch norm in training), g_n is the gradient of
    sample n's loss through all of them.

    Args:
        model: The model; its parameters that require grad are the variables.
        loss: `loss(model, batch)`, the vector [batch] of the samples' losses.
        data: One batch or a re-iterable of batches, as for `Hessian`.
        process_group: The ranks that have the data between them, as for `Hessian`.

    Raises:
        ValueError: As `Hessian`; losses that are not a vector; fewer than two samples.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> def losses(model, x):
        ...     return model(x)[:, 0]
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
        >>> GradientCovariance(model, losses, x) @ torch.tensor([1.0, 1.0])
        tensor([2., 0.])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        data: Any,
        *,
        process_group: Any = None,
    ) -> None:
        # The losses tell how many samples there are.
        super().__init__(model, (loss,), data, _one, process_group)
        self._loss = loss
        self._mean_gradient: Tensor | None = None  # of all ranks, when last seen

    @property
    def samples(self) -> int:
        """How many samples it is the covariance of; a pass over several batches."""
        if self._ranks is not None:
            self._gradient()
            return self._checks.finished_pass()[1]
        with self._recorded() as recordings:
            return sum(graph.samples for graph, _ in recordings)

    def _evaluate(self, batch: Any) -> tuple[Tensor, ...]:
        losses = self._ask(self._loss, self._model, batch)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            met = (
                f"shape {tuple(losses.shape)}"
                if isinstance(losses, Tensor)
                else type(losses).__name__
            )
            raise ValueError(
                "loss(model, batch) must return the vector [batch] of the samples' "
                f"losses, got {met}. Use reduction='none', and the mean over time."
            )
        check_graph(losses, "loss(model, batch)")
        if not torch.isfinite(losses).all():
            bad = int((~torch.isfinite(losses)).sum())
            raise NotFiniteError(
                f"{bad} of {len(losses)} losses are not finite. Check the batch and "
                "the parameters."
            )
        return (losses,)

    def _differenced(self, roots: tuple[Tensor, ...]) -> Tensor:
        return roots[0]

    def _by_difference(
        self, batch: Any, roots: tuple[Tensor, ...], difference: Tensor
    ) -> Tensor:
        weights = (difference - difference.mean()) / max(len(difference) - 1, 1)
        parts = combine(roots, self._layout.parameters, [weights.to(roots[0])])
        return self._layout.join(parts)

    def _make(self, roots: tuple[Tensor, ...]) -> Graph:
        return _LossesGraph(roots, self._layout.parameters)

    def _multiply(self, columns: list[Tensor]) -> list[Tensor]:
        if self._ranks is None:
            sums, gradient, excess, samples = self._retried(
                lambda: self._sums(columns, [], is_centred=self._batches.is_single)
            )
        else:
            sums, gradient, excess, samples = self._joint_sums(columns)
        if samples < 2:
            raise ValueError(
                f"A covariance needs at least 2 samples, got {samples}. Pass a larger "
                "batch, or several."
            )
        if gradient is not None:
            for s, e in zip(sums, excess, strict=True):
                s.sub_(gradient * (e / samples))
        return [s.div_(samples - 1) for s in sums]

    def _sums(
        self, columns: list[Tensor], shifts: list[Tensor], *, is_centred: bool
    ) -> tuple[list[Tensor], Tensor | None, list[Tensor], int]:
        """sum_n (<g_n, v> - shift) g_n for each v, sum_n g_n, and the sums of factors.

        The shift is the mean over the first batch if none is given; where that is all
        there is, the sums `is_centred` and nothing is left to correct.
        """
        split, only = [self._layout.split(c) for c in columns], self._only
        sums = [torch.zeros_like(column) for column in columns]
        excess = [column.new_zeros(()) for column in columns]
        gradient = None if is_centred else torch.zeros_like(columns[0])
        samples = 0
        with self._recorded() as recordings:
            for graph, _ in recordings:
                with self._explained(graph.roots):
                    slopes = [graph.directional(parts, only) for parts in split]
                # Subtracting something near the mean at once avoids cancellation
                # between sum_n <g_n, v> g_n and N times the mean gradient's part of it.
                shifts = shifts or [slope.mean() for slope in slopes]
                for i, slope in enumerate(slopes):
                    centred = slope - shifts[i]
                    sums[i] += self._layout.join(graph.weighted(centred, only))
                    excess[i] = excess[i] + centred.sum()
                if gradient is not None:
                    gradient += self._layout.join(graph.weighted(None))
                samples += graph.samples
                del graph
        return sums, gradient, excess, samples

    def _joint_sums(
        self, columns: list[Tensor]
    ) -> tuple[list[Tensor], Tensor, list[Tensor], int]:
        """The same of all ranks, with a shift that all have: by the mean gradient."""
        assert self._ranks is not None
        if self._mean_gradient is None:
            self._gradient()
        mean = self._mean_gradient
        assert mean is not None
        with self._together(*self._message(len(columns))):
            shifts = [dot(mean, column).to(column) for column in columns]
            sums, gradient, excess, _ = self._retried(
                lambda: self._sums(columns, shifts, is_centred=False)
            )
            assert gradient is not None
            said = self._said(columns)
        vectors, extra, joint = self._ranks.total(
            [*sums, gradient], said, torch.stack(excess)
        )
        self._hear(joint)
        samples = round(joint.weight)
        self._mean_gradient = vectors[-1] / samples
        return vectors[:-1], vectors[-1], list(extra), samples

    def _message(self, columns: int) -> tuple[int, int]:
        return (1, 0) if self._mean_gradient is None else (columns + 1, columns)

    def _gradient(self) -> Tensor:
        with self._together(1):
            total, samples = self._retried(self._own_gradient)
            said = None if self._ranks is None else self._said([])
        if self._ranks is not None and said is not None:
            (total,), _, joint = self._ranks.total([total], said)
            self._hear(joint)
            samples = round(joint.weight)
        mean = total.div_(samples)
        self._mean_gradient = mean if self._ranks is not None else None
        return mean

    def _own_gradient(self) -> tuple[Tensor, int]:
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        samples = 0
        with self._recorded() as recordings:
            for graph, _ in recordings:
                total += self._layout.join(graph.weighted(None))
                samples += graph.samples
                del graph
        return total, samples


def _one(batch: Any) -> int:
    return 1


class _LossesGraph(Graph):
    """The losses of a batch, and sum_n u_n g_n as a function of u."""

    def __init__(
        self, roots: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
    ) -> None:
        (self._losses,) = roots
        self._parameters = parameters
        self._weights = torch.zeros_like(self._losses, requires_grad=True)
        self._weighted = differentiate([self._losses], parameters, [self._weights])
        self.samples = len(self._losses)
        super().__init__(roots, self._weighted)

    def directional(
        self, parts: list[Tensor], only: Sequence[int] | None = None
    ) -> Tensor:
        """<g_n, v> of every sample, [batch], v zero for parameters not in `only`."""
        weighted = self._weighted
        if only is not None:
            weighted, parts = picked(only, weighted, parts)
        (slopes,) = combine(weighted, [self._weights], parts)
        return torch.zeros_like(self._losses) if slopes is None else slopes

    def weighted(
        self, weights: Tensor | None, only: Sequence[int] | None = None
    ) -> Parts:
        """sum_n weights_n g_n; the sum of the gradients without weights."""
        if weights is None:
            weights = torch.ones_like(self._losses)
        if only is None:
            return combine([self._losses], self._parameters, [weights])
        (mine,) = picked(only, self._parameters)
        found = combine([self._losses], mine, [weights])
        return spread(only, found, len(self._parameters))

    def gradient(self) -> Parts:
        """The sum of the gradients."""
        return self.weighted(None)
