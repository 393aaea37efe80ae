"""Hessian products of every replica of a stack at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .stacks import Loss, Stack, cross_entropy

__all__ = ["copies", "directional_curvature", "grads_and_products", "inner"]


def copies(stack: Stack, replica: int, count: int) -> Stack:
    """A stack of copies of one replica: the same network on other batches."""
    params = [p.detach()[replica].expand(count, *p.shape[1:]) for p in stack.params]
    return Stack(stack.sizes, params)


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Inner products by replica, [replicas]."""
    pairs = zip(left, right, strict=True)
    return torch.stack([(a * b).flatten(1).sum(dim=1) for a, b in pairs]).sum(dim=0)


def grads_and_products(
    stack: Stack,
    losses: Tensor,
    vectors: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradient g of each replica's mean loss, and H v; v = g where none is given.

    Args:
        stack: the replicas.
        losses: of them, [replicas, batch], with their graph.
        vectors: shaped as `stack.params`.
    """
    mean = losses.mean(dim=1).sum()
    grads = torch.autograd.grad(mean, stack.params, create_graph=True)
    fixed = [g.detach() for g in grads]
    along = inner(grads, fixed if vectors is None else vectors).sum()
    return fixed, list(torch.autograd.grad(along, stack.params))


def directional_curvature(
    stack: Stack, x: Tensor, y: Tensor, loss: Loss = cross_entropy
) -> Tensor:
    """g'Hg / |g|^2 of each replica, both of its own batch; x [replicas, batch, ...]."""
    grads, products = grads_and_products(stack, loss(stack(x), y))
    return inner(grads, products) / inner(grads, grads)
