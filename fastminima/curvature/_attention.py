"""Attention that can be differentiated twice and never holds all of its scores.

PyTorch's fused attention has no second derivative, and its plain one keeps several
matrices of the size of the scores, queries x keys of every head, for as long as the
graph lives. Here the graph keeps queries, keys, values, outputs and two numbers a row;
scores are made again, a piece at a time, in each pass (`ops.attention`).
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.autograd.function import Function

from ..ops import attention as ops
from ..ops.attention import Scores

__all__ = ["attend", "multi_head_attend"]

# Bytes of the scores, in the accumulation dtype, below which a CPU keeps them.
LARGE = 16 << 20


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention`, without its scores where that is worth it."""
    q, k, v, mask = _cast(query, key, value, attn_mask)
    is_plain = dropout_p == 0 and not (is_causal and attn_mask is not None)
    if is_plain and _fits(q, k, v, mask, enable_gqa) and _pays(q, k):
        mask = None if mask is None else mask[(None,) * (4 - mask.dim())]
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return SoftmaxAttention.apply(q, k, v, mask, scale, is_causal)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


def _cast(*tensors: Any) -> list[Any]:
    """What an autocast would make of the arguments."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(
        first.device.type
    ):
        return list(tensors)
    dtype = torch.get_autocast_dtype(first.device.type)
    return [
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in _FLOATS else x
        for x in tensors
    ]


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _fits(q: Any, k: Any, v: Any, mask: Any, enable_gqa: bool) -> bool:
    """Whether these are ordinary arguments, of sizes that go together."""
    given = [x for x in (q, k, v, mask) if x is not None]
    if not all(type(x) in (Tensor, torch.nn.Parameter) for x in given):
        return False
    if (
        any(x.layout != torch.strided or x.is_nested for x in given)
        or _is_transformed()
    ):
        return False
    if not torch.backends.cuda.math_sdp_enabled():
        return False  # another form was asked for inside the closure
    if not (q.dim() == k.dim() == v.dim() == 4 and q.is_floating_point()):
        return False
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return False
    batch, heads, time, width = q.shape
    groups, steps = k.shape[1:3]
    is_one = k.shape == (batch, groups, steps, width)
    is_one = is_one and v.shape[:3] == k.shape[:3] and 0 not in (*q.shape, *v.shape)
    shares = heads == groups or (enable_gqa and groups and heads % groups == 0)
    if not (is_one and steps and shares):
        return False
    return mask is None or _is_mask(mask, (batch, heads, time, steps), q)


def _is_mask(mask: Tensor, shape: tuple[int, ...], q: Tensor) -> bool:
    """Whether a mask is constant and broadcasts to the scores."""
    if mask.requires_grad or mask.device != q.device or mask.dim() > 4:
        return False
    if mask.dtype != torch.bool and mask.dtype not in (q.dtype, torch.float32):
        return False
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    return all(n in (1, size) for n, size in zip(sizes, shape, strict=True))


def _is_transformed() -> bool:
    """Whether `torch.func` or forward-mode derivatives look at what is computed."""
    is_function = _functorch.peek_interpreter_stack() is not None
    return is_function or forward_ad._current_level >= 0


def _pays(q: Tensor, k: Tensor) -> bool:
    """Whether scores are too large to keep; on a GPU, it is faster besides."""
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * max(4, q.itemsize)
    return q.is_cuda or scores > LARGE


class SoftmaxAttention(Function):
    """Attention whose backward is a function with a backward of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
    ) -> Tensor:
        with _plain(q):
            o, stats = ops.attention(q, k, v, Scores(scale, is_causal, mask))
        ctx.save_for_backward(q, k, v, mask, o, stats)
        ctx.form = scale, is_causal
        return o

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, o, stats = ctx.saved_tensors
        scale, is_causal = ctx.form
        scores = Scores(scale, is_causal, mask)
        found = AttentionGradients.apply(*gradients, q, k, v, o.detach(), stats, scores)
        return *found, None, None, None


class AttentionGradients(Function):
    """The gradients by q, k and v as a function of g, q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        stats: Tensor,
        scores: Scores,
    ) -> tuple[Tensor, ...]:
        with _plain(q):
            found = ops.attention_gradients(g, q, k, v, o, stats, scores)
        ctx.save_for_backward(g, q, k, v, o, stats, scores.mask)
        ctx.form = scores[:2]
        return found

    @staticmethod
    def backward(ctx: Any, *direction: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives of <dq, uq> + <dk, uk> + <dv, uv>; see `ops.attention`."""
        g, *inputs, mask = ctx.saved_tensors
        scale, is_causal = ctx.form
        scores = Scores(scale, is_causal, mask)
        with torch.no_grad(), _plain(g):
            moved, means = ops.attention_tangent(*direction, *inputs, scores)
            found = (moved, None, None, None)
            if _asks_for_inputs(ctx):
                found = (
                    moved,
                    *ops.attention_gradients_tangent(
                        g, *direction, *inputs, moved, means, scores
                    ),
                )
        if torch.is_grad_enabled():
            found = _Last.apply(found, g, *direction, *inputs[:3])
        return *found, None, None, None


class _Last(Function):
    """Passes second derivatives on, and refuses to be differentiated itself."""

    @staticmethod
    def forward(ctx: Any, found: tuple[Tensor | None, ...], *_: Tensor) -> Any:
        return tuple(x if x is None else x.view_as(x) for x in found)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            "A third derivative of attention was asked for: the operators' form of it "
            "has two. Write it out, (q @ k.mT * scale).softmax(-1) @ v, in the model."
        )


def _plain(x: Tensor) -> torch.autocast:
    """Without an autocast, which has been applied."""
    return torch.autocast(x.device.type, enabled=False)


def _asks_for_inputs(ctx: Any) -> bool:
    """Whether derivatives by q, k or v are asked for: J v takes that by g alone."""
    if torch._C._current_graph_task_id() == -1:
        return True
    nodes = [node for node, _ in ctx.next_functions[1:4] if node is not None]
    return any(
        not node.next_functions or torch._C._will_engine_execute_node(node)
        for node in nodes
    )


def _with_globals(function: Callable[..., Any], **others: Any) -> Callable[..., Any]:
    """A function of PyTorch's with some of the names that it reads exchanged."""
    code, names = function.__code__, {**function.__globals__, **others}
    twin = types.FunctionType(code, names, function.__name__, function.__defaults__)
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


# Modes are off inside a function that a mode has intercepted, so the call of attention
# inside it has to be another.
multi_head_attend = _with_globals(
    F.multi_head_attention_forward,
    scaled_dot_product_attention=attend,
    has_torch_function=lambda _: False,
)
