"""What uses of compiled regions are asked for, computed by the extension.

On a CPU by a step of its own, as programs have them for the uses of graphs. On a device
as `called.py` has it: by Python until launches are known that give the same bits. The
operator in the compiled code is Python all the same; what is saved is what it takes
from there to the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from ..graph.extension import learned
from . import called
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
            self._left = left = [
                *_lasting(new_table, max(count, self._rows), batch, device)
            ]
        return [left.pop() for _ in range(count)]

    def scratch(self, size: int, device: torch.device) -> Tensor:
        """At least so many bytes; launches of a stream use them one after another."""
        scratch = self._scratch
        if scratch is None or scratch.numel() < size or scratch.device != device:
            size = max(1, size)
            scratch = torch.empty(size, dtype=torch.uint8, device=device)
            self._scratch = scratch
        return scratch


def _new_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _lasting(new: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """A tensor that is used when the pass is over, in whatever mode that ran."""
    if not torch.is_inference_mode_enabled():
        return new(*arguments)
    with torch.inference_mode(False):
        return new(*arguments)


class LaunchedUse:
    """The norms of one use, and the gradient of its weight where that is made.

    Args:
        run: gives norms for each of the names, then the gradient.
        names: parameters; None where nobody asks.
        batch: number of samples.
        gradient: its shape; None where none is made.
        step: of a dtype, a program whose one step gives the norms of a CPU's tensors,
            each in a row of its own, and the gradient; None where there is none.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor | None]],
        names: Sequence[str | None],
        batch: int,
        gradient: tuple[int, ...] | None = None,
        step: Callable[[torch.dtype], Any] = lambda dtype: None,
    ) -> None:
        self._step, self._steps = step, dict[torch.dtype, Any]()
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
        if self.makes and any(t.is_neg() for t in tensors):
            return self._by_python(*tensors)  # a negation that is not done in memory
        device = tensors[0].device
        if device.type == "cpu" and not called.can_be_launched(device):
            return self._on_the_host(tensors)
        if self._launches and all(map(learned().is_readable, tensors)):
            given = list(tensors)
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

    def _on_the_host(self, tensors: Sequence[Tensor]) -> Sequence[Tensor | None]:
        dtype = tensors[0].dtype
        if dtype not in self._steps:
            self._steps[dtype] = self._step(dtype)
        step = self._steps[dtype]
        if step is not None:
            rows = _lasting(_new_rows, (self._count, self._batch), dtype)
            made = [] if self._gradient is None else [_new_rows(self._gradient, dtype)]
            given = 0, list(tensors), rows, made
            if step.compute(*given, _native.threads()):
                found = iter([*rows.unbind(), *made])
                return [next(found) if asked else None for asked in self._wanted]
        return self._by_python(*tensors)

    def _launch(self, launches: Any, scratch: int) -> None:
        self._launches.append(launches)
