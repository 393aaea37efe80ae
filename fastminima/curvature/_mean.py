"""Operators that are the mean of their samples' operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._auditing import AuditedOperator
from ._weights import check_weights

__all__ = ["MeanOperator"]


class MeanOperator(AuditedOperator):
    """An operator over the data that is the mean of its samples' operators."""

    def _multiply(self, columns: list[Tensor]) -> list[Tensor]:
        split = [self._layout.split(column) for column in columns]
        return self._mean(
            lambda graph: [graph.product(parts, self._only) for parts in split],
            columns,
        )

    def _gradient(self) -> Tensor:
        return self._mean(lambda graph: [graph.gradient()], [])[0]

    def _weigh(self, batch: Any, weight: int) -> None:
        if self._batches.is_counted or weight < 2 or not self._checks.needs_weights():
            return
        if len(set(self._batches.sizes(batch))) > 1:
            return  # which are the rows cannot be told; the batches must be alike
        state = self._generators()
        roots = self._evaluate(batch)
        tolerance = self._checks.tolerance_of(roots)
        whole = self._slope(roots)
        del roots
        state.restore()
        check_weights(
            lambda part: self._slope(self._evaluate(part)),
            batch,
            whole,
            weight,
            tolerance,
        )
        state.restore()
        self._checks.weights_known = True

    def _slope(self, roots: tuple[Tensor, ...]) -> Tensor:
        """The flat gradient of a batch, out of the count."""
        with self._explained(roots):
            return self._layout.join(self._make(roots).gradient())

    def _mean(
        self, visit: Callable[[Any], list[Any]], columns: list[Tensor]
    ) -> list[Tensor]:
        """The mean over the data, those of all ranks, of what is seen in each batch."""
        with self._together(*self._message(len(columns))):
            means = self._retried(lambda: self._own_mean(visit))
            said = None if self._ranks is None else self._said(columns)
        if self._ranks is not None and said is not None:
            means, joint = self._ranks.mean(means, said)
            self._hear(joint)
        return means

    def _own_mean(self, visit: Callable[[Any], list[Any]]) -> list[Tensor]:
        with self._recorded() as recordings:
            graph, total = next(recordings)
            sums = [self._layout.join(parts) for parts in self._visited(visit, graph)]
            if self._batches.is_single:
                return sums
            for s in sums:
                s.mul_(total)
            del graph
            for graph, weight in recordings:
                found = self._visited(visit, graph)
                for s, parts in zip(sums, found, strict=True):
                    s.add_(self._layout.join(parts), alpha=weight)
                total += weight
                del graph, found
            return [s.div_(total) for s in sums]

    def _visited(self, visit: Callable[[Any], list[Any]], graph: Any) -> list[Any]:
        with self._explained(graph.roots):
            return visit(graph)
