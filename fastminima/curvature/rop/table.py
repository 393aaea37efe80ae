"""Which rule is whose."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .convolution import Convolution
from .dense import Product
from .linear import MOVES, Moved, Picked, Sum
from .normal import LayerNorm
from .pointwise import ACTIVATIONS, Activation, Quotient, Relu, Times
from .rule import NotCovered, Rule, Some, Universal
from .softmax import LogSoftmax, Softmax

__all__ = ["rule_of"]

RULES: dict[str, type[Rule]] = {
    "AddmmBackward0": Product,
    "MmBackward0": Product,
    "BmmBackward0": Product,
    "ConvolutionBackward0": Convolution,
    "NativeLayerNormBackward0": LayerNorm,
    "SoftmaxBackward0": Softmax,
    "SafeSoftmaxBackward0": Softmax,
    "LogSoftmaxBackward0": LogSoftmax,
    "ReluBackward0": Relu,
    "MulBackward0": Times,
    "DivBackward0": Quotient,
    "AddBackward0": Sum,
    "MaxPool2DWithIndicesBackward0": Picked,
    **dict.fromkeys(MOVES, Moved),
    **dict.fromkeys(ACTIVATIONS, Activation),
}


_PLAIN = tuple(f"Backward{i}" for i in range(10))
_raw_names: dict[str, tuple[str, ...]] = {}  # by the name of a node


def rule_of(node: Any, gradients: Some) -> Rule:
    """The rule of a node, made with the gradients by its outputs.

    Raises:
        NotCovered: It is a function written in Python, assigns to a part of a tensor,
            or keeps tensors by hooks (activation checkpointing).
    """
    name = node.name()
    if not name.endswith(_PLAIN) or hasattr(node, "_forward_cls"):
        raise NotCovered(f"{name} is no operation of PyTorch's own.")
    if any(map(_is_hooked, _raws(node))):
        raise NotCovered(
            f"{name} keeps tensors by hooks, as activation checkpointing does."
        )
    known = RULES.get(name, Universal)
    covers = getattr(known, "covers", None)
    if covers is not None and not covers(node):
        known = Universal
    return known(node, gradients)


def _raws(node: Any) -> Iterator[Any]:
    name = node.name()
    if name not in _raw_names:
        words = (word for word in dir(node) if word.startswith("_raw_saved_"))
        _raw_names[name] = tuple(words)
    for word in _raw_names[name]:
        raw = getattr(node, word)
        yield from raw if isinstance(raw, list | tuple) else (raw,)


def _is_hooked(raw: Any) -> bool:
    return getattr(raw, "unpack_hook", None) is not None
