"""Says which node lacks a second derivative, where PyTorch names an operation."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._nodes import nodes_of, place_of

__all__ = ["explained"]

_MESSAGE = re.compile(
    r"derivative|differentia|double backward|autograd formula|numpy\(\)|Sparse|grad_fn",
    re.IGNORECASE,
)
_OPERATION = re.compile(r"derivative for '?(?:aten::)?(\w+)")
_REMEDIES = {
    "EmbeddingBag": "Use nn.Embedding and a sum or mean over the bag.",
    "Embedding": "Use nn.Embedding(..., sparse=False).",
    "Cdist": "Write the distances out: (x[:, None] - y).square().sum(-1).sqrt().",
    "Pdist": "Write the distances out: (x[:, None] - x).square().sum(-1).sqrt().",
    "ScaledDotProduct": "Leave out the sdpa_kernel(...) inside the closure: the "
    "operators choose a form of attention that can be differentiated twice.",
    "Rnn": "Run it under torch.backends.cudnn.flags(enabled=False).",
    "ChannelShuffle": "Use F.channel_shuffle or reshape and transpose.",
    "channel_shuffle": "Use reshape and transpose.",
    "multi_head_attention": "Call nn.MultiheadAttention, which the operators record in "
    "a form that can be differentiated twice.",
    "Gamma": "Draw outside the closure, or use a distribution with another rsample.",
    "Dirichlet": "Draw outside the closure, or use another distribution.",
    "MultiMargin": "Write the margin out with clamp(min=0).",
    "MultilabelMargin": "Use F.multilabel_soft_margin_loss.",
    "SegmentReduce": "Use torch.scatter_reduce.",
    "CtcLoss": "Leave that loss out, or freeze the layers before it.",
}
_MISSING = "torch::autograd::NotImplemented"  # an operation without a derivative


@contextlib.contextmanager
def explained(
    roots: Sequence[Tensor], names: Mapping[int, str], closure: str
) -> Iterator[None]:
    """Around derivatives: says which node lacks one, and what to use instead.

    Raises:
        ValueError: In the place of PyTorch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        message = str(error).partition("\n")[0][:200]
        if not _MESSAGE.search(message):
            raise
        raise ValueError(
            f"The gradient of {closure} cannot be differentiated once more"
            f"{_culprit(message, roots, names)} PyTorch says: {message}"
        ) from error


def _culprit(message: str, roots: Sequence[Tensor], names: Mapping[int, str]) -> str:
    named = _OPERATION.search(message)
    node = _node_of(named[1], roots) if named else None
    if named and node is not None:
        met = node.name() if node.name() != _MISSING else named[1]
        known = f"{met} {named[1]}"
        remedy = next((r for n, r in _REMEDIES.items() if n in known), "")
        return (
            f": {met} ({place_of(node, names)}) has no second derivative. "
            f"{remedy or 'Use other operations there.'}"
        )
    functions = [
        f"{node.name()} ({place_of(node, names)})"
        for node in nodes_of(roots)
        if hasattr(node, "_forward_cls")
    ]
    if functions:
        return (
            f". The suspects are functions written in Python: {', '.join(functions)}; "
            "their backward must consist of differentiable operations."
        )
    return ". Use operations there that have a second derivative."


def _node_of(operation: str, roots: Sequence[Tensor]) -> Any:
    """The node that an operation without a derivative belongs to, or None.

    One of its name; else one whose name it begins with, as in
    `_embedding_bag_per_sample_weights_backward`; else one without any derivative.
    """
    core, best, longest = _core(operation), None, 3
    for node in nodes_of(roots):
        own = _core(node.name())
        if own == core:
            return node
        stem = own.removesuffix("backward")
        if core.startswith(stem) and len(stem) > longest:
            best, longest = node, len(stem)
        if best is None and node.name() == _MISSING:
            best = node
    return best


def _core(name: str) -> str:
    """`_embedding_bag_backward` and `EmbeddingBagBackward0` alike."""
    return re.sub(r"[^a-z]", "", name.rpartition("::")[2].lower())
