"""What the recorded graph tells: its precision, and nodes that cannot be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "Survey",
    "faults_of",
    "foreign_leaves",
    "nodes_of",
    "place_of",
    "refuse_nodes",
    "survey",
]

# All functions made by `once_differentiable` share one code object.
_ONCE = once_differentiable(lambda *_: None).__code__
_OWN = f"{__package__}."  # whose functions have second derivatives, as tests say
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
        functions: Names of functions written in Python (`torch.autograd.Function`),
            but for those of this package.
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
        if function is not None and not (function.__module__ or "").startswith(_OWN):
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
        if (function.__module__ or "").startswith("torch.utils.checkpoint"):
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
        return "has sparse gradients. Use nn.Embedding(..., sparse=False)."
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


def foreign_leaves(roots: Sequence[Tensor], own: Mapping[int, str]) -> list[Tensor]:
    """Trainable tensors in a graph that are none of the parameters in `own`."""
    leaves = [getattr(node, "variable", None) for node in nodes_of(roots)]
    return [leaf for leaf in leaves if leaf is not None and id(leaf) not in own]
