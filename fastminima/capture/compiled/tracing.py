"""From a parameter's gradient in a backward graph back to the uses it is a sum of.

    mm(permute(g), a) -> add <- slice_scatter(0, mm(permute(h), b), 0, 2, 5)
    the gradient is `add`; its uses are two products, of which one is put into rows 2-4

The graph is the one that AOTAutograd gives to a compiler: of functional operations,
some of which are taken apart already.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from .marks import Move

__all__ = [
    "Found",
    "NotTraced",
    "any_sizes_of",
    "found_in",
    "is_zero",
    "shape_of",
    "sizes_of",
    "stripped",
]

_aten = torch.ops.aten


class NotTraced(Exception):
    """A gradient is computed by an operation that nothing here knows."""


class Found(NamedTuple):
    """A use's own gradient, and its way to the parameter's.

    Attributes:
        factors: tensors that it is multiplied by on the way, by the numbers that the
            moves have.
    """

    node: fx.Node
    moves: tuple[Move, ...]
    factors: tuple[fx.Node, ...] = ()


def found_in(grad: fx.Node, above: Container[fx.Node]) -> list[Found]:
    """What a parameter's gradient is a sum of.

    Args:
        grad: the gradient.
        above: the nodes that are computed from output gradients.

    Raises:
        NotTraced: where one of the summands is none of the uses that are known.
    """
    return list(_trace(Found(grad, ()), above))


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
    while node.target in _COPIES and _is_exact(node):
        (node, *_) = node.all_input_nodes
    return node


def _is_exact(node: fx.Node) -> bool:
    (before, *_) = node.all_input_nodes
    dtypes = before.meta["val"].dtype, node.meta["val"].dtype
    return torch.promote_types(*dtypes) == dtypes[1]


def _trace(after: Found, above: Container[fx.Node]) -> Iterator[Found]:
    """The summands of a node, whose moves end with those that come after it."""
    node = after.node
    if node.target in USES or _is_part_of_use(node):
        yield after
        return
    if node.target is _aten.mul.Tensor and isinstance(_args(node)[1], fx.Node):
        yield from _trace(_multiplied(after, above), above)
        return
    step = _STEPS.get(node.target)
    if step is None:
        raise NotTraced(f"a gradient comes from {node.target}")
    for below, moves in step(node):
        found = Found(below, (*moves, *after.moves), after.factors)
        yield from _trace(found, above)


def _multiplied(after: Found, above: Container[fx.Node]) -> Found:
    """What is multiplied by a tensor that is the same for all samples."""
    terms = [_node(term) for term in after.node.args[:2]]
    data = [term for term in terms if term in above]
    if len(data) != 1:
        raise NotTraced("a gradient is a product of two")
    (term,) = data
    (factor,) = (other for other in terms if other is not term)
    if sizes_of(term) != sizes_of(after.node):
        raise NotTraced("a gradient is multiplied with broadcasting")
    moves = (("times", len(after.factors)), *after.moves)
    return Found(term, moves, (*after.factors, factor))


_Step = Callable[[fx.Node], Sequence[tuple[fx.Node, tuple[Move, ...]]]]


def _same(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    return [(_first(node), ())]


def _reshaped(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    return [(_first(node), (("reshape", sizes_of(node)),))]


def _expanded(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    if sizes_of(node) != sizes_of(_first(node)):
        raise NotTraced("a gradient is expanded")
    return _same(node)


def _permuted(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    dims = range(node.meta["val"].dim())
    if node.target is _aten.permute.default:
        order = [dims[dim] for dim in _args(node)[1]]
    else:
        order = list(dims)
        if order:
            a, b = (0, -1) if node.target is _aten.t.default else _args(node)[1:3]
            order[a], order[b] = order[b], order[a]
    return [(_first(node), (("permute", tuple(order)),))]


def _added(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    terms = _args(node)[:2]
    if node.kwargs.get("alpha", 1) != 1 or len(node.all_input_nodes) != len(set(terms)):
        raise NotTraced("a gradient is a weighted sum")
    shapes = {sizes_of(_node(term)) for term in terms}
    if len(shapes) > 1:
        raise NotTraced("a gradient is a sum with broadcasting")
    return [(_node(term), ()) for term in terms]


def _scaled(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    factor: Any = -1 if node.target is _aten.neg.default else _args(node)[1]
    if not isinstance(factor, int | float):
        raise NotTraced(f"a gradient comes from {node.target} of two tensors")
    if "div" in str(node.target):
        factor = 1 / factor
    return [(_first(node), (("scale", float(factor)),))]


def _put_into(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    """`slice_scatter` and `select_scatter`, into zeros or what is put there before."""
    base, piece, dim, *rest = _args(node)
    sizes = shape_of(node)
    dim = range(len(sizes))[dim]
    moves = _put(node.target is _aten.select_scatter.default, dim, sizes, rest)
    below = [(_node(piece), moves)]
    if not is_zero(_node(base)):
        if any(not is_zero(b) for b in _bases(_node(base))):
            raise NotTraced("a gradient is written over another")
        below.append((_node(base), ()))
    return below


def _put_back(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    """`slice_backward` and `select_backward`: into zeros of given sizes."""
    piece, _, dim, *rest = _args(node)
    sizes = shape_of(node)
    dim = range(len(sizes))[dim]
    moves = _put(node.target is _aten.select_backward.default, dim, sizes, rest)
    return [(_node(piece), moves)]


def _put(
    is_one: bool, dim: int, sizes: Sequence[int], rest: Sequence[Any]
) -> tuple[Move, ...]:
    size = sizes[dim]
    if is_one:
        index = range(size)[rest[0]]
        kept = (*sizes[:dim], 1, *sizes[dim + 1 :])
        return ("reshape", kept), ("put", dim, index, index + 1, 1, size)
    start, end, step = (*rest, *(None, None, None)[len(rest) :])
    bounds = slice(start, end, step).indices(size)
    return (("put", dim, *bounds, size),)


def _bases(node: fx.Node) -> Iterator[fx.Node]:
    """What is under all that was put into zeros, one after the other."""
    while node.target in (_aten.slice_scatter.default, _aten.select_scatter.default):
        node = _first(node)
    yield node


def _joined(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    """`cat` of the parts that a parameter was split into."""
    parts, dim = _args(node)[0], (*_args(node), 0)[1]
    size = shape_of(node)
    dim = range(len(size))[dim]
    below, start = [], 0
    for part in parts:
        end = start + shape_of(_node(part))[dim]
        if not is_zero(_node(part)):
            below.append((_node(part), (("put", dim, start, end, 1, size[dim]),)))
        start = end
    return below


def _stacked(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    parts, dim = _args(node)[0], (*_args(node), 0)[1]
    size = shape_of(node)
    dim = range(len(size))[dim]
    kept = ("reshape", (*size[:dim], 1, *size[dim + 1 :]))
    return [
        (_node(part), (kept, ("put", dim, i, i + 1, 1, size[dim])))
        for i, part in enumerate(parts)
        if not is_zero(_node(part))
    ]


def _padded(node: fx.Node) -> Sequence[tuple[fx.Node, tuple[Move, ...]]]:
    pads, value = _args(node)[1], (*_args(node), 0, 0)[2]
    sizes = list(shape_of(_first(node)))
    if value != 0 or min(pads) < 0:
        raise NotTraced("a gradient is padded with numbers")
    moves = []
    for i in range(len(pads) // 2):
        before, behind = pads[2 * i : 2 * i + 2]
        dim, size = len(sizes) - 1 - i, sizes[-1 - i]
        if before or behind:
            whole = before + size + behind
            moves.append(("put", dim, before, before + size, 1, whole))
    return [(_first(node), tuple(moves))]


_COPIES = frozenset(
    [
        _aten._to_copy.default,
        _aten.alias.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        torch.ops.prims.convert_element_type.default,
    ]
)
_STEPS: dict[Any, _Step] = {
    **dict.fromkeys(_COPIES, _same),
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
    _aten.constant_pad_nd.default: _padded,
    _aten.stack.default: _stacked,
}
# Operations that sum over samples, as far as a use is known by them.
USES = frozenset(
    [
        _aten._unsafe_index_put.default,
        _aten._unsafe_masked_index_put_accumulate.default,
        _aten.bmm.default,
        _aten.embedding_dense_backward.default,
        _aten.index_add.default,
        _aten.index_put.default,
        _aten.mm.default,
        _aten.sum.default,
        _aten.sum.dim_IntList,
    ]
)
PARTS_OF_USES = frozenset(
    [
        _aten._fused_rms_norm_backward.default,
        _aten.convolution_backward.default,
        _aten.native_batch_norm_backward.default,
        _aten.native_group_norm_backward.default,
        _aten.native_layer_norm_backward.default,
    ]
)


def _is_part_of_use(node: fx.Node) -> bool:
    """Whether a node takes one of several results of a use."""
    name = getattr(node.target, "__name__", "")
    return name == "getitem" and _first(node).target in PARTS_OF_USES


def _args(node: fx.Node) -> Any:
    """A node's arguments, whose kinds the operation knows."""
    return node.args


def _first(node: fx.Node) -> fx.Node:
    return _node(_args(node)[0])


def _node(argument: Any) -> fx.Node:
    if not isinstance(argument, fx.Node):
        raise NotTraced(f"a gradient comes from the number {argument}")
    return argument


def is_zero(node: fx.Node) -> bool:
    """Whether a node makes zeros."""
    if node.target in (_aten.zeros.default, _aten.new_zeros.default):
        return True
    if node.target in (_aten.full.default, _aten.new_full.default):
        value = _args(node)[1 if node.target is _aten.full.default else 2]
        return bool(value == 0)
    return node.target in _COPIES | _SPREADING and is_zero(_first(node))


_SPREADING = frozenset([_aten.expand.default, _aten.reshape.default])
