"""What an audit says of a recorded gradient: where it ends, and what it reaches."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .._flat import FlatLayout
from ._audit_closures import listed
from ._graph import Graph
from ._nodes import nodes_of, place_of
from .audit import CurvatureCheck

__all__ = ["ends", "missing", "reach"]

# Nodes of a gradient's graph that raise when they are differentiated.
_ENDS = ("torch::autograd::Error", "torch::autograd::NotImplemented")


def missing(fault: str) -> CurvatureCheck:
    """A node whose second derivative is missing."""
    met, _, remedy = fault.partition(". ")
    return CurvatureCheck(
        "second derivatives",
        "nodes of the graph",
        f"{met}.",
        None,
        None,
        "WRONG",
        remedy,
    )


def ends(names: Mapping[int, str], graph: Graph) -> list[CurvatureCheck]:
    """Nodes of the gradient's graph that raise when they are differentiated."""
    reached = [part for part in graph.reached if part is not None]
    nodes = list(nodes_of(reached))
    found = [node for node in nodes if node.name() in _ENDS]
    looked_at = f"{len(nodes)} nodes of the gradient's graph"
    if not found:
        return [CurvatureCheck("second derivatives", looked_at, "all have one")]
    places = dict.fromkeys(place_of(node, names) for node in found)
    met = f"{len(found)} end in an error: {listed(list(places))}"
    return [
        CurvatureCheck(
            *("second derivatives", looked_at, met, None, None, "WRONG"),
            "Use other operations in the functions there; a product names the node.",
        )
    ]


def reach(layout: FlatLayout, graph: Graph) -> CurvatureCheck:
    """Which parameters the loss reaches, and which at first order only."""
    looked_at = "which parameters the loss reaches"
    idle = [
        name
        for name, part in zip(layout.names, graph.reached, strict=True)
        if part is None
    ]
    linear: list[str] = []
    if type(graph).product is not Graph.product:
        ones = [torch.ones_like(p) for p in layout.parameters]
        linear = [
            name
            for name, part in zip(layout.names, graph.product(ones), strict=True)
            if part is None and name not in idle
        ]
    if not idle and not linear:
        return CurvatureCheck("reach", looked_at, f"all {len(layout.names)}, twice")
    parts = [f"not reached: {listed(idle)}"] if idle else []
    parts += [f"reached at first order only: {listed(linear)}"] if linear else []
    return CurvatureCheck(
        *("reach", looked_at, "; ".join(parts), None, None, "note"),
        "Their rows are zero. Freeze with requires_grad_(False) what is idle; where "
        "more was expected, look for detach() and no_grad().",
    )
