"""An operator beside each use of a parameter in the backward graph of a region.

    mm(permute(g), a)     -> product(mark, permute(g), a)
    sum(t, [0, 1])        -> sum(t, [0, 1]) and look(mark, [t])

The operators are opaque to the compiler, which sees to it that what they are given is
there. Nothing is looked at here but which parameter a gradient belongs to: whose the
rows are is measured when the compiled code runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .marks import REFUSED, Into, Mark, Move
from .operators import LOOK, PRODUCT
from .tracing import (
    Found,
    NotTraced,
    any_sizes_of,
    found_in,
    is_zero,
    shape_of,
    stripped,
)

__all__ = ["Marking", "mark_uses"]

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: "AddmmBackward0", _aten.bmm.default: "BmmBackward0"}


class Inputs(NamedTuple):
    """What a region is given.

    Attributes:
        all: how many inputs there are.
        tensors: of those that are tensors, which are the edges of the region's node.
        leaves: those that accumulate a gradient: place among the inputs, place among
            the tensors, name.
    """

    all: int
    tensors: int
    leaves: tuple[tuple[int, int, str], ...]

    @classmethod
    def of(cls, graph: fx.GraphModule, inputs: Sequence[Any]) -> Inputs:
        """The inputs of a graph as a backend is given it, with examples of them."""
        edge = 0
        leaves = []
        for i, node in enumerate(graph.graph.find_nodes(op="placeholder")):
            t = inputs[i]
            if isinstance(t, torch.Tensor):
                if t.requires_grad and t.is_leaf:
                    leaves.append((i, edge, str(node.target)))
                edge += 1
        return cls(len(inputs), edge, tuple(leaves))


class Marking(CustomGraphPass):
    """The pass, for one region.

    Args:
        inputs: of the region.
        before: a pass of the user's own at the same point of compilation.
    """

    def __init__(self, inputs: Inputs, before: Any = None) -> None:
        self._inputs, self._before = inputs, before

    def __call__(self, graph: fx.Graph) -> None:
        """Mark a graph, if it is a backward graph."""
        if self._before is not None:
            self._before(graph)
        mark_uses(graph, self._inputs)

    def uuid(self) -> Any:
        """What the pass does depends on: part of the keys of the compiler's caches."""
        folder = Path(__file__).parent
        files = tuple(sorted(str(path) for path in folder.glob("*.py")))
        own = get_hash_for_files(files), self._inputs
        if self._before is None:
            return own
        before = self._before.uuid() if hasattr(self._before, "uuid") else None
        return None if before is None else (own, before)


def mark_uses(graph: fx.Graph, inputs: Inputs) -> None:
    """Insert the operators into a backward graph, or one that says why there are none.

    Forward graphs are left as they are.
    """
    tangents = [n for n in graph.find_nodes(op="placeholder") if _is_tangent(n)]
    if not tangents:
        return
    try:
        uses = _uses(graph, inputs, tangents)
    except NotTraced as error:
        with graph.inserting_before(graph.output_node()):
            node = graph.call_function(LOOK, (f"{REFUSED}{error}", tangents[:1]))
        node.meta["val"] = None
        return
    places = {node: place for place, node in enumerate(uses)}
    # Products last: the others may be given what they are replaced with.
    for node, use in sorted(uses.items(), key=lambda found: found[1].is_product):
        use.insert(graph, places, places[node], inputs.tensors)
    for use in uses.values():
        if use.is_product:
            graph.erase_node(use.node)
    graph.lint()


def _is_tangent(node: fx.Node) -> bool:
    return str(node.target).startswith("tangents")


@dataclass
class _Use:
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
        return self.node.target in _PRODUCTS

    def insert(
        self, graph: fx.Graph, places: Mapping[fx.Node, int], place: int, edges: int
    ) -> None:
        """Put the operator in place of a product, or beside another operation."""
        behind = None if self.behind is None else places[self.behind]
        saved = tuple(name for name, _ in self.saved)
        mark = Mark(
            *(place, len(places), self.name, saved, tuple(self.into)),
            *(self.constants, _viewed(self.g), edges, behind),
        )
        if self.is_product:
            with graph.inserting_before(self.node):
                node = graph.call_function(PRODUCT, (mark.encoded(), *self.node.args))
            node.meta.update(self.node.meta)
            self.node.replace_all_uses_with(node)
            return
        tensors = [self.g, *(t for _, t in self.saved)]
        last = max(tensors)  # in the order of the graph
        is_there = last < self.node
        place_of = graph.inserting_before if is_there else graph.inserting_after
        with place_of(self.node if is_there else last):
            node = graph.call_function(LOOK, (mark.encoded(), tensors))
        node.meta["val"] = None


def _uses(
    graph: fx.Graph, inputs: Inputs, tangents: Sequence[fx.Node]
) -> dict[fx.Node, _Use]:
    """The uses behind the gradients of all leaves, in the order of the graph."""
    outputs: Any = graph.output_node().args[0]
    if len(outputs) != inputs.all:
        raise NotTraced(
            f"the graph has {len(outputs)} gradients for {inputs.all} inputs"
        )
    above = _depending(graph, tangents)
    uses: dict[fx.Node, _Use] = {}
    for output, edge, name in inputs.leaves:
        if outputs[output] is None:
            continue
        try:
            for found in found_in(outputs[output], above):
                _add(uses, found, edge, above)
        except NotTraced as error:
            reason = f"{error} ({name})"
            if not any(map(_may_be_of_one, tangents)):
                raise NotTraced(reason) from None
            _add_whole(uses, outputs[output], edge, reason)
    _join_biases(uses)
    for use in list(uses.values()):
        _look_behind(uses, use, above)
    return uses


def _may_be_of_one(tangent: fx.Node) -> bool:
    """Whether an output may be that of one sample."""
    sizes = any_sizes_of(tangent)
    return not sizes or 1 in sizes


def _add_whole(
    uses: dict[fx.Node, _Use], grad: fx.Node, edge: int, reason: str
) -> None:
    """Take a gradient as it is, which is that of a sample where there is only one."""
    for node, use in list(uses.items()):
        use.into = [into for into in use.into if into.edge != edge]
        if not use.into:
            del uses[node]
    with grad.graph.inserting_before(grad.graph.output_node()):
        row = grad.graph.call_function(_aten.unsqueeze.default, (grad, 0))
    row.meta["val"] = grad.meta["val"].unsqueeze(0)
    shape = shape_of(grad)
    into = [Into(0, edge, (1, *shape), (("reshape", shape),))]
    constants = {"alpha": 1, "keeps_last": False, "of_one": reason}
    uses[row] = _Use(row, "AddBackward0", row, [], constants, into)


def _depending(graph: fx.Graph, tangents: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that are computed from output gradients."""
    above = set(tangents)
    for node in graph.nodes:
        if any(below in above for below in node.all_input_nodes):
            above.add(node)
    return above


def _add(
    uses: dict[fx.Node, _Use], found: Found, edge: int, above: set[fx.Node]
) -> None:
    """Note where the gradient of a use goes."""
    node, number, first = _of_use(found.node)
    use = uses.get(node)
    if use is None:
        use = uses[node] = _use_of(node, above)
    shape, own = _entering(use, found.node, number)
    moves = found.moves
    if found.factors:
        if use.is_product:
            raise NotTraced("the gradient of a matrix is multiplied by a tensor")
        known = sum(name == _FACTOR for name, _ in use.saved)
        moves = tuple(("times", m[1] + known) if m[0] == "times" else m for m in moves)
        use.saved = [*use.saved, *((_FACTOR, factor) for factor in found.factors)]
    use.into.append(Into(first, edge, shape, (*own, *moves)))


_FACTOR = "factor[]"


# Of operations with several results: which input each of them is the gradient of.
_RESULTS = {
    _aten._fused_rms_norm_backward.default: {1: 1},
    _aten.convolution_backward.default: {1: 1, 2: 2},
    _aten.native_batch_norm_backward.default: {1: 1, 2: 2},
    _aten.native_group_norm_backward.default: {1: 1, 2: 2},
    _aten.native_layer_norm_backward.default: {1: 1, 2: 2},
}


def _of_use(node: fx.Node) -> tuple[fx.Node, int | None, int]:
    """The operation, which of its results this is, and the input it belongs to."""
    if node.op == "call_function" and node.target not in _INPUT:
        operation, number = node.args
        assert isinstance(operation, fx.Node)
        assert isinstance(number, int)
        if number not in _RESULTS[operation.target]:  # type: ignore[index]
            raise NotTraced(f"a parameter is what {operation.target} is a gradient of")
        return operation, number, _RESULTS[operation.target][number]  # type: ignore[index]
    return node, None, _INPUT[node.target]


_INPUT: dict[Any, int] = {
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


def _entering(
    use: _Use, result: fx.Node, number: int | None
) -> tuple[tuple[int, ...], tuple[Move, ...]]:
    """The shape in which a parameter enters a use, and moves to the use's result."""
    shape = any_sizes_of(result)
    if use.is_product:
        if not use.constants["is_left"]:
            return shape, ()
        turned = (*range(len(shape) - 2), len(shape) - 1, len(shape) - 2)
        return tuple(shape[i] for i in turned), (("permute", turned),)
    if use.node.target in _SUMS:
        kept = _kept(use.node)
        return kept, () if kept == shape else (("reshape", shape),)
    return shape, ()


_SUMS = (_aten.sum.default, _aten.sum.dim_IntList)


def _kept(node: fx.Node) -> tuple[int, ...]:
    """The shape of a sum that keeps its dims, as long as parameters go, 1 before."""
    summed = _dims(node)
    sizes = any_sizes_of(_argument(node))
    return tuple(1 if dim in summed else size for dim, size in enumerate(sizes))


def _keeps_last(node: fx.Node) -> bool:
    """Whether a sum is over all dims but the last."""
    return _dims(node) == set(range(_argument(node).meta["val"].dim() - 1))


def _dims(node: fx.Node) -> set[int]:
    count = _argument(node).meta["val"].dim()
    dims: Any = node.args[1] if len(node.args) > 1 else None
    return {range(count)[dim] for dim in dims} if dims else set(range(count))


def _name_of(product: fx.Node) -> str:
    return _PRODUCTS[product.target]  # type: ignore[index]


def _argument(node: fx.Node) -> fx.Node:
    (argument, *_) = node.args
    assert isinstance(argument, fx.Node)
    return argument


def _use_of(node: fx.Node, above: set[fx.Node]) -> _Use:
    """What an operation is, as an eager node."""
    args: Any = node.args
    if node.target in _PRODUCTS:
        is_left, is_right = (factor in above for factor in args)
        if is_left == is_right:
            raise NotTraced(f"both or none of the factors of {node.target} are data")
        saved = "mat1" if node.target is _aten.mm.default else "self"
        g, other = args if is_left else args[::-1]
        constants = {"is_left": is_left, "alpha": 1, "beta": 1}
        return _Use(node, _name_of(node), g, [(saved, other)], constants)
    if node.target in _SUMS:
        constants = {"alpha": 1, "keeps_last": _keeps_last(node)}
        return _Use(node, "AddBackward0", stripped(args[0]), [], constants)
    if node.target is _aten.convolution_backward.default:
        g, x, weight, _, *numbers, _ = args
        saved = [("input", x), ("weight", weight)]
        constants = dict(zip(_GEOMETRY, map(_plain, numbers), strict=True))
        return _Use(node, "ConvolutionBackward0", g, saved, constants)
    if node.target is _aten.native_layer_norm_backward.default:
        g, x, shape, mean, rstd, *_ = args
        saved = [("input", x), ("result1", mean), ("result2", rstd)]
        constants = {"normalized_shape": _plain(shape)}
        return _Use(node, "NativeLayerNormBackward0", g, saved, constants)
    if node.target is _aten._fused_rms_norm_backward.default:
        g, x, shape, rstd, *_ = args
        saved = [("input", x), ("result1", rstd)]
        constants = {"normalized_shape": _plain(shape)}
        return _Use(node, "FusedRmsNormBackward0", g, saved, constants)
    if node.target is _aten.native_batch_norm_backward.default:
        g, x, _, *statistics, training, eps, _ = args
        names = ("running_mean", "running_var", "result1", "result2")
        saved = [
            (n, t) for n, t in zip(names, statistics, strict=True) if t is not None
        ]
        constants = {"training": _plain(training), "eps": _plain(eps)}
        saved = [("input", x), *saved]
        return _Use(node, "NativeBatchNormBackward0", g, saved, constants)
    if node.target is _aten.native_group_norm_backward.default:
        g, x, mean, rstd, *_ = args
        saved = [("input", x), ("result1", mean), ("result2", rstd)]
        return _Use(node, "NativeGroupNormBackward0", g, saved)
    return _table_of(node, args)


_GEOMETRY = (
    *("stride", "padding", "dilation"),
    *("transposed", "output_padding", "groups"),
)


def _table_of(node: fx.Node, args: Sequence[Any]) -> _Use:
    """Rows of a table that were looked up."""
    if node.target is _aten.embedding_dense_backward.default:
        g, ids, _, padding, is_scaled = args
        constants = {"padding_idx": padding, "scale_grad_by_freq": False}
        if is_scaled:
            raise NotTraced("a table has scale_grad_by_freq")
        return _Use(node, "EmbeddingBackward0", g, [("indices", ids)], constants)
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
        return _Use(node, "EmbeddingBackward0", g, saved, constants)
    if node.target is _aten.index_add.default:
        _, dim, ids, g = args
        if dim != 0:
            raise NotTraced("a table is looked up along another dim than the first")
        return _Use(node, "IndexSelectBackward0", g, [("index", ids)], {"dim": 0})
    _, indices, g, *rest = args
    if not (rest and rest[0]) or any(index is None for index in indices):
        raise NotTraced(f"{node.target} does not add up all rows of a table")
    return _Use(node, "IndexBackward0", g, [("indices[]", i) for i in indices])


_TABLES = ("EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0")


def _look_behind(uses: dict[fx.Node, _Use], table: _Use, above: set[fx.Node]) -> None:
    """Add the sum that a look-up's gradient comes from, if it is one.

    Positions are looked up once for all samples: what comes there is summed over them.
    """
    if table.name not in _TABLES or len(table.into) != 1 or len(table.saved) > 2:
        return
    (into,) = table.into
    try:
        found = found_in(table.g, above)
        (behind,) = found
        use = _use_of(behind.node, above)
        shape, own = _entering(use, behind.node, None)
    except (NotTraced, ValueError):
        return
    moves = (*own, *behind.moves)
    is_plain = all(move[0] in ("permute", "reshape") for move in moves)
    if use.node.target not in _SUMS or use.node in uses or into.moves or not is_plain:
        return
    if len(into.shape) != 2:
        return
    saved = [
        ("lookup" if name.startswith("ind") else name, t) for name, t in table.saved
    ]
    use.saved, use.behind = saved, table.node
    use.constants |= table.constants
    use.into.append(Into(0, into.edge, shape, moves, into.shape[0]))
    uses[use.node] = use


def _plain(argument: Any) -> Any:
    """A constant argument."""
    found = list(argument) if isinstance(argument, list | tuple) else argument
    numbers = found if isinstance(found, list) else [found]
    if not all(isinstance(x, int | float | bool) for x in numbers):
        raise NotTraced("a size changes from call to call")
    return found


def _join_biases(uses: dict[fx.Node, _Use]) -> None:
    """Take a bias with the weight beside it, whose output gradient it is the sum of."""
    weights = {
        g: use
        for use in uses.values()
        if use.name == "AddmmBackward0" and (g := _rows_of(use)) is not None
    }
    for node, use in list(uses.items()):
        if node.target not in _SUMS:
            continue
        rows, dims = use.g, _dims(node)
        count = rows.meta["val"].dim()
        view = rows if rows in weights else _flat_view(rows, weights)
        weight = None if view is None else weights[view]
        if weight is None or count < 2 or dims != set(range(count - 1)):
            continue
        weight.into += [
            replace(into, number=0, shape=into.shape[-1:]) for into in use.into
        ]
        del uses[node]


def _rows_of(use: _Use) -> fx.Node | None:
    """The output gradient [rows, features] of a product."""
    if not use.constants["is_left"]:
        return stripped(use.g)
    if use.g.target is _aten.permute.default and list(use.g.args[1]) == [1, 0]:  # type: ignore[arg-type]
        return stripped(use.g.args[0])  # type: ignore[arg-type]
    return None


def _flat_view(node: fx.Node, weights: Mapping[fx.Node, _Use]) -> fx.Node | None:
    """The [rows, features] of a weight that are a view of this node, if there are."""
    for user in node.users:
        view = stripped(user)
        is_view = user.target in (_aten.reshape.default, _aten.view.default)
        if is_view and view in weights:
            last = (n.meta["val"].shape[-1] for n in (node, view))
            if view.meta["val"].dim() == 2 and len(set(last)) == 1:
                return view
    return None


def _viewed(g: fx.Node) -> tuple[int, ...] | None:
    """The shape that rows of an output gradient had before they were flattened."""
    if g.target is _aten.permute.default:
        g = g.args[0]  # type: ignore[assignment]
    g = stripped(g)
    is_view = g.target in (_aten.reshape.default, _aten.view.default)
    if not is_view or g.meta["val"].dim() != 2:
        return None
    try:
        shape, rows = shape_of(g.args[0]), shape_of(g)  # type: ignore[arg-type]
    except NotTraced:
        return None
    return shape if len(shape) > 2 and shape[-1] == rows[-1] else None
