"""Whether two tensors hold the same bits, here or on different ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.vector import same_values

__all__ = ["fingerprint", "same"]

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


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """32 bits that differ, nearly always, if any bit of the tensors does."""
    sums = [
        _integers(t).sum(dtype=torch.int64) * (2 * place + 1)
        for place, t in enumerate(tensors)
        if t.numel() and t.element_size() in _INTEGER
    ]
    if not sums:
        return 0
    total = int(torch.stack(sums).sum())
    return (total ^ (total >> 32)) & 0xFFFFFFFF


def _integers(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(_INTEGER[t.element_size()])
