"""The graph as a list of steps, each with its rule and its wiring."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .._graph import Parts, differentiate
from .._nodes import nodes_of
from .rule import Rule
from .saved import Saved
from .table import rule_of

__all__ = ["LeafInput", "Step", "steps_of"]

_LEAF = "torch::autograd::AccumulateGrad"


@dataclass(frozen=True)
class LeafInput:
    """An input that is a parameter, or the transpose of one."""

    index: int
    is_turned: bool


@dataclass
class Step:
    """One node: its rule, and where its inputs come from.

    Attributes:
        inputs: For each, the step and the number of its output, a parameter, or None
            for what is constant.
        count: How many outputs it has.
        scalar: The gradient by the output, where that is one number and an input more.
        is_wanted: Whether tangents of the outputs matter to any change.
    """

    rule: Rule
    inputs: list[tuple[int, int] | LeafInput | None]
    count: int
    scalar: Tensor | None = None
    is_wanted: bool = False


def steps_of(
    root: Tensor, parameters: Sequence[Tensor], saved: Saved
) -> tuple[list[Step], Parts]:
    """The steps in the order of evaluation, and the gradient, from one backward pass.

    `saved` takes in what the nodes have saved.

    Raises:
        NotCovered: For a node of which tangents would be wrong.
    """
    places = {id(p): i for i, p in enumerate(parameters)}
    nodes = _ordered(root)
    inner = [n for n in nodes if not _is_leaf(n) and _turned(n, places) is None]
    edges = [GradientEdge(n, i) for n in inner for i in range(len(n._input_metadata))]
    one = torch.ones_like(root)
    found = differentiate((root,), (*edges, *parameters), (one,), create_graph=False)
    gradients, reached = iter(found[: len(edges)]), found[len(edges) :]
    del found
    at: dict[Any, int] = {}
    steps: list[Step] = []
    for node in inner:
        mine = [next(gradients) for _ in node._input_metadata]
        if all(g is None for g in mine):
            continue
        inputs = [
            None if upper is None else _input(upper, number, at, places)
            for upper, number in node.next_functions
        ]
        at[node] = len(steps)
        scalar = mine[0] if _narrows(node) else None
        steps.append(Step(rule_of(node, mine, saved), inputs, len(mine), scalar))
    return steps, reached


def _input(
    upper: Any, number: int, at: dict[Any, int], places: dict[int, int]
) -> tuple[int, int] | LeafInput | None:
    if _is_leaf(upper):
        index = places.get(id(upper.variable))
        return None if index is None else LeafInput(index, is_turned=False)
    turned = _turned(upper, places)
    if turned is not None:
        return LeafInput(turned, is_turned=True)
    step = at.get(upper)
    return None if step is None else (step, number)


def _is_leaf(node: Any) -> bool:
    return node.name() == _LEAF


def _turned(node: Any, places: dict[int, int]) -> int | None:
    """The parameter whose transpose this is."""
    if node.name() != "TBackward0":
        return None
    upper, _ = node.next_functions[0]
    return places.get(id(upper.variable)) if _is_leaf(upper) else None


def _narrows(node: Any) -> bool:
    """Whether it makes one number of several."""
    outputs = [math.prod(meta.shape) for meta in node._input_metadata]
    inputs = [
        math.prod(upper._input_metadata[number].shape)
        for upper, number in node.next_functions
        if upper is not None
    ]
    return outputs == [1] and any(size > 1 for size in inputs)


def _ordered(root: Tensor) -> list[Any]:
    """The nodes, each after all those that it takes its inputs from."""
    nodes = list(nodes_of((root,)))
    waiting = dict.fromkeys(nodes, 0)
    users: dict[Any, list[Any]] = {node: [] for node in nodes}
    for node in nodes:
        for upper, _ in node.next_functions:
            if upper is not None:
                waiting[node] += 1
                users[upper].append(node)
    ready = [node for node, count in waiting.items() if not count]
    for node in ready:
        for user in users[node]:
            waiting[user] -= 1
            if not waiting[user]:
                ready.append(user)
    return ready
