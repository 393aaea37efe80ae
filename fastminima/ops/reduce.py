"""Reductions of dense tensors."""

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


def _joint_sq_norm(
    first: Float[Tensor, ...], rest: Sequence[Float[Tensor, ...]]
) -> Float[Tensor, ""]:
    """Squared norm of some tensors together, in the accumulation dtype of the first."""
    dtype = accumulation_dtype(first.dtype)
    return torch.stack([_sq_norm(x).to(dtype) for x in (first, *rest)]).sum()


_SMALL = 4096  # PyTorch's two calls take 4 us here, a call of the kernel 5


def _sq_norm_native(kernels: Any, x: Tensor) -> Tensor:
    return _sq_norm(x) if x.numel() < _SMALL else _joint_sq_norm_native(kernels, x, ())


def _joint_sq_norm_native(
    kernels: Any, first: Tensor, rest: Sequence[Tensor]
) -> Tensor:
    tensors = [x.contiguous() for x in accumulated(first, *rest)]
    out = tensors[0].new_empty(())
    getattr(kernels, f"joint_sq_norm_{SUFFIX[out.dtype]}")(
        [(x.data_ptr(), x.numel()) for x in tensors],
        *(out.data_ptr(), _native.threads()),
    )
    return out


sq_norm = Op("sq_norm", _sq_norm)
sq_norm.add_native(_sq_norm_native, dtypes=FLOATS)
sq_norm.add_triton("reduce.sq_norm", dtypes=TRITON)
joint_sq_norm = Op("joint_sq_norm", _joint_sq_norm)
joint_sq_norm.add_native(_joint_sq_norm_native, dtypes=FLOATS)
