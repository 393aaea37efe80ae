"""Forward passes of data-parallel modules without what they do for training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["replicas", "without_reducers"]


def replicas(model: nn.Module) -> list[Any]:
    """The modules that reduce gradients in the backward pass."""
    parallel = nn.parallel.DistributedDataParallel
    return [m for m in model.modules() if isinstance(m, parallel)]


@contextlib.contextmanager
def without_reducers(model: nn.Module) -> Iterator[None]:
    """Within, `DistributedDataParallel` calls what it wraps, and does nothing else.

    Its forward pass prepares a backward pass that does not come, and broadcasts
    buffers, for which it would wait where ranks record unequally often.
    """
    wrapped = replicas(model)
    before = [r.__dict__.get("forward") for r in wrapped]
    try:
        for replica in wrapped:
            replica.forward = _Plain(replica)
        yield
    finally:
        for replica, forward in zip(wrapped, before, strict=True):
            del replica.forward
            if forward is not None:
                replica.forward = forward


class _Plain:
    """The forward pass of a wrapped module, on inputs where it is."""

    def __init__(self, replica: Any) -> None:
        self._inner = replica.module
        ids = replica.device_ids
        self._device = torch.device(replica.device_type, ids[0]) if ids else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._device is not None:
            from torch.utils._pytree import tree_map_only

            device = self._device
            args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (args, kwargs))
        return self._inner(*args, **kwargs)
