"""Jumps of a loss or a gradient norm: reasons to look again at what is remembered."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import _native
from ...statistics import GradientStatistics
from ..graph.passes import is_capturing

__all__ = ["Jumps"]

_FAR = math.log(4.0)  # from a usual value, up or down for norms, up for losses
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
        if stats.sq_norms is None:
            return
        total = _total(stats.sq_norms)
        if total is not None:
            self._weigh("norm", math.sqrt(max(total, 0.0) / stats.count))
        elif not _is_out_of_reach(stats.sq_norms):
            on_device = stats.sq_norms.detach().sum()
            self._keep("norm", (on_device / stats.count).sqrt())
            self._keep("loss", loss.detach().mean().abs())

    def is_suspicious(self, loss: Tensor) -> bool:
        """Whether something jumped in the last steps, or in this loss."""
        total = _total(loss)
        if total is None and is_capturing(loss):
            return False
        self._steps += 1
        self._rest -= 1
        if total is not None:
            self._weigh("loss", abs(total) / max(1, loss.numel()))
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
        level = math.log(value) if 0 < value < math.inf else None
        usual = self._usual.get(name)
        if usual is not None and self._steps > _FIRST and value != 0:
            self._jumped |= level is None or _is_far(name, level - usual)
        if level is not None:
            usual = level if usual is None else usual
            self._usual[name] = _MEMORY * usual + (1 - _MEMORY) * level


def _is_far(name: str, above: float) -> bool:
    """Whether a number is so much above or below the usual one, in logarithms."""
    return above > _FAR or (name == "norm" and above < -_FAR)


def _total(t: Tensor) -> float | None:
    """The sum of a vector in the host's memory; None where it lies elsewhere."""
    host = _native.host()
    total = None if host is None else host.total(t)
    if total is None and t.device.type == "cpu":
        return float(t.detach().sum())
    return total


def _is_out_of_reach(t: Tensor) -> bool:
    """Whether numbers cannot be copied to the host: there are none, or in a graph."""
    return t.is_meta or is_capturing(t)
