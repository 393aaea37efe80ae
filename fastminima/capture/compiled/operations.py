"""Which eager node an operation of a backward graph is, and what it would have saved.

    mm(permute(g), a)             AddmmBackward0, which saved a
    sum(t, [0, 1])                AddBackward0: what it adds up is the node's gradient
    index_put(zeros, [ids], g)    IndexBackward0, which saved ids

The rules of these nodes read a mark as they read the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .marks import Into, Move
from .nodes import NotTraced, any_sizes_of, is_zero, node_of, stripped

__all__ = [
    "INPUTS",
    "RESULTS",
    "SUMS",
    "Candidate",
    "candidate_of",
    "entering",
    "result_of",
    "summed_dims",
]

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: "AddmmBackward0", _aten.bmm.default: "BmmBackward0"}
SUMS = (_aten.sum.default, _aten.sum.dim_IntList)


@dataclass
class Candidate:
    """A use on its way to a mark.

    Attributes:
        node: the operation.
        name: of the eager node.
        g: the output gradient.
        saved: other tensors, by the names under which an eager node has them.
        behind: the look-up that this use may stand for.
    """

    node: fx.Node
    name: str
    g: fx.Node
    saved: Sequence[tuple[str, fx.Node]]
    constants: dict[str, Any] = field(default_factory=dict)
    into: list[Into] = field(default_factory=list)
    behind: fx.Node | None = None

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two matrices, or of a batch of them."""
        return self.node.target in _PRODUCTS


# Of operations that sum over samples, as far as uses are known by them: which input of
# the eager node the result is the gradient of.
INPUTS: dict[Any, int] = {
    _aten._unsafe_index_put.default: 0,
    _aten._unsafe_masked_index_put_accumulate.default: 0,
    _aten.bmm.default: 1,
    _aten.embedding_dense_backward.default: 0,
    _aten.index_add.default: 0,
    _aten.index_put.default: 0,
    _aten.mm.default: 2,
    _aten.sum.default: 0,
    _aten.sum.dim_IntList: 0,
}
# Of operations with several results: which input each of them is the gradient of.
RESULTS: dict[Any, dict[int, int]] = {
    _aten._fused_rms_norm_backward.default: {1: 1},
    _aten.convolution_backward.default: {1: 1, 2: 2},
    _aten.native_batch_norm_backward.default: {1: 1, 2: 2},
    _aten.native_group_norm_backward.default: {1: 1, 2: 2},
    _aten.native_layer_norm_backward.default: {1: 1, 2: 2},
}


def result_of(node: fx.Node) -> tuple[fx.Node, int | None, int]:
    """The operation, which of its results this is, and the input it belongs to."""
    if node.op == "call_function" and node.target not in INPUTS:
        operation, number = node.args
        assert isinstance(operation, fx.Node)
        assert isinstance(number, int)
        if number not in RESULTS[operation.target]:
            raise NotTraced(f"a parameter is what {operation.target} is a gradient of")
        return operation, number, RESULTS[operation.target][number]
    return node, None, INPUTS[node.target]


def entering(
    use: Candidate, result: fx.Node, number: int | None
) -> tuple[tuple[int, ...], tuple[Move, ...]]:
    """The shape in which a parameter enters a use, and moves to the use's result."""
    shape = any_sizes_of(result)
    if use.is_product:
        if not use.constants["is_left"]:
            return shape, ()
        turned = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
        return tuple(shape[i] for i in turned), (("permute", turned),)
    if use.node.target in SUMS:
        kept = _kept(use.node)
        return kept, () if kept == shape else (("reshape", shape),)
    return shape, ()


def _kept(node: fx.Node) -> tuple[int, ...]:
    """The shape of a sum that keeps its dims, as long as parameters go, 1 before."""
    summed = summed_dims(node)
    sizes = any_sizes_of(_argument(node))
    return tuple(1 if dim in summed else size for dim, size in enumerate(sizes))


def _keeps_last(node: fx.Node) -> bool:
    """Whether a sum is over all dims but the last."""
    return summed_dims(node) == set(range(_argument(node).meta["val"].dim() - 1))


def summed_dims(node: fx.Node) -> set[int]:
    """The dims that a sum is over."""
    count = _argument(node).meta["val"].dim()
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return {range(count)[dim] for dim in dims} if dims else set(range(count))


def _name_of(product: fx.Node) -> str:
    return _PRODUCTS[product.target]  # type: ignore[index]


def _argument(node: fx.Node) -> fx.Node:
    (argument, *_) = node.args
    assert isinstance(argument, fx.Node)
    return argument


def candidate_of(node: fx.Node, above: set[fx.Node]) -> Candidate:
    """What an operation is, as an eager node."""
    args: Any = node.args
    if node.target in _PRODUCTS:
        is_left, is_right = (factor in above for factor in args)
        if is_left == is_right:
            raise NotTraced(f"both or none of the factors of {node.target} are data")
        saved = "mat1" if node.target is _aten.mm.default else "self"
        g, other = args if is_left else args[::-1]
        constants = {"is_left": is_left, "alpha": 1, "beta": 1}
        return Candidate(node, _name_of(node), g, [(saved, other)], constants)
    if node.target in SUMS:
        constants = {"alpha": 1, "keeps_last": _keeps_last(node)}
        return Candidate(node, "AddBackward0", stripped(args[0]), [], constants)
    if node.target is _aten.convolution_backward.default:
        g, x, weight, _, *numbers, _ = args
        saved = [("input", x), ("weight", weight)]
        constants = dict(zip(_GEOMETRY, map(_plain, numbers), strict=True))
        return Candidate(node, "ConvolutionBackward0", g, saved, constants)
    if node.target is _aten.native_layer_norm_backward.default:
        g, x, shape, mean, rstd, *_ = args
        saved = [("input", x), ("result1", mean), ("result2", rstd)]
        constants = {"normalized_shape": _plain(shape)}
        return Candidate(node, "NativeLayerNormBackward0", g, saved, constants)
    if node.target is _aten._fused_rms_norm_backward.default:
        g, x, shape, rstd, *_ = args
        saved = [("input", x), ("result1", rstd)]
        constants = {"normalized_shape": _plain(shape)}
        return Candidate(node, "FusedRmsNormBackward0", g, saved, constants)
    if node.target is _aten.native_batch_norm_backward.default:
        g, x, _, *statistics, training, eps, _ = args
        names = ("running_mean", "running_var", "result1", "result2")
        saved = [
            (n, t) for n, t in zip(names, statistics, strict=True) if t is not None
        ]
        constants = {"training": _plain(training), "eps": _plain(eps)}
        saved = [("input", x), *saved]
        return Candidate(node, "NativeBatchNormBackward0", g, saved, constants)
    if node.target is _aten.native_group_norm_backward.default:
        g, x, mean, rstd, *_ = args
        saved = [("input", x), ("result1", mean), ("result2", rstd)]
        return Candidate(node, "NativeGroupNormBackward0", g, saved)
    return _table_of(node, args, above)


_GEOMETRY = (
    *("stride", "padding", "dilation"),
    *("transposed", "output_padding", "groups"),
)


def _table_of(node: fx.Node, args: Sequence[Any], above: set[fx.Node]) -> Candidate:
    """Rows of a table that were looked up."""
    if node.target is _aten.embedding_dense_backward.default:
        g, ids, _, padding, is_scaled = args
        constants = {"padding_idx": padding, "scale_grad_by_freq": False}
        if is_scaled:
            raise NotTraced("a table has scale_grad_by_freq")
        return Candidate(node, "EmbeddingBackward0", g, [("indices", ids)], constants)
    base = args[0]
    if node.target is _aten.index_add.default and node.kwargs.get("alpha", 1) != 1:
        raise NotTraced("a gradient is a weighted sum")
    if not is_zero(base):
        raise NotTraced("rows are added to what is there")
    if node.target is _aten._unsafe_masked_index_put_accumulate.default:
        _, mask, (ids, *more), g = args
        if more:
            raise NotTraced("a table is looked up along several dims")
        constants = {"padding_idx": -1, "scale_grad_by_freq": False}
        saved = [("indices", ids), ("mask", mask)]
        return Candidate(node, "EmbeddingBackward0", g, saved, constants)
    if node.target is _aten.index_add.default:
        _, dim, ids, g = args
        if dim != 0:
            raise NotTraced("a table is looked up along another dim than the first")
        return Candidate(node, "IndexSelectBackward0", g, [("index", ids)], {"dim": 0})
    _, indices, g, *rest = args
    adds_up = rest[0] if rest else node.kwargs.get("accumulate", False)
    if not adds_up or any(index is None for index in indices):
        raise NotTraced(f"{node.target} does not add up all rows of a table")
    is_of_rows = len(indices) == 1 and base.meta["val"].dim() == 2
    if is_of_rows and (shown := _without_padding(g, above)) is not None:
        hidden, g = shown
        saved = [("indices", indices[0]), ("hidden", hidden)]
        constants = {"padding_idx": -1, "scale_grad_by_freq": False}
        return Candidate(node, "EmbeddingBackward0", g, saved, constants)
    return Candidate(node, "IndexBackward0", g, [("indices[]", i) for i in indices])


def _without_padding(g: fx.Node, above: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """Which rows are padding, and the gradient before these were set to zero.

    An embedding is taken apart so: index_put(zeros, [ids], where(is_padding, 0, g)).
    """
    where = stripped(g)
    if where.target is not _aten.where.self:
        return None
    hidden, zero, rows = map(node_of, where.args)
    is_of_rows = hidden.meta["val"].shape[-1:] == (1,)
    if hidden in above or not is_of_rows or not is_zero(zero):
        return None
    return hidden, rows


def _plain(argument: Any) -> Any:
    """A constant argument."""
    found = list(argument) if isinstance(argument, list | tuple) else argument
    numbers = found if isinstance(found, list) else [found]
    if not all(isinstance(x, int | float | bool) for x in numbers):
        raise NotTraced("a size changes from call to call")
    return found
