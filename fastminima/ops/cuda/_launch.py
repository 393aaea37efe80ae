"""What calls of CUDA kernels share: the stream, and scratch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["scratch", "stream"]


def stream(x: Tensor) -> int:
    """The stream that PyTorch would use for `x` at this moment."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0


def scratch(count: int, like: Tensor) -> Tensor:
    """Memory for `count` doubles where `like` is."""
    return torch.empty(count, dtype=torch.float64, device=like.device)
