"""From the slot that a contribution is for to the parameter behind it.

    weight [10, 20] -> t() -> slot [20, 10]          transposed
    table [9, 4] -> [2:5] -> slot [3, 4]             placed: each element has its place
    g, v -> v * g / |v| -> slot                      pushed: by autograd

Nothing here is about one pass: what a path decides is decided once for each graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..contributions import Contribution, Dense, Embedding, Placed, Pushed
from ..graph.node import Node, edge_of
from ..graph.nodes import EMBEDDING, KEEPING_ORDER, ROUNDING
from ..graph.passes import nobodys
from ..graph.saved import saved_tensor
from ..graph.tape import Tape, signed
from ..reading.plan import Path, Slot, Use
from .moves import Move, is_known, move_of, turns_of

__all__ = ["Deliveries", "Delivery", "deliveries_from", "delivery_of", "turned"]

Delivery = Callable[[Contribution], Contribution]


# Of each slot: its number, the way of a parameter to it, and how to go it back.
Deliveries = Sequence[tuple[int, Path, Delivery | None]]


@dataclass(frozen=True)
class Nearby:
    """The nodes between a use and its parameters, as a tape has them.

    Attributes:
        nodes, names: by their numbers in the tape.
    """

    nodes: Mapping[int, Any]
    names: Mapping[int, str]


def deliveries_from(
    use: Use, node: Node, names: Mapping[int, str], parameters: Mapping[str, Tensor]
) -> Deliveries:
    """The ways back from a use to its parameters, found from the use itself.

    Args:
        use: as it was planned.
        node: the node of this graph.
        names: of the nodes between use and parameters, by their numbers in the tape.
        parameters: by name.
    """
    found = []
    for slot in use.slots:
        for path in slot.paths:
            below, _ = node.next_functions[slot.number]
            nodes: dict[int, Any] = {slot.child[0]: below}
            for number, _, leaves_by in path.steps or ():
                nodes[number] = below
                below, _ = below.next_functions[leaves_by]
            nodes[path.leaf] = _Leaf(parameters[path.parameter])
            delivery = delivery_of(Nearby(nodes, names), slot, path)
            found.append((slot.number, path, delivery))
    return found


class _Leaf(NamedTuple):
    """Stands for the accumulator of a parameter's gradient."""

    variable: Tensor


def delivery_of(tape: Tape | Nearby, slot: Slot, path: Path) -> Delivery | None:
    """How a contribution to a slot becomes one to the parameter behind it.

    None where it is one already. What is returned holds at most the nodes between the
    parameter and its use, and not the use itself.
    """
    if path.steps == ():
        return None
    parameter = tape.nodes[path.leaf].variable
    shape = tuple(parameter.shape)
    if path.steps is None:
        edge = edge_of(tape.nodes[slot.child[0]], slot.child[1])
        return lambda inner: Pushed(inner, shape, _pusher(edge, parameter))
    names = [tape.names[node] for node, _, _ in path.steps]
    nodes = [tape.nodes[node] for node, _, _ in path.steps]
    if names[-1] == EMBEDDING:
        return _from_table(nodes, names, shape, parameter)
    if all(name == ROUNDING for name in names):
        return None  # contributions are in the accumulation dtype anyway
    is_turned = turns_of(nodes, names) if len(shape) == 2 else None
    if is_turned is not None:
        return turned if is_turned else None
    span = _span(nodes[-1], names[-1], path.steps[-1][1])
    place = _placer(nodes, names, path.steps)
    return lambda inner: Placed(inner, shape, place, span)


def turned(inner: Contribution) -> Contribution:
    """For the transposed matrix."""
    if isinstance(inner, Dense):
        return inner.transposed()
    return Placed(inner, inner.shape[::-1], _transpose)


def _transpose(t: Tensor) -> Tensor:
    return t.t()


def _span(node: Node, name: str, output: int) -> tuple[int, int] | None:
    """Which rows of the parameter itself a node takes, where it takes some."""
    dim = getattr(node, "_saved_dim", None)
    if not isinstance(dim, int) or signed(dim) != 0:
        return None
    if name == "SelectBackward0":
        index = signed(node._saved_index)
        return (index, index + 1) if index >= 0 else None
    if name == "UnbindBackward0":
        return output, output + 1
    if name == "SplitBackward0":
        size = node._saved_split_size
        return output * size, (output + 1) * size
    if name == "SplitWithSizesBackward0":
        sizes = node._saved_split_sizes
        return sum(sizes[:output]), sum(sizes[: output + 1])
    if name == "SliceBackward0" and node._saved_step == 1:
        start, end = signed(node._saved_start), signed(node._saved_end)
        return (start, end) if 0 <= start <= end else None
    return None


def _from_table(
    nodes: list[Node], names: list[str], shape: tuple[int, ...], parameter: Tensor
) -> Delivery:
    """A table looked up once for all samples: the ids are the same in each."""
    table = nodes[-1]
    in_order = all(name in KEEPING_ORDER for name in names[:-1])
    edge = edge_of(nodes[0], 0)

    def delivered(inner: Contribution) -> Contribution:
        if not in_order or table._saved_scale_grad_by_freq:
            return Pushed(inner, shape, _pusher(edge, parameter))
        ids = saved_tensor(table, "_saved_indices").flatten()
        rows = inner.per_sample(0, inner.batch)
        rows = rows.reshape(inner.batch, len(ids), shape[1])
        ids = ids.expand(inner.batch, -1)
        return Embedding(ids, rows, signed(table._saved_padding_idx), shape[0])

    return delivered


def _pusher(edge: GradientEdge, parameter: Tensor) -> Callable[[Tensor], Tensor]:
    """A gradient of the slot to that of the parameter, by autograd."""
    dtype = edge.node._input_metadata[edge.output_nr].dtype

    def push(grad: Tensor) -> Tensor:
        with nobodys(edge.node):
            (pushed,) = torch.autograd.grad(
                edge, parameter, grad.to(dtype), retain_graph=True
            )
        return pushed

    return push


def _placer(
    nodes: list[Node], names: list[str], steps: Sequence[tuple[int, int, int]]
) -> Move:
    """A gradient of the slot to that of the parameter, by what only moves it."""
    moves = [
        move_of(node, name, output, number)
        if is_known(name)
        else _called(node, output, number)
        for node, name, (_, output, number) in zip(nodes, names, steps, strict=True)
    ]

    def place(t: Tensor) -> Tensor:
        for move in moves:
            t = move(t)
        return t

    return place


def _called(node: Node, output: int, number: int) -> Move:
    outputs = len(node._input_metadata)

    def move(t: Tensor) -> Tensor:
        grads: list[Tensor | None] = [None] * outputs
        grads[output] = t
        moved = node(*grads)
        return moved[number] if isinstance(moved, tuple) else moved

    return move
