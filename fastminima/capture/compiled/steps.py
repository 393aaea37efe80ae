"""What only moves a gradient on its way to a parameter, and what adds gradients up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from .marks import Move
from .nodes import (
    COPIES,
    NotTraced,
    args_of,
    first,
    is_zero,
    node_of,
    shape_of,
    sizes_of,
)

__all__ = ["STEPS"]

_aten = torch.ops.aten
_Step = Callable[[fx.Node], Sequence[tuple[fx.Node, tuple[Move, ...]]]]


def _same(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    return [(first(node), ())]


def _reshaped(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    return [(first(node), (("reshape", sizes_of(node)),))]


def _expanded(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    if sizes_of(node) != sizes_of(first(node)):
        raise NotTraced("a gradient is expanded")
    return _same(node)


def _permuted(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    dims = range(node.meta["val"].dim())
    if node.target is _aten.permute.default:
        order = [dims[dim] for dim in args_of(node)[1]]
    else:
        order = list(dims)
        if order:
            a, b = (0, -1) if node.target is _aten.t.default else args_of(node)[1:3]
            order[a], order[b] = order[b], order[a]
    return [(first(node), (("permute", tuple(order)),))]


def _added(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    terms = args_of(node)[:2]
    if node.kwargs.get("alpha", 1) != 1 or len(node.all_input_nodes) != len(set(terms)):
        raise NotTraced("a gradient is a weighted sum")
    shapes = {sizes_of(node_of(term)) for term in terms}
    if len(shapes) > 1:
        raise NotTraced("a gradient is a sum with broadcasting")
    return [(node_of(term), ()) for term in terms]


def _scaled(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    factor: Any = -1 if node.target is _aten.neg.default else args_of(node)[1]
    if not isinstance(factor, int | float):
        raise NotTraced(f"a gradient comes from {node.target} of two tensors")
    if "div" in str(node.target):
        factor = 1 / factor
    return [(first(node), (("scale", float(factor)),))]


def _put_into(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    """`slice_scatter` and `select_scatter`, into zeros or what is put there before."""
    base, piece, dim, *rest = args_of(node)
    sizes = shape_of(node)
    dim = range(len(sizes))[dim]
    moves = _put(node.target is _aten.select_scatter.default, dim, sizes, rest)
    below = [(node_of(piece), moves)]
    if not is_zero(node_of(base)):
        if any(not is_zero(b) for b in _bases(node_of(base))):
            raise NotTraced("a gradient is written over another")
        below.append((node_of(base), ()))
    return below


def _put_back(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    """`slice_backward` and `select_backward`: into zeros of given sizes."""
    piece, _, dim, *rest = args_of(node)
    sizes = shape_of(node)
    dim = range(len(sizes))[dim]
    moves = _put(node.target is _aten.select_backward.default, dim, sizes, rest)
    return [(node_of(piece), moves)]


def _taken(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    """`slice` and `select` of the gradient of parameters that were joined."""
    dim, *rest = args_of(node)[1:] or (0,)
    sizes = shape_of(first(node))
    dim = range(len(sizes))[dim]
    if node.target is _aten.select.int:
        index = range(sizes[dim])[rest[0]]
        moves = ("take", dim, index, index + 1, 1), ("reshape", shape_of(node))
        return [(first(node), moves)]
    bounds = slice(*(*rest, None, None, None)[:3]).indices(sizes[dim])
    return [(first(node), (("take", dim, *bounds),))]


def _put(
    is_one: bool, dim: int, sizes: Sequence[int], rest: Sequence[Any]
) -> tuple[Move, ...]:
    size = sizes[dim]
    if is_one:
        index = range(size)[rest[0]]
        kept = (*sizes[:dim], 1, *sizes[dim + 1 :])
        return ("reshape", kept), ("put", dim, index, index + 1, 1, size)
    bounds = slice(*(*rest, None, None, None)[:3]).indices(size)
    return (("put", dim, *bounds, size),)


def _bases(node: fx.Node) -> Iterator[fx.Node]:
    """What is under all that was put into zeros, one after the other."""
    while node.target in (_aten.slice_scatter.default, _aten.select_scatter.default):
        node = first(node)
    yield node


def _joined(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    """`cat` of the parts that a parameter was split into."""
    parts, dim = args_of(node)[0], (*args_of(node), 0)[1]
    size = shape_of(node)
    dim = range(len(size))[dim]
    below, start = [], 0
    for part in parts:
        end = start + shape_of(node_of(part))[dim]
        if not is_zero(node_of(part)):
            below.append((node_of(part), (("put", dim, start, end, 1, size[dim]),)))
        start = end
    return below


def _stacked(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    parts, dim = args_of(node)[0], (*args_of(node), 0)[1]
    size = shape_of(node)
    dim = range(len(size))[dim]
    kept = ("reshape", (*size[:dim], 1, *size[dim + 1 :]))
    return [
        (node_of(part), (kept, ("put", dim, i, i + 1, 1, size[dim])))
        for i, part in enumerate(parts)
        if not is_zero(node_of(part))
    ]


def _padded(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    pads, value = args_of(node)[1], (*args_of(node), 0, 0)[2]
    sizes = list(shape_of(first(node)))
    if value != 0 or min(pads) < 0:
        raise NotTraced("a gradient is padded with numbers")
    moves = []
    for i in range(len(pads) // 2):
        before, behind = pads[2 * i : 2 * i + 2]
        dim, size = len(sizes) - 1 - i, sizes[-1 - i]
        if before or behind:
            whole = before + size + behind
            moves.append(("put", dim, before, before + size, 1, whole))
    return [(first(node), tuple(moves))]


STEPS: dict[Any, _Step] = {
    **dict.fromkeys(COPIES, _same),
    **dict.fromkeys(
        [
            _aten._unsafe_view.default,
            _aten.reshape.default,
            _aten.squeeze.default,
            _aten.squeeze.dim,
            _aten.squeeze.dims,
            _aten.unsqueeze.default,
            _aten.view.default,
        ],
        _reshaped,
    ),
    _aten.expand.default: _expanded,
    _aten.permute.default: _permuted,
    _aten.t.default: _permuted,
    _aten.transpose.int: _permuted,
    _aten.add.Tensor: _added,
    _aten.div.Scalar: _scaled,
    _aten.div.Tensor: _scaled,
    _aten.mul.Scalar: _scaled,
    _aten.mul.Tensor: _scaled,
    _aten.neg.default: _scaled,
    _aten.slice_scatter.default: _put_into,
    _aten.select_scatter.default: _put_into,
    _aten.slice_backward.default: _put_back,
    _aten.select_backward.default: _put_back,
    _aten.cat.default: _joined,
    _aten.select.int: _taken,
    _aten.slice.Tensor: _taken,
    _aten.constant_pad_nd.default: _padded,
    _aten.stack.default: _stacked,
}
