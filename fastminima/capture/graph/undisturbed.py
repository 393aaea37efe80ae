"""What hooks compute, whatever is set in the thread that a backward pass runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

__all__ = ["undisturbed"]

_NOTHING = nullcontext()


def undisturbed() -> AbstractContextManager[None]:
    """No graph of what a hook computes, no autocast of it, no inference tensors.

    A pass under `create_graph=True` records what its hooks do, and one that is called
    inside `torch.autocast` would round their products to half precision.
    """
    if torch._C._is_any_autocast_enabled() or torch.is_inference_mode_enabled():
        return _undisturbed()
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


@contextmanager
def _undisturbed() -> Iterator[None]:
    # In this order: leaving inference mode turns gradients on.
    with torch.inference_mode(False), torch.no_grad(), torch._C._DisableAutocast():
        yield
