"""Calls of the native kernels over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _native
from .._arguments import SUFFIX, accumulated

__all__ = ["sq_norm"]


def sq_norm(kernels: Any, xs: Sequence[Tensor]) -> Tensor:
    """See `fastminima.ops.multi.multi_sq_norm`."""
    tensors = [x.contiguous() for x in accumulated(*xs)]
    out = torch.empty((), dtype=torch.float64, device="cpu")
    getattr(kernels, f"multi_sq_norm_{SUFFIX[tensors[0].dtype]}")(
        [(x.data_ptr(), x.numel()) for x in tensors],
        *(out.data_ptr(), _native.threads()),
    )
    return out
