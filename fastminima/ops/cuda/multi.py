"""Calls of the CUDA kernels over lists of tensors, each list in one launch per 96.

A list of several dtypes is launched for each of them; one that lies on several devices
goes to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._arguments import SUFFIX, HostIntegers, addresses
from ._launch import scratch, stream

__all__ = ["sq_norm"]


def sq_norm(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """See `fastminima.ops.multi.multi_sq_norm`."""

    def run(kernels: Any, xs: Sequence[Tensor]) -> Tensor:
        if len({x.device for x in xs}) > 1:
            return reference(xs)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for x in xs:
            by_dtype.setdefault(x.dtype, []).append(x)
        if len(by_dtype) > 1:
            return torch.stack([run(kernels, some) for some in by_dtype.values()]).sum()
        xs = [x.contiguous() for x in xs]
        rows, sizes = addresses(xs), HostIntegers(x.numel() for x in xs)
        blocks = kernels.multi_partials(sizes.data_ptr(), len(xs))
        partials, result = scratch(blocks, xs[0]), scratch(1, xs[0])
        getattr(kernels, f"multi_sq_norm_{SUFFIX[xs[0].dtype]}")(
            *(rows.data_ptr(), sizes.data_ptr(), len(xs)),
            *(partials.data_ptr(), result.data_ptr(), stream(xs[0])),
        )
        return result[0]

    return run
