"""Nodes that only move elements: the gradient of what came in, by tensor operations.

The nodes do the same when they are called, but not in a pass that leaves the gradients
of their parameters out: there they return nothing.

    w [3, 4] -> permute(1, 0) -> [4, 3]        the gradient [4, 3] is permuted back
    w [9, 4] -> [2:5] -> [3, 4]                the gradient [3, 4] goes to rows 2 to 4
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from ..graph.node import Node
from ..graph.nodes import REARRANGING, REORDERING, TRANSPOSING
from ..graph.tape import signed

__all__ = ["Move", "is_known", "move_of", "turns_of"]

Move = Callable[[Tensor], Tensor]

_SHAPING = ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Alias")
_TAKING = ("Slice", "Select", "Split", "SplitWithSizes", "UnsafeSplit", "Unbind")


def _function(name: str) -> str:
    """`View` of `ViewBackward0`."""
    return name.rsplit("Backward", 1)[0]


def is_known(name: str) -> bool:
    """Whether `move_of` has an answer for nodes of that name."""
    known = (*_SHAPING, *_TAKING, "Clone", "ToCopy")
    return name in REORDERING or (name in REARRANGING and _function(name) in known)


def turns_of(nodes: Sequence[Node], names: Sequence[str]) -> bool | None:
    """Whether nodes swap the dims of a matrix, altogether; None if they do more."""
    is_turned = False
    for node, name in zip(nodes, names, strict=True):
        if name in REORDERING:
            is_turned ^= _dims(node, name, 2) == [1, 0]
        elif _function(name) not in ("Clone", "ToCopy"):
            return None
    return is_turned


def move_of(node: Node, name: str, output: int, number: int) -> Move:
    """The gradient of a node's input of that number from that of one of its outputs.

    What is returned does not hold the node.
    """
    child, at = node.next_functions[number]
    shape = tuple(child._input_metadata[at].shape)
    if _function(name) in ("Clone", "ToCopy"):
        return lambda t: t
    if name in REORDERING:
        dims = _dims(node, name, len(shape))
        back = sorted(range(len(dims)), key=dims.__getitem__)
        return lambda t: t.permute(back)
    if _function(name) in _SHAPING:
        return lambda t: t.reshape(shape)
    place = _taken(node, _function(name), output, len(shape))

    def put(t: Tensor) -> Tensor:
        whole = t.new_zeros(shape)
        whole[place] = t
        return whole

    return put


def _dims(node: Node, name: str, count: int) -> list[int]:
    """Which dim of its input each dim of the output is."""
    if name not in TRANSPOSING:
        return [signed(dim) % count for dim in node._saved_dims]
    if name.startswith("Transpose"):
        first, second = signed(node._saved_dim0), signed(node._saved_dim1)
    else:  # `t`, of two dims at most
        first, second = 0, -1
    dims = list(range(count))
    if count:
        dims[first], dims[second] = dims[second], dims[first]
    return dims


def _taken(node: Node, function: str, output: int, count: int) -> tuple[Any, ...]:
    """The index by which a node takes its output, of a tensor of so many dims."""
    before = (slice(None),) * (signed(node._saved_dim) % count)
    if function == "Select":
        return *before, signed(node._saved_index)
    if function == "Unbind":
        return *before, output
    if function == "Slice":
        ends = (node._saved_start, node._saved_end)
        start, end = (None if i is None else signed(i) for i in ends)
        return *before, slice(start, end, node._saved_step)
    if function == "SplitWithSizes":
        bounds = [0, *accumulate(node._saved_split_sizes)]
        return *before, slice(bounds[output], bounds[output + 1])
    size = node._saved_split_size
    return *before, slice(output * size, (output + 1) * size)
