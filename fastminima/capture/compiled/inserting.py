"""An operator beside each use of a parameter in the backward graph of a region.

    mm(permute(g), a)     -> product(mark, permute(g), a)
    sum(t, [0, 1])        -> sum(t, [0, 1]) and look(mark, [t])

The operators are opaque to the compiler, which sees to it that what they are given is
there. Nothing is looked at here but which parameter a gradient belongs to: whose the
rows are is measured when the compiled code runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from .marks import REFUSED, WITH_FACTORS, Into, Mark, joined_moves
from .nodes import NotTraced, any_sizes_of, shape_of, stripped
from .operations import SUMS, Candidate, candidate_of, entering, result_of, summed_dims
from .operators import LOOK, PRODUCT
from .tracing import Found, found_in

__all__ = ["Inputs", "Marking", "mark_uses"]

_aten = torch.ops.aten


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
    for use in sorted(uses.values(), key=lambda use: use.is_product):
        _insert(use, graph, places, inputs.tensors)
    for use in uses.values():
        if use.is_product:
            graph.erase_node(use.node)
    graph.lint()


def _is_tangent(node: fx.Node) -> bool:
    return str(node.target).startswith("tangents")


def _insert(
    use: Candidate, graph: fx.Graph, places: Mapping[fx.Node, int], edges: int
) -> None:
    """Put the operator in place of a product, or beside another operation."""
    behind = None if use.behind is None else places[use.behind]
    saved = tuple(name for name, _ in use.saved)
    mark = Mark(
        *(places[use.node], len(places), use.name, saved, tuple(use.into)),
        *(use.constants, _viewed(use.g), edges, behind),
    )
    if use.is_product:
        with graph.inserting_before(use.node):
            node = graph.call_function(PRODUCT, (mark.encoded(), *use.node.args))
        node.meta.update(use.node.meta)
        use.node.replace_all_uses_with(node)
        return
    tensors = [use.g, *(t for _, t in use.saved)]
    last = max(tensors)  # in the order of the graph
    is_there = last < use.node
    place_of = graph.inserting_before if is_there else graph.inserting_after
    with place_of(use.node if is_there else last):
        node = graph.call_function(LOOK, (mark.encoded(), tensors))
    node.meta["val"] = None


def _uses(
    graph: fx.Graph, inputs: Inputs, tangents: Sequence[fx.Node]
) -> dict[fx.Node, Candidate]:
    """The uses behind the gradients of all leaves, in the order of the graph."""
    outputs: Any = graph.output_node().args[0]
    if len(outputs) != inputs.all:
        raise NotTraced(
            f"the graph has {len(outputs)} gradients for {inputs.all} inputs"
        )
    above = _depending(graph, tangents)
    uses: dict[fx.Node, Candidate] = {}
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
    uses: dict[fx.Node, Candidate], grad: fx.Node, edge: int, reason: str
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
    uses[row] = Candidate(row, "AddBackward0", row, [], constants, into)


def _depending(graph: fx.Graph, tangents: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that are computed from output gradients."""
    above = set(tangents)
    for node in graph.nodes:
        if any(below in above for below in node.all_input_nodes):
            above.add(node)
    return above


def _add(
    uses: dict[fx.Node, Candidate], found: Found, edge: int, above: set[fx.Node]
) -> None:
    """Note where the gradient of a use goes."""
    node, number, first = result_of(found.node)
    use = uses.get(node)
    if use is None:
        use = uses[node] = candidate_of(node, above)
    shape, own = entering(use, found.node, number)
    moves = found.moves
    if found.factors:
        if use.is_product:
            raise NotTraced("the gradient of a matrix is multiplied by a tensor")
        known = sum(name == _FACTOR for name, _ in use.saved)
        moves = tuple(
            (move[0], move[1] + known, *move[2:]) if move[0] in WITH_FACTORS else move
            for move in moves
        )
        use.saved = [*use.saved, *_factors_of(found)]
    use.into.append(Into(first, edge, shape, joined_moves([*own, *moves])))


_FACTOR = "factor[]"


def _factors_of(found: Found) -> list[tuple[str, fx.Node]]:
    return [(_FACTOR, factor) for factor in found.factors]


# What may lie between a look-up and the sums that its gradient comes from.
_BEHIND = WITH_FACTORS | {"permute", "reshape", "scale"}
_TABLES = ("EmbeddingBackward0", "IndexBackward0", "IndexSelectBackward0")


def _look_behind(
    uses: dict[fx.Node, Candidate], table: Candidate, above: set[fx.Node]
) -> None:
    """Add the sums that a look-up's gradient comes from, if it comes from such.

    Positions are looked up once for all samples: what comes there is summed over them,
    in each layer that uses them.
    """
    if table.name not in _TABLES or len(table.into) != 1 or len(table.saved) > 2:
        return
    (into,) = table.into
    if into.moves or len(into.shape) != 2:
        return
    found: dict[fx.Node, Candidate] = {}
    try:
        for behind in found_in(table.g, above):
            use = candidate_of(behind.node, above)
            shape, own = entering(use, behind.node, None)
            moves = (*own, *behind.moves)
            is_plain = all(move[0] in _BEHIND for move in moves)
            is_known = use.node in uses or use.node in found
            if use.node.target not in SUMS or is_known or not is_plain:
                return
            use.into.append(Into(0, into.edge, shape, moves, into.shape[0]))
            use.saved = _factors_of(behind)
            found[use.node] = use
    except NotTraced:
        return
    saved = [
        ("lookup" if name.startswith("ind") else name, t) for name, t in table.saved
    ]
    for use in found.values():
        use.saved, use.behind = [*saved, *use.saved], table.node
        use.constants |= table.constants
    uses |= found


def _join_biases(uses: dict[fx.Node, Candidate]) -> None:
    """Take a bias with the weight beside it, whose output gradient it is the sum of."""
    weights = {
        g: use
        for use in uses.values()
        if use.name == "AddmmBackward0" and (g := _rows_of(use)) is not None
    }
    for node, use in list(uses.items()):
        moves = {move[0] for into in use.into for move in into.moves}
        if node.target not in SUMS or moves & WITH_FACTORS:
            continue
        rows, dims = use.g, summed_dims(node)
        count = rows.meta["val"].dim()
        view = rows if rows in weights else _flat_view(rows, weights)
        weight = None if view is None else weights[view]
        if weight is None or count < 2 or dims != set(range(count - 1)):
            continue
        weight.into += [
            replace(into, number=0, shape=into.shape[-1:]) for into in use.into
        ]
        del uses[node]


def _rows_of(use: Candidate) -> fx.Node | None:
    """The output gradient [rows, features] of a product."""
    if not use.constants["is_left"]:
        return stripped(use.g)
    if use.g.target is _aten.permute.default and list(use.g.args[1]) == [1, 0]:  # type: ignore[arg-type]
        return stripped(use.g.args[0])  # type: ignore[arg-type]
    return None


def _flat_view(node: fx.Node, weights: Mapping[fx.Node, Candidate]) -> fx.Node | None:
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
