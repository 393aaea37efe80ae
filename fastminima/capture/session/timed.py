"""A session with a stop-watch, for audits: what covers each parameter at what cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..contributions import Contribution
from ..graph.node import Node
from ..reading.plan import Slot, Use
from ..rows.layout import RowLayout
from .collector import Collector
from .hooks import Session

__all__ = ["TimedCollector", "TimedSession", "stop_watch"]


def stop_watch(devices: Iterable[torch.device]) -> Callable[[], float]:
    """Says seconds; what lies between two looks is what was computed.

    On a CPU of this thread alone, which other programs do not lengthen: short norms are
    seldom interrupted, a long backward pass often, and their ratio would come out too
    small on a busy machine. With GPUs of the wall, once they have done what they were
    told.
    """
    waited = [device for device in set(devices) if device.type == "cuda"]
    if not waited:
        return time.thread_time

    def now() -> float:
        for device in waited:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


class TimedCollector(Collector):
    """Takes norms and sums over samples.

    Args:
        now: a stop-watch.

    Attributes:
        totals: sum over samples of g_n, of each parameter.
        rules: of each parameter, the nodes that use it, or "universal".
        seconds: spent on the norms of each parameter.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        super().__init__(frozenset(["norms"]), {}, keep_grads=False)
        self.now = now
        self.totals: dict[str, Tensor] = {}
        self.rules: dict[str, list[str]] = {}
        self.seconds: dict[str, float] = {}

    @property
    def wants_norms_only(self) -> bool:
        """No: it wants the contributions themselves."""
        return False

    def take(self, parameter: str, whole: Contribution) -> None:
        """The statistics of one parameter."""
        started = self.now()
        super().take(parameter, whole)
        self.spend([parameter], self.now() - started)
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
        now = self._collector.now
        started = now()
        found, rest = super()._contributions(use, node, grads, layouts)
        self._collector.spend(use.parameters, now() - started)
        for slot in use.slots:
            rule = "universal" if slot in rest else use.name
            for name in slot.parameters:
                self._collector.rules.setdefault(name, []).append(rule)
        return found, rest
