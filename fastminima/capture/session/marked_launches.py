"""What uses of compiled regions are asked for, launched by the extension on a device.

As `called.py` for the uses of graphs: computed by Python until launches are known that
give the same bits. The operator in the compiled code is Python all the same; what is
saved is what Python takes for launching.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..graph.extension import learned
from .called import Repeated, new_table

__all__ = ["LaunchedUse", "Memory"]


class Memory:
    """Where the launches of one pass write: rows for norms, and scratch.

    Args:
        rows: how many are expected.
    """

    def __init__(self, rows: int) -> None:
        self._rows = max(1, rows)
        self._left: list[Tensor] = []
        self._scratch: Tensor | None = None

    def rows(self, count: int, batch: int, device: torch.device) -> list[Tensor]:
        """Memory for the norms of some parameters, each `[batch]` and aligned."""
        left = self._left
        if len(left) < count or len(left[-1]) != batch or left[-1].device != device:
            with torch.inference_mode(False):
                table = new_table(max(count, self._rows), batch, device)
            self._left = left = [*table]
        return [left.pop() for _ in range(count)]

    def scratch(self, size: int, device: torch.device) -> Tensor:
        """At least so many bytes; launches of a stream use them one after another."""
        scratch = self._scratch
        if scratch is None or scratch.numel() < size or scratch.device != device:
            size = max(1, size)
            scratch = torch.empty(size, dtype=torch.uint8, device=device)
            self._scratch = scratch
        return scratch


class LaunchedUse:
    """The norms of one use, and the gradient of its weight where that is made.

    Args:
        run: gives norms for each of the names, then the gradient.
        names: parameters; None where nobody asks.
        batch: number of samples.
        gradient: its shape; None where none is made.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor | None]],
        names: Sequence[str | None],
        batch: int,
        gradient: tuple[int, ...] | None = None,
    ) -> None:
        self._wanted = [name is not None for name in names]
        self._count, self._batch = sum(self._wanted), batch
        self._gradient = gradient
        places, size = list(range(self._count)), 0
        if gradient is not None:
            self._wanted.append(True)
            places.append(-1)
            size = math.prod(gradient) * torch.float32.itemsize
        self._by_python = Repeated(run, self._wanted, places, size, self._launch)
        self._launches: list[Any] = []

    @property
    def is_launched(self) -> bool:
        """Whether the extension launches it, for some tensors."""
        return bool(self._launches)

    @property
    def makes(self) -> bool:
        """Whether a gradient comes behind the norms."""
        return self._gradient is not None

    def __call__(self, memory: Memory, *tensors: Tensor) -> Sequence[Tensor | None]:
        """The norms and the gradient, of the output gradient and the saved tensors."""
        if self._launches and all(map(learned().is_readable, tensors)):
            device, given = tensors[0].device, list(tensors)
            found = memory.rows(self._count, self._batch, device)
            if self._gradient is not None:
                shape = self._gradient
                found.append(torch.empty(shape, dtype=torch.float32, device=device))
            for launches in self._launches:
                scratch = memory.scratch(launches.bytes, device)
                if launches.run(given, found, scratch):
                    outputs = iter(found)
                    return [next(outputs) if asked else None for asked in self._wanted]
        return self._by_python(*tensors)

    def _launch(self, launches: Any, scratch: int) -> None:
        self._launches.append(launches)
