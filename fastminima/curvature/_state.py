"""Whether a recorded graph still belongs to what it was recorded from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ._reads import Reads
from ._same import same

__all__ = ["Snapshot"]

_COPIED_BYTES = 1 << 28  # of tensors that are neither the model's nor the batch's
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class Snapshot:
    """What a recorded graph was made from: the model, the batch, what closures read.

    Identities and version counters tell most changes for nothing. Writing through
    `.data`, or through an array that shares a tensor's memory, moves neither, so values
    are compared too, which costs one more vector of memory, one more batch, and about
    2 % of a product. Of tensors that only the closures read, 256 MiB are copied; for
    those beyond, identity and version must do.

    Attributes:
        is_same_kind: Whether at most values of tensors had changed when last asked.
    """

    def __init__(self, model: nn.Module, batch: Any, closures: Sequence[Any]) -> None:
        self._sources = model, batch, closures
        reads, own_tensors, own_arrays = self._read()
        self._reads = reads
        self.is_same_kind = True
        self._left = _COPIED_BYTES
        self._copies = [
            tensor.detach().clone() if i < own_tensors or self._fits(tensor) else None
            for i, tensor in enumerate(reads.tensors)
        ]
        self._arrays = [
            array.copy() if i < own_arrays or self._fits(array) else None
            for i, array in enumerate(reads.arrays)
        ]

    def _fits(self, value: Tensor | np.ndarray) -> bool:
        """Whether something that only the closures read is copied."""
        self._left -= value.nbytes
        return self._left >= 0

    def is_current(self) -> bool:
        """True if nothing has changed since."""
        reads, *_ = self._read()
        self.is_same_kind = reads.marks == self._reads.marks
        return (
            self.is_same_kind
            and reads.versions == self._reads.versions
            and all(
                copy is None or same(tensor.detach(), copy)
                for tensor, copy in zip(reads.tensors, self._copies, strict=True)
            )
            and all(
                copy is None
                or np.array_equal(array, copy, equal_nan=array.dtype.kind in "fc")
                for array, copy in zip(reads.arrays, self._arrays, strict=True)
            )
        )

    def _read(self) -> tuple[Reads, int, int]:
        """A walk, and how many tensors and arrays are the model's or the batch's."""
        model, batch, closures = self._sources
        reads = Reads()
        reads.module(model)
        reads.batch(batch)
        own = len(reads.tensors), len(reads.arrays)
        for name in _GLOBAL_HOOKS:
            reads.marks += [id(h) for h in getattr(nn_module, name).values()]
        reads.closures(closures)
        return reads, *own
