"""What calls of CUDA kernels share: the stream, scratch, lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import HostIntegers

__all__ = ["alike", "scratch", "sizes", "stream"]


def stream(x: Tensor) -> int:
    """The stream that PyTorch would use for `x` at this moment."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def scratch(count: int, like: Tensor) -> Tensor:
    """Memory for `count` doubles where `like` is."""
    return torch.empty(count, dtype=torch.float64, device=like.device)


def sizes(tensors: Sequence[Tensor]) -> HostIntegers:
    """The tensors' numbers of elements, on the host."""
    return HostIntegers(x.numel() for x in tensors)


def alike(written: Sequence[Tensor], read: Sequence[Tensor]) -> bool:
    """Whether one launch can take both lists: one device, one dtype, dense outputs."""
    kinds = {(x.device, x.dtype) for x in (*written, *read)}
    same = [x.shape for x in written] == [x.shape for x in read]
    return len(kinds) == 1 and same and all(x.is_contiguous() for x in written)
