"""Whether two tensors hold the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.vector import same_values

__all__ = ["same"]

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype and every bit: NaN is itself here."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    if a.is_meta or b.is_meta:
        return a is b
    if a.layout == torch.sparse_coo:
        parts = (a._indices(), b._indices()), (a._values(), b._values())
        return all(same(left, right) for left, right in parts)
    if a.layout != torch.strided or a.is_nested:
        return a is b
    if same_values(a, b):
        return True
    integer = _INTEGER.get(a.element_size())
    if not a.is_floating_point() or integer is None:
        return False
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
