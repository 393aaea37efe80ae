"""Jumps of a loss or a gradient norm: reasons to look again at what is remembered."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import _native
from ...statistics import GradientStatistics
from ..graph.passes import is_capturing

__all__ = ["Jumps"]

_FACTOR = 4.0  # of a usual value, up or down for norms, up for losses
_MEMORY = 0.9  # of the running means of logarithms
_FIRST = 5  # values before which nothing is usual
_REST = 20  # steps in which a second jump says no more than the first


class Jumps:
    """Says when something jumped since the last steps.

    What is on a device is copied without waiting for it, and read a step or two later.
    """

    def __init__(self) -> None:
        self._usual: dict[str, float] = {}
        self._steps = 0
        self._rest = 0
        self._jumped = False
        self._coming: list[tuple[str, Tensor, torch.cuda.Event | None]] = []

    def note(self, loss: Tensor, stats: GradientStatistics) -> None:
        """Keep the numbers of a step."""
        if stats.sq_norms is None or _is_out_of_reach(stats.sq_norms):
            return
        if stats.sq_norms.device.type == "cpu":
            total = _total(stats.sq_norms)
            self._weigh("norm", math.sqrt(max(total, 0.0) / stats.count))
            return
        total = stats.sq_norms.detach().sum()
        self._keep("norm", (total / stats.count).sqrt())
        self._keep("loss", loss.detach().mean().abs())

    def is_suspicious(self, loss: Tensor) -> bool:
        """Whether something jumped in the last steps, or in this loss."""
        if is_capturing(loss):
            return False
        self._steps += 1
        self._rest -= 1
        if loss.device.type == "cpu":
            self._weigh("loss", abs(_total(loss)) / max(1, loss.numel()))
        elif self._coming:
            self._collect()
        jumped, self._jumped = self._jumped and self._rest <= 0, False
        if jumped:
            self._rest = _REST
        return jumped

    def _collect(self) -> None:
        """Read what has come from the device by now."""
        waiting = []
        for name, value, event in self._coming:
            if event is None or event.query():
                self._weigh(name, float(value))
            else:
                waiting.append((name, value, event))
        self._coming = waiting

    def _keep(self, name: str, value: Tensor) -> None:
        event = None
        if value.is_cuda:
            held = torch.empty((), dtype=value.dtype, device="cpu", pin_memory=True)
            value = held.copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._coming.append((name, value, event))

    def _weigh(self, name: str, value: float) -> None:
        self._jumped |= self._is_jump(name, value)
        if not 0 < value < math.inf:
            return
        usual = self._usual.get(name, math.log(value))
        self._usual[name] = _MEMORY * usual + (1 - _MEMORY) * math.log(value)

    def _is_jump(self, name: str, value: float) -> bool:
        if name not in self._usual or self._steps <= _FIRST or value == 0:
            return False
        if not math.isfinite(value):
            return True
        ratio = math.exp(min(math.log(value) - self._usual[name], 700.0))
        return ratio > _FACTOR or (name == "norm" and ratio < 1 / _FACTOR)


def _total(t: Tensor) -> float:
    """The sum of a vector in the host's memory."""
    host = _native.host()
    total = None if host is None else host.total(t)
    return float(t.detach().sum()) if total is None else total


def _is_out_of_reach(t: Tensor) -> bool:
    """Whether numbers cannot be copied to the host: there are none, or in a graph."""
    return t.is_meta or is_capturing(t)
