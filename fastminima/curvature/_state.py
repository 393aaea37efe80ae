"""Whether a recorded graph still belongs to the model as it is now."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.vector import same_values
from ._data import tensors_in

__all__ = ["Snapshot"]


class Snapshot:
    """What a recorded graph was made from: parameters, buffers, modes and the batch.

    Version counters and addresses tell most changes for nothing. Writing through
    `.data` moves neither, so values are compared too, which costs one more vector of
    memory and about 2 % of a product.
    """

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self._model = model
        self._batch = list(tensors_in(batch))
        self._marks = self._now()
        self._held = [t.detach() for t in self._tensors()]  # keeps addresses from reuse
        self._values = [t.clone() for t in self._held]

    def is_current(self) -> bool:
        """True if nothing has changed since."""
        return self._now() == self._marks and all(
            same_values(t.detach(), value)
            for t, value in zip(self._tensors(), self._values, strict=True)
        )

    def _tensors(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]

    def _now(self) -> list[Any]:
        modes = [module.training for module in self._model.modules()]
        return [modes, *map(_mark, self._tensors()), *map(_mark, self._batch)]


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    address = tensor.data_ptr() if tensor.layout == torch.strided else 0
    return id(tensor), version, address, tensor.requires_grad, tensor.shape
