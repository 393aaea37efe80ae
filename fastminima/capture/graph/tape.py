"""The autograd graph of a loss as a list of numbered nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from torch.autograd.graph import Node

__all__ = ["ACCUMULATE", "Tape", "signed"]

ACCUMULATE = "torch::autograd::AccumulateGrad"

_READS_UNSEEN = (
    *("Embedding", "Index", "Gather", "Where", "Masked", "Take", "Scatter"),
    *(
        "Nll",
        "Dropout",
        "NativeDropout",
        "CompiledFunction",
        "CheckpointFunction",
        "torch::autograd",
    ),
)


def signed(number: int) -> int:
    """A saved integer as it was: autograd shows negative ones as unsigned."""
    return number - 2**64 if number >= 2**63 else number


class Tape:
    """One walk over the graph below its roots: nodes in order of discovery, and edges.

    The same program gives the same numbers, so what was found out about a graph can be
    kept under `key` and applied to the nodes of the next step.

    Attributes:
        nodes: the graph's nodes; the roots come first.
        names: their names, and for a leaf the name of its parameter.
        children: for each node, for each of its inputs, (node, output number) or None.
        key: hashable; equal for graphs of equal structure over the same parameters.
    """

    def __init__(
        self, roots: Iterable[Node], parameter_names: Mapping[int, str]
    ) -> None:
        nodes = list(dict.fromkeys(roots))
        index = {node: i for i, node in enumerate(nodes)}
        children = []
        names = []
        leaves = {}
        numbered = index.get
        for node in nodes:
            name = node.name()
            below = node.next_functions
            if not below and name == ACCUMULATE:
                parameter = parameter_names.get(id(node.variable))  # type: ignore[attr-defined]
                if parameter is not None:
                    leaves[parameter] = len(names)
                    name = f"leaf {parameter}"
            names.append(name)
            edges = []
            for child, number in below:
                i = numbered(child)  # type: ignore[arg-type]  # None is not there
                if i is None:
                    if child is None:
                        edges.append(None)
                        continue
                    i = index[child] = len(nodes)
                    nodes.append(child)
                edges.append((i, number))
            children.append(tuple(edges))
        self.nodes: list[Any] = nodes
        self.names: list[str] = names
        self.leaves: dict[str, int] = leaves
        self.children: list[tuple[tuple[int, int] | None, ...]] = children
        self.key = (tuple(names), tuple(children))

    @cached_property
    def parents(self) -> list[list[tuple[int, int, int]]]:
        """For each node its consumers: (node, its input number, output number here)."""
        parents: list[list[tuple[int, int, int]]] = [[] for _ in self.nodes]
        for i, edges in enumerate(self.children):
            for slot, edge in enumerate(edges):
                if edge is not None:
                    parents[edge[0]].append((i, slot, edge[1]))
        return parents

    @cached_property
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

    def is_leaf(self, i: int) -> bool:
        """Whether node `i` accumulates the gradient of a leaf, tracked or not."""
        return not self.children[i] and (
            self.names[i].startswith("leaf ") or self.names[i] == ACCUMULATE
        )

    @cached_property
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

    @cached_property
    def is_surely_parameter(self) -> list[bool]:
        """Whether everything that flows into a node is a tracked parameter.

        Tables and selections read indices or masks, which the graph does not show.
        """
        sure = [False] * len(self.nodes)
        for i in self.leaves_first:
            sure[i] = self.names[i].startswith("leaf ") or (
                bool(self.children[i])
                and not self.names[i].startswith(_READS_UNSEEN)
                and all(e is not None and sure[e[0]] for e in self.children[i])
            )
        return sure
