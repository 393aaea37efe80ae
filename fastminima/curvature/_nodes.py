"""What the recorded graph tells: its precision, and nodes that cannot be trusted."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "Survey",
    "explained",
    "faults_of",
    "foreign_leaves",
    "nodes_of",
    "place_of",
    "refuse_nodes",
    "survey",
]

# All functions made by `once_differentiable` share one code object.
_ONCE = once_differentiable(lambda *_: None).__code__
_MESSAGE = re.compile(
    r"derivative|differentia|double backward|numpy\(\)|Sparse|grad_fn", re.IGNORECASE
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
# Where 1 - p is computed from p near 1, or a logarithm from its argument near 1.
_SATURATING = ("Softmax", "Sigmoid", "Softplus", "BinaryCrossEntropy", "Log", "Exp")


@dataclass(frozen=True)
class Survey:
    """What the nodes of a graph say about its numbers.

    Attributes:
        eps: Machine precision of the narrowest floating dtype in it.
        dtype: That dtype.
        saturates: Whether a probability may come so near 1 that rounding is all that
            is left of its distance.
        functions: Names of functions written in Python (`torch.autograd.Function`).
    """

    eps: float
    dtype: torch.dtype
    saturates: bool
    functions: tuple[str, ...]

    def __or__(self, other: Survey) -> Survey:
        narrow = self if self.eps >= other.eps else other
        return Survey(
            narrow.eps,
            narrow.dtype,
            self.saturates or other.saturates,
            tuple(dict.fromkeys(self.functions + other.functions)),
        )


def nodes_of(roots: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the graphs of some tensors, each once, the last first."""
    waiting = [root.grad_fn for root in roots]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        yield node
        for child, _ in node.next_functions:
            if child not in seen:
                seen.add(child)
                waiting.append(child)


def survey(roots: Sequence[Tensor]) -> Survey:
    """The precision of a graph, and what in it may need more of it."""
    eps, narrow, saturates = 0.0, torch.float32, False
    functions: list[str] = []
    has_convolution = False
    for node in nodes_of(roots):
        for meta in node._input_metadata:
            dtype = meta.dtype
            if dtype.is_floating_point and torch.finfo(dtype).eps > eps:
                eps, narrow = torch.finfo(dtype).eps, dtype
        saturates = saturates or any(word in node.name() for word in _SATURATING)
        has_convolution = has_convolution or "Convolution" in node.name()
        function = getattr(node, "_forward_cls", None)
        if function is not None:
            functions.append(function.__name__)
    if narrow == torch.float32:
        narrow = _of_products(roots, has_convolution)
    return Survey(torch.finfo(narrow).eps, narrow, saturates, tuple(functions))


def _of_products(roots: Sequence[Tensor], has_convolution: bool) -> torch.dtype:
    """The dtype that is as precise as products of float32 matrices are here."""
    if torch.get_float32_matmul_precision() == "medium":
        return torch.bfloat16
    is_cuda = any(root.is_cuda for root in roots)
    if torch.get_float32_matmul_precision() == "high" or (
        is_cuda and has_convolution and torch.backends.cudnn.allow_tf32
    ):
        return torch.float16  # TF32 has as many digits
    return torch.float32


def refuse_nodes(roots: Sequence[Tensor], names: Mapping[int, str]) -> None:
    """ValueError for nodes whose second derivative is missing without a word.

    `names` are the parameters' names by `id`.
    """
    for fault in faults_of(roots, names):
        raise ValueError(f"The loss has no second derivative here: {fault}")


def faults_of(roots: Sequence[Tensor], names: Mapping[int, str]) -> Iterator[str]:
    """Each node whose second derivative is missing without a word, and what to do."""
    for node in nodes_of(roots):
        fault = _fault(node)
        if fault:
            yield f"{node.name()} ({place_of(node, names)}) {fault}"


def _fault(node: Any) -> str | None:
    function = getattr(node, "_forward_cls", None)
    if function is not None:
        if function.__module__.startswith("torch.utils.checkpoint"):
            return (
                "is a reentrant checkpoint: the parameters inside are not in the "
                "graph. Pass use_reentrant=False to checkpoint()."
            )
        if getattr(function.backward, "__code__", None) is _ONCE:
            return (
                f"is {function.__name__}, whose backward is marked once_differentiable "
                "and would count as constant. Write backward with differentiable "
                "operations on saved tensors, and drop the decorator."
            )
        return None
    if node.name().startswith("WeightNormInterface"):
        return (
            "is the fused weight norm, whose second derivative is wrong. Call "
            "torch._weight_norm or torch.nn.utils.parametrizations.weight_norm, which "
            "the operators write out, not torch.ops.aten."
        )
    if getattr(node, "_saved_sparse", False):
        return f"has sparse gradients. {_REMEDIES['Embedding']}"
    if getattr(node, "_saved_scale_grad_by_freq", False):
        return (
            "divides its gradients by how often an index occurs "
            "(scale_grad_by_freq=True): they are not those of the loss, and their "
            "derivatives no symmetric matrix. Use scale_grad_by_freq=False."
        )
    return None


def place_of(node: Any, names: Mapping[int, str]) -> str:
    """The layer of a node, by the nearest of the parameters below it."""
    waiting, seen = [node], {node}
    for upper in waiting:
        name = names.get(id(getattr(upper, "variable", None)))
        if name is not None:
            layer = name.rpartition(".")[0]
            return f"layer {layer!r}, {name}" if layer else f"parameter {name!r}"
        for child, _ in upper.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                waiting.append(child)
    return "no parameter of the model below it"


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


def foreign_leaves(roots: Sequence[Tensor], own: Mapping[int, str]) -> list[Tensor]:
    """Trainable tensors in a graph that are none of the parameters in `own`."""
    leaves = [getattr(node, "variable", None) for node in nodes_of(roots)]
    return [leaf for leaf in leaves if leaf is not None and id(leaf) not in own]
