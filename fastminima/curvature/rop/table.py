"""Which rule is whose."""

from __future__ import annotations

from typing import Any

from .convolution import Convolution
from .dense import Product
from .linear import MOVES, Moved, Picked, Sum
from .losses import ELEMENTWISE, ElementwiseLoss
from .normal import LayerNorm
from .pointwise import ACTIVATIONS, Activation, Quotient, Relu, Times
from .rule import NotCovered, Rule, Some, Universal
from .saved import Saved
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
    "SubBackward0": Sum,
    "MaxPool2DWithIndicesBackward0": Picked,
    **dict.fromkeys(MOVES, Moved),
    **dict.fromkeys(ACTIVATIONS, Activation),
    **dict.fromkeys(ELEMENTWISE, ElementwiseLoss),
}


_PLAIN = tuple(f"Backward{i}" for i in range(10))


def rule_of(node: Any, gradients: Some, saved: Saved) -> Rule:
    """The rule of a node, made with the gradients by its outputs.

    Raises:
        NotCovered: It is a function written in Python, assigns to a part of a tensor,
            or keeps tensors by hooks.
    """
    name = node.name()
    if not name.endswith(_PLAIN) or hasattr(node, "_forward_cls"):
        raise NotCovered(f"{name} is no operation of PyTorch's own.")
    saved.note(node)
    known = RULES.get(name, Universal)
    if known is ElementwiseLoss and not ElementwiseLoss.is_for(node):
        known = Universal
    if _is_scaled(node, name) or not _is_of_one_dtype(node):
        known = Universal
    return known(node, gradients)


def _is_scaled(node: Any, name: str) -> bool:
    """Whether a product is multiplied with a number, as by `torch.addmm(alpha=2)`."""
    return name == "AddmmBackward0" and (node._saved_alpha, node._saved_beta) != (1, 1)


def _is_of_one_dtype(node: Any) -> bool:
    """Whether inputs and outputs are; some nodes under autocast mix them."""
    uppers = [end for end in node.next_functions if end[0] is not None]
    dtypes = {upper._input_metadata[number].dtype for upper, number in uppers}
    return len(dtypes | {node._input_metadata[0].dtype}) == 1
