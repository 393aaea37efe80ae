"""Training steps recorded so that their gradients can be differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ._guard import second_derivatives
from ._rewrites import Rewrites

__all__ = ["twice_differentiable"]


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """Within, losses are recorded in a form that has a second derivative.

    For a forward pass whose loss goes to `SharpnessProbe.backward`: attention is
    computed by its plain formula and not by a fused kernel, weight norm is written out,
    recurrent layers are PyTorch's own and not cuDNN's, compiled regions run eagerly.
    Values are the same but for rounding; attention takes memory for its weights. Hooks
    on activations are called in the step's backward pass and not in those of products.
    Nothing else changes: autocast, modes, random numbers and buffers are the loop's.

    Example:
        >>> import torch
        >>> q = torch.ones(1, 1, 2, 4, requires_grad=True)
        >>> with twice_differentiable():
        ...     o = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> "ScaledDotProduct" in o.grad_fn.name()
        False
    """
    with second_derivatives(), Rewrites(is_training=True):
        yield
