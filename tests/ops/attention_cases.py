"""Arguments of attention, and its definition: scores written out, autograd twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastminima.ops import attention as ops
from fastminima.ops.attention import Scores
from fastminima.ops.table import Op

__all__ = ["Arguments", "Case", "Results", "by_math", "by_ops"]


class Case(NamedTuple):
    """Sizes, and the shape of the mask."""

    batch: int
    heads: int
    groups: int
    time: int
    steps: int
    d_in: int
    d_out: int
    is_causal: bool = False
    mask: str = ""

    def scores(self) -> Scores:
        """With a mask whose third row sees nothing, where that can be."""
        shapes = {
            "seen": (1, 1, self.time, self.steps),
            "padding": (self.batch, 1, 1, self.steps),
            "lowest": (self.batch, 1, self.time, self.steps),
            "bias": (1, self.heads, self.time, self.steps),
        }
        mask = None
        if self.mask:
            mask = torch.rand(shapes[self.mask]) > 0.4
            mask[:, :, 2:3] = False
            mask[..., 1] |= self.mask == "padding"
        if self.mask == "lowest":  # as models write it: finite, and absorbs scores
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
        if self.mask == "bias":
            mask = torch.where(mask, torch.randn(shapes["bias"]), -torch.inf)
        return Scores(0.3, self.is_causal, mask)

    def arguments(self, dtype: torch.dtype) -> Arguments:
        batch, heads, groups, time, steps, d_in, d_out, *_ = self
        queries, keys = (batch, heads, time), (batch, groups, steps)
        shapes = [(*queries, d_in), (*keys, d_in), (*keys, d_out)]
        q, k, v, *direction = (torch.randn(shape).to(dtype) for shape in 2 * shapes)
        return Arguments(torch.randn(*queries, d_out).to(dtype), *direction, q, k, v)


class Arguments(NamedTuple):
    """A gradient of the outputs, a direction, and the inputs."""

    g: Tensor
    uq: Tensor
    uk: Tensor
    uv: Tensor
    q: Tensor
    k: Tensor
    v: Tensor

    def to(self, dtype: torch.dtype) -> Arguments:
        return Arguments(*(x.to(dtype) for x in self))


class Results(NamedTuple):
    """Outputs and gradients, and the tangents of both."""

    o: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor
    moved: Tensor
    turned_q: Tensor
    turned_k: Tensor
    turned_v: Tensor


def by_math(given: Arguments, scores: Scores) -> Results:
    """By PyTorch's plain form, and the derivative of <dq, uq> + <dk, uk> + <dv, uv>."""
    g, uq, uk, uv, *inputs = given
    g, *inputs = (x.detach().clone().requires_grad_() for x in (g, *inputs))
    mask = scores.mask
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(g.dtype)
    with sdpa_kernel(SDPBackend.MATH):
        o = F.scaled_dot_product_attention(
            *inputs, mask, 0.0, scores.is_causal, scale=scores.scale, enable_gqa=True
        )
    first = torch.autograd.grad(o, inputs, g, create_graph=True)
    second = torch.autograd.grad(first, (g, *inputs), (uq, uk, uv))
    return Results(*(x.detach() for x in (o, *first, *second)))


def _call(op: Op, *args: Any) -> Any:
    return op(*args)


def by_ops(
    given: Arguments, scores: Scores, run: Callable[..., Any] = _call
) -> Results:
    """By the ops, each called by `run(op, *arguments)`."""
    g, *direction = given[:4]
    inputs = given[4:]
    o, stats = run(ops.attention, *inputs, scores)
    first = run(ops.attention_gradients, g, *inputs, o, stats, scores)
    known = *direction, *inputs, o, stats
    moved, means = run(ops.attention_tangent, *known, scores)
    tangents = run(ops.attention_gradients_tangent, g, *known, moved, means, scores)
    return Results(o, *first, moved, *tangents)
