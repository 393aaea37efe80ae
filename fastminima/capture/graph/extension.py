"""The part of the extension that walks graphs and runs hooks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from ... import _native
from .passes import owners

__all__ = ["learned"]


@cache
def learned() -> Any:
    """What runs hooks, once it knows what tensors and passes are.

    None where there is no extension, and where this PyTorch does not share tensors with
    C (`torch.Tensor.__dlpack_c_exchange_api__`).
    """
    host = _native.host()
    if host is None:
        return None
    knows = host.learn(
        *(torch.Tensor, torch.nn.Parameter, owners()),
        *(torch._C._current_autograd_node, torch._C._current_graph_task_id),
        RemovableHandle,
    )
    return host if knows else None
