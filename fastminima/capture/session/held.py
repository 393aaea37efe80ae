"""What parameters hold in `.grad`, asked of all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ... import _native
from ...ops._arguments import NATIVE
from ..graph.extension import learned
from .norms import new_numbers

__all__ = ["each_square", "have_no_gradient", "may_be_left_out", "sum_of_squares"]


def have_no_gradient(parameters: Mapping[str, Tensor]) -> bool:
    """Whether none has a gradient yet, nor a hook that takes it away."""
    host = _native.host()
    if host is not None:
        return host.are_fresh(list(parameters.values()))
    return all(
        p.grad is None and not p._post_accumulate_grad_hooks
        for p in parameters.values()
    )


def may_be_left_out(parameters: Sequence[Tensor]) -> bool:
    """Whether nobody notices that a pass itself has no gradients of any of these.

    Hooks on a parameter may count the gradients that one pass brings it, as those of
    `torch.autograd.graph.register_multi_grad_hook` do. A frozen one gets none.
    """
    host = _native.host()
    if host is not None:
        return host.may_be_left_out(list(parameters))
    return all(p.requires_grad and not p._backward_hooks for p in parameters)


def sum_of_squares(parameters: Mapping[str, Tensor]) -> Tensor | None:
    """|grad|^2 over all parameters that have one, by one call of a kernel.

    As `multi_sq_norm` gives it. None where that is not for these gradients: on a
    device, of several dtypes, sparse, not contiguous.
    """
    host, dtype = learned(), _dtype(parameters)
    if host is None or dtype not in NATIVE:
        return None
    total = torch.empty((), dtype=dtype, device="cpu")
    is_done = host.sum_of_squares(
        list(parameters.values()), _native.best_isa, _native.threads(), total
    )
    return total if is_done else None


def each_square(parameters: Mapping[str, Tensor]) -> tuple[list[str], Tensor] | None:
    """The parameters that have a gradient, and |grad|^2 of each; else as above."""
    host, dtype = learned(), _dtype(parameters)
    if host is None or dtype not in NATIVE:
        return None
    squares = new_numbers(len(parameters), dtype=dtype)
    places = host.each_square(
        list(parameters.values()), _native.best_isa, _native.threads(), squares
    )
    if places is None:
        return None
    names = list(parameters)
    return [names[place] for place in places], squares[: len(places)]


def _dtype(parameters: Mapping[str, Tensor]) -> torch.dtype | None:
    return next((p.dtype for p in parameters.values()), None)
