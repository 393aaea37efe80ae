"""A session with a stop-watch, for audits: what covers each parameter at what cost."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from ..contributions import Contribution
from ..graph.node import Node
from ..reading.plan import Slot, Use
from ..rows.layout import RowLayout
from .collector import Collector
from .hooks import Session

__all__ = ["TimedCollector", "TimedSession"]


class TimedCollector(Collector):
    """Takes norms and sums over samples.

    Attributes:
        totals: sum over samples of g_n, of each parameter.
        rules: of each parameter, the nodes that use it, or "universal".
        seconds: spent on the norms of each parameter.
    """

    def __init__(self) -> None:
        super().__init__(frozenset(["norms"]), {}, keep_grads=False)
        self.totals: dict[str, Tensor] = {}
        self.rules: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}

    @property
    def wants_norms_only(self) -> bool:
        """No: it wants the contributions themselves."""
        return False

    def take(self, parameter: str, whole: Contribution) -> None:
        """The statistics of one parameter."""
        started = _clock(())
        super().take(parameter, whole)
        norms = self.collected.sq_norms[parameter]
        self.spend([parameter], _clock([norms]) - started)
        self.totals[parameter] = whole.total()

    def spend(self, parameters: Sequence[str], seconds: float) -> None:
        """Note time spent on the statistics of some parameters together."""
        for name in parameters:
            sofar = self.seconds.get(name, 0.0)
            self.seconds[name] = sofar + seconds / len(parameters)


class TimedSession(Session):
    """Notes what rule covers each use, and times it."""

    _collector: TimedCollector

    @property
    def collector(self) -> TimedCollector:
        """What was noted."""
        return self._collector

    def _contributions(
        self,
        use: Use,
        node: Node,
        grads: Sequence[Tensor | None],
        layouts: Sequence[RowLayout | None],
    ) -> tuple[dict[int, Contribution], list[Slot]]:
        started = _clock(grads)
        found, rest = super()._contributions(use, node, grads, layouts)
        self._collector.spend(use.parameters, _clock(grads) - started)
        for slot in use.slots:
            rule = "universal" if slot in rest else use.name
            for name in slot.parameters:
                self._collector.rules.setdefault(name, []).append(rule)
        return found, rest


def _clock(tensors: Sequence[Tensor | None]) -> float:
    """Seconds, once the devices of some tensors have done what they were told."""
    for device in {t.device for t in tensors if t is not None and t.is_cuda}:
        torch.cuda.synchronize(device)
    return time.perf_counter()
