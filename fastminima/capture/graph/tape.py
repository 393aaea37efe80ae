"""The autograd graph of a loss as a list of numbered nodes."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast, overload

from torch.autograd import graph

from .node import Node
from .nodes import ACCUMULATE, READ_UNSEEN, SHOWING_INPUT, SHOWN_SHAPE

__all__ = ["Tape", "signed"]

T = TypeVar("T")


def signed(number: int) -> int:
    """A saved integer as it was: autograd shows negative ones as unsigned."""
    return number - 2**64 if number >= 2**63 else number


class _Key:
    """What two graphs of one structure have in common; its hash is computed once."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, *parts: tuple) -> None:
        self._parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Key) or self._hash != other._hash:
            return False
        if self._parts is not other._parts:
            if self._parts != other._parts:
                return False
            self._parts = other._parts  # compared at once from now on
        return True


class _OfStructure(Generic[T]):
    """A property of a structure, worked out once for all tapes that share it."""

    def __init__(self, work_out: Callable[[Tape], T]) -> None:
        self._work_out = work_out
        self._name = work_out.__name__
        self.__doc__ = work_out.__doc__

    @overload
    def __get__(self, tape: None, owner: type) -> _OfStructure[T]: ...
    @overload
    def __get__(self, tape: Tape, owner: type) -> T: ...
    def __get__(self, tape: Tape | None, owner: type) -> T | _OfStructure[T]:
        if tape is None:
            return self
        known = tape._known
        if self._name not in known:
            known[self._name] = self._work_out(tape)
        return known[self._name]


class Tape:
    """One walk over the graph below its roots: nodes in order of discovery, and edges.

    The same program gives the same numbers, so what was found out about a graph can be
    kept under `key` and applied to the nodes of the next step.

    Args:
        roots: nodes of outputs.
        parameter_names: names of the tracked parameters by id.
        copy_names: the same of copies of them that a region is given.

    Attributes:
        nodes: the graph's nodes; the roots come first.
        names: their names.
        children: for each node, for each of its inputs, (node, output number) or None.
        leaves: the node of each tracked parameter.
        copies: the parameter of each node that is a copy of one.
        key: hashable; equal for graphs of equal structure over the same parameters.
    """

    def __init__(
        self,
        roots: Iterable[Node | graph.Node],
        parameter_names: Mapping[int, str],
        copy_names: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        nodes = cast(list[Node], list(dict.fromkeys(roots)))
        index = {node: i for i, node in enumerate(nodes)}
        children = []
        names = []
        leaves: dict[str, int] = {}
        copies: dict[int, str] = {}
        numbered = index.get
        for node in nodes:
            name = node.name()
            below = node.next_functions
            if not below and name == ACCUMULATE:
                leaf = id(node.variable)
                if leaf in parameter_names:
                    leaves[parameter_names[leaf]] = len(names)
                elif leaf in copy_names:
                    copies[len(names)] = copy_names[leaf]
            names.append(name)
            edges = []
            for child, number in below:
                i = numbered(child)  # None is not there
                if i is None:
                    if child is None:
                        edges.append(None)
                        continue
                    i = index[child] = len(nodes)
                    nodes.append(child)
                edges.append((i, number))
            children.append(tuple(edges))
        self.nodes: list[Node] = nodes
        self.names: list[str] = names
        self.leaves, self.copies = leaves, copies
        self.children: list[tuple[tuple[int, int] | None, ...]] = children
        self.key = _Key(
            *(tuple(names), tuple(children)),
            *(tuple(leaves.items()), tuple(copies.items())),
        )
        self._known: dict[str, Any] = {}

    def of(self, nodes: list[Node]) -> Tape:
        """The tape of another graph of the same structure: these are its nodes."""
        tape = object.__new__(Tape)
        tape.__dict__.update(self.__dict__)
        tape.nodes = nodes
        return tape

    @_OfStructure
    def parameter_at(self) -> dict[int, str]:
        """The tracked parameter of each leaf that has one, or is a copy of one."""
        return {**{i: name for name, i in self.leaves.items()}, **self.copies}

    @_OfStructure
    def parents(self) -> list[list[tuple[int, int, int]]]:
        """For each node its consumers: (node, its input number, output number here)."""
        parents: list[list[tuple[int, int, int]]] = [[] for _ in self.nodes]
        for i, edges in enumerate(self.children):
            for slot, edge in enumerate(edges):
                if edge is not None:
                    parents[edge[0]].append((i, slot, edge[1]))
        return parents

    def below(
        self, *starts: int, enters: Callable[[int], bool] = lambda i: True
    ) -> Iterator[int]:
        """Some nodes and those below them, nearest first.

        Nothing is looked for below a node that is not entered, nor is it given.
        """
        queue = list(dict.fromkeys(i for i in starts if enters(i)))
        met = set(queue)
        for i in queue:
            yield i
            for edge in self.children[i]:
                if edge is not None and edge[0] not in met and enters(edge[0]):
                    met.add(edge[0])
                    queue.append(edge[0])

    def above(
        self, *starts: int, enters: Callable[[int], bool] = lambda i: True
    ) -> Iterator[int]:
        """Those above some nodes, nearest first, as `below`; without these."""
        queue = list(starts)
        met: set[int] = set()
        for i in queue:
            for parent, _, _ in self.parents[i]:
                if parent not in met and enters(parent):
                    met.add(parent)
                    queue.append(parent)
                    yield parent

    @_OfStructure
    def leaves_first(self) -> list[int]:
        """Node numbers ordered so that every node comes after its children."""
        order: list[int] = []
        entered: set[int] = set()
        for root in range(len(self.nodes)):  # all lie below the roots, which come first
            if root in entered:
                continue
            entered.add(root)
            stack = [(root, iter(self.children[root]))]
            while stack:
                i, edges = stack[-1]
                for edge in edges:
                    if edge is not None and edge[0] not in entered:
                        entered.add(edge[0])
                        stack.append((edge[0], iter(self.children[edge[0]])))
                        break
                else:
                    stack.pop()
                    order.append(i)
        return order

    def shapes(self, i: int) -> list[tuple[int, ...]]:
        """Shapes of the outputs of node `i`."""
        metadata = self.nodes[i]._input_metadata
        if len(metadata) == 1:  # most have one, and are asked in every step
            return [tuple(metadata[0].shape)]
        return [tuple(meta.shape) for meta in metadata]

    def shown_above(self, i: int) -> int | None:
        """A node that has kept the shape of node `i`'s one output; None without one."""
        shapes = self.shapes(i)
        for parent, number, _ in self.parents[i]:
            if number or len(shapes) > 1 or self.names[parent] not in SHOWING_INPUT:
                continue
            if getattr(self.nodes[parent], SHOWN_SHAPE, None) == shapes[0]:
                return parent
        return None

    def is_leaf(self, i: int) -> bool:
        """Whether node `i` accumulates the gradient of a leaf, tracked or not."""
        return not self.children[i] and self.names[i] == ACCUMULATE

    def is_data(self, edge: tuple[int, int] | None, preparing: Container[int]) -> bool:
        """Whether rows of samples come along an edge, and not a parameter.

        `preparing` are the nodes between parameters and their uses.
        """
        if edge is None or edge[0] in preparing:
            return False
        return not self.is_leaf(edge[0])

    @_OfStructure
    def is_parameter_side(self) -> list[bool]:
        """Whether all that is known to flow into a node are leaves.

        Inputs that need no gradient are not in the graph, so such a node may still
        read data; `is_surely_parameter` has no such inputs.
        """
        side = [False] * len(self.nodes)
        for i in self.leaves_first:
            edges = [e for e in self.children[i] if e is not None]
            side[i] = self.is_leaf(i) or (
                bool(edges) and all(side[e[0]] for e in edges)
            )
        return side

    @_OfStructure
    def is_surely_parameter(self) -> list[bool]:
        """Whether everything that flows into a node is a tracked parameter.

        Tables and selections read indices or masks, which the graph does not show.
        """
        sure = [False] * len(self.nodes)
        for i in self.leaves_first:
            sure[i] = i in self.parameter_at or (
                bool(self.children[i])
                and not self.names[i].startswith(READ_UNSEEN)
                and all(e is not None and sure[e[0]] for e in self.children[i])
            )
        return sure
