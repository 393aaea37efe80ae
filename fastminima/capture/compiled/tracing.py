"""From a parameter's gradient in a backward graph back to the uses it is a sum of.

    mm(permute(g), a) -> add <- slice_scatter(0, mm(permute(h), b), 0, 2, 5)
    the gradient is `add`; its uses are two products, of which one is put into rows 2-4

The graph is the one that AOTAutograd gives to a compiler: of functional operations,
some of which are taken apart already.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from torch import fx

from .marks import Move
from .nodes import NotTraced, args_of, first, is_zero, node_of, sizes_of
from .operations import INPUTS, RESULTS
from .steps import STEPS

__all__ = ["Found", "found_in"]

_aten = torch.ops.aten


class Found(NamedTuple):
    """A use's own gradient, and its way to the parameter's.

    Attributes:
        factors: tensors that it is multiplied by on the way, or that say where it is
            kept, by the numbers that the moves have.
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


def _trace(after: Found, above: Container[fx.Node]) -> Iterator[Found]:
    """The summands of a node, whose moves end with those that come after it."""
    node = after.node
    if node.target in INPUTS or _is_part_of_use(node):
        yield after
        return
    if node.target is _aten.mul.Tensor and isinstance(args_of(node)[1], fx.Node):
        yield from _trace(_multiplied(after, above), above)
        return
    if node.target in _MASKS:
        yield from _trace(_masked(after, above), above)
        return
    step = STEPS.get(node.target)
    if step is None:
        raise NotTraced(f"a gradient comes from {node.target}")
    for below, moves in step(node):
        found = Found(below, (*moves, *after.moves), after.factors)
        yield from _trace(found, above)


def _multiplied(after: Found, above: Container[fx.Node]) -> Found:
    """What is multiplied by a tensor that is the same for all samples."""
    terms = [node_of(term) for term in after.node.args[:2]]
    data = [term for term in terms if term in above]
    if len(data) != 1:
        raise NotTraced("a gradient is a product of two")
    (term,) = data
    (factor,) = (other for other in terms if other is not term)
    if sizes_of(term) != sizes_of(after.node):
        raise NotTraced("a gradient is multiplied with broadcasting")
    moves = (("times", len(after.factors)), *after.moves)
    return Found(term, moves, (*after.factors, factor))


_MASKS = (_aten.where.self, _aten.masked_fill.Scalar)


def _masked(after: Found, above: Container[fx.Node]) -> Found:
    """What is zero in some places, which are the same for all samples."""
    if after.node.target is _aten.where.self:
        mask, chosen, other = map(node_of, after.node.args)
        is_kept = is_zero(other)
        term = chosen if is_kept else other
        is_masked = is_kept or is_zero(chosen)
    else:
        x, marked, value = args_of(after.node)
        term, mask, is_kept, is_masked = node_of(x), node_of(marked), False, value == 0
    if not is_masked or mask in above:
        raise NotTraced(f"a gradient comes from {after.node.target}")
    if sizes_of(term) != sizes_of(after.node):
        raise NotTraced("a gradient is masked with broadcasting")
    moves = (("where", len(after.factors), is_kept), *after.moves)
    return Found(term, moves, (*after.factors, mask))


def _is_part_of_use(node: fx.Node) -> bool:
    """Whether a node takes one of several results of a use."""
    name = getattr(node.target, "__name__", "")
    return name == "getitem" and first(node).target in RESULTS
