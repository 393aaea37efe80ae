"""Numbers of a step that lie on a device, brought to the host in one copy."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Packed"]


class Packed:
    """Named tensors, which come to the host together.

    Each `.item()` waits for the device again; here there is one wait for a step, and
    none where nothing was added. Tensors of another device cost a copy of their own.
    (What ranks tell each other of their samples, `origins.py`, waits by itself.)

    Example:
        >>> import torch
        >>> from fastminima.monitor.packing import Packed
        >>> packed = Packed()
        >>> packed.add("loss", torch.tensor(0.5))
        >>> packed.add("norms", torch.tensor([1.0, 2.0]))
        >>> packed.read()
        {'loss': [0.5], 'norms': [1.0, 2.0]}
    """

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Ask for a tensor's numbers, in row-major order."""
        self._parts[name] = tensor.detach().reshape(-1)

    def read(self) -> dict[str, list[float]]:
        """The numbers of all, in float64."""
        by_device: dict[torch.device, list[str]] = {}
        for name, part in self._parts.items():
            by_device.setdefault(part.device, []).append(name)
        found: dict[str, list[float]] = {}
        for names in by_device.values():
            parts = [self._parts[name].to(torch.float64) for name in names]
            numbers = torch.cat(parts).tolist()
            start = 0
            for name, part in zip(names, parts, strict=True):
                found[name] = numbers[start : start + len(part)]
                start += len(part)
        return found
