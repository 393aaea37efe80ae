"""The number of samples of a batch, as the libraries find it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

__all__ = ["leading_size"]


def leading_size(batch: Any) -> int:
    """Leading size of the first tensor in a batch that has one.

    Args:
        batch: a tensor; or a mapping, sequence or dataclass that holds tensors.

    Raises:
        ValueError: there is no such tensor.

    Example:
        >>> import torch
        >>> from fastminima.callbacks.batches import leading_size
        >>> leading_size({"id": "a", "x": torch.zeros(5, 3), "y": torch.zeros(4)})
        5
    """
    for tensor in _tensors(batch):
        if tensor.dim():
            return len(tensor)
    raise ValueError(
        f"No tensor with a batch axis in a batch of type {type(batch).__name__}. Say "
        "how many samples it has with batch_size=, a number or a function."
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from _tensors(getattr(batch, field.name))
