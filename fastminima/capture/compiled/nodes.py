"""What is asked of the nodes of a backward graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = [
    "COPIES",
    "NotTraced",
    "any_sizes_of",
    "args_of",
    "first",
    "is_zero",
    "node_of",
    "shape_of",
    "sizes_of",
    "stripped",
]

_aten = torch.ops.aten
COPIES = frozenset(
    [
        _aten._to_copy.default,
        _aten.alias.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        torch.ops.prims.convert_element_type.default,
    ]
)


class NotTraced(Exception):
    """A gradient is computed by an operation that nothing here knows."""


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node computes.

    Raises:
        NotTraced: where a size is not a number when the graph is compiled.
    """
    shape = tuple(node.meta["val"].shape)
    if not all(isinstance(size, int) for size in shape):
        raise NotTraced(f"{node.target} has sizes that change")
    return shape


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node computes, -1 for a size that changes.

    Raises:
        NotTraced: where there are several of these.
    """
    found = any_sizes_of(node)
    if found.count(-1) > 1:
        raise NotTraced(f"{node.target} has several sizes that change")
    return found


def any_sizes_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of what a node computes, -1 for sizes that change."""
    sizes = node.meta["val"].shape
    return tuple(size if isinstance(size, int) else -1 for size in sizes)


def stripped(node: fx.Node) -> fx.Node:
    """What a node was before it was copied or converted to more digits."""
    while node.target in COPIES and _is_exact(node):
        (node, *_) = node.all_input_nodes
    return node


def _is_exact(node: fx.Node) -> bool:
    (before, *_) = node.all_input_nodes
    dtypes = before.meta["val"].dtype, node.meta["val"].dtype
    return torch.promote_types(*dtypes) == dtypes[1]


def args_of(node: fx.Node) -> Any:
    """A node's arguments, whose kinds the operation knows."""
    return node.args


def first(node: fx.Node) -> fx.Node:
    """What a node is computed from first."""
    return node_of(args_of(node)[0])


def node_of(argument: Any) -> fx.Node:
    """An argument that is a node.

    Raises:
        NotTraced: where it is none.
    """
    if not isinstance(argument, fx.Node):
        raise NotTraced(f"a gradient comes from the number {argument}")
    return argument


def is_zero(node: fx.Node) -> bool:
    """Whether a node makes zeros."""
    if node.target in (_aten.zeros.default, _aten.new_zeros.default):
        return True
    if node.target in _FILLED:
        return bool(args_of(node)[_FILLED[node.target]] == 0)
    return node.target in COPIES | _SPREADING and is_zero(first(node))


# Where the number stands that all elements are.
_FILLED: dict[Any, int] = {
    _aten.full.default: 1,
    _aten.new_full.default: 2,
    _aten.scalar_tensor.default: 0,
}
_SPREADING = frozenset([_aten.expand.default, _aten.reshape.default])
