"""Reductions of one dense tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import _native
from .._dtypes import accumulation_dtype
from ._arguments import FLOATS, SUFFIX, TRITON, accumulated
from .table import Op

__all__ = ["joint_sq_norm", "sq_norm"]


def _sq_norm(x: Float[Tensor, ...]) -> Float[Tensor, ""]:
    """Squared norm |x|^2 in the accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype)).square().sum()


_SMALL = 4096  # PyTorch's two calls take 4 us here, a call of the kernel 5


def _sq_norm_native(kernels: Any, x: Tensor) -> Tensor:
    if x.numel() < _SMALL:
        return _sq_norm(x)
    (x,) = accumulated(x)
    x = x.contiguous()
    out = x.new_empty(())
    getattr(kernels, f"sq_norm_{SUFFIX[x.dtype]}")(
        x.data_ptr(), x.numel(), out.data_ptr(), _native.threads()
    )
    return out


sq_norm = Op("sq_norm", _sq_norm)
sq_norm.add_native(_sq_norm_native, dtypes=FLOATS)
sq_norm.add_triton("reduce.sq_norm", dtypes=TRITON, preferred=False)


def joint_sq_norm(tensors: Sequence[Float[Tensor, ...]]) -> Float[Tensor, ""]:
    """Squared norm of all the tensors together, in the accumulation dtype of the first.

    The small ones are joined before they are summed: a call costs more than they do.
    """
    dtype = accumulation_dtype(tensors[0].dtype)
    parts = [sq_norm(x).to(dtype) for x in tensors if x.numel() >= _SMALL]
    small = [x.flatten().to(dtype) for x in tensors if x.numel() < _SMALL]
    if small:
        parts.append(torch.cat(small).square().sum())
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()
