"""What autograd's graph of a loss tells of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from .._parameters import tracked_parameters
from ..capture.graph.tape import Tape
from .attention_checks import is_attention
from .findings import Finding, some
from .target import Target

__all__ = ["nodes_of", "of_graph", "of_structure"]


def nodes_of(losses: Tensor) -> list[Any]:
    """Every node of the graph, from the loss on."""
    found: list[Any] = [losses.grad_fn]
    seen = set(found)
    for node in found:
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                found.append(below)
    return found


def of_graph(nodes: Sequence[Any]) -> Iterator[Finding]:
    """Checkpoints, and functions written in Python."""
    written = Counter(node.name() for node in nodes if hasattr(node, "_forward_cls"))
    again = [name for name in written if name.startswith("CheckpointFunction")]
    if again:
        yield Finding(
            "slow",
            "checkpoint",
            f"{sum(written.pop(name) for name in again)} reentrant",
            "Their graphs come into being in the backward pass, and are measured "
            "there; curvature and audits cannot go through them, and one inside "
            "another is refused.",
            "checkpoint(..., use_reentrant=False).",
        )
    others = [
        name
        for name in written
        if not name.startswith("CompiledFunction") and not is_attention(name)
    ]
    if others:
        yield Finding(
            "note",
            "functions of your own",
            some(others),
            "Parameters inside have no rule, so the general one reads them; curvature "
            "needs a backward of differentiable operations.",
        )


def of_structure(target: Target, losses: Tensor) -> Iterator[Finding]:
    """Whether the loss, evaluated once more, has the same graph."""
    again = target.losses()
    names = {id(p): name for name, p in tracked_parameters(target.model).items()}
    roots: list[Any] = [losses.grad_fn, again.grad_fn]
    first, second = (Tape([root], names) for root in roots)
    if first.key == second.key:
        return
    yield Finding(
        "slow",
        "graph",
        f"not the same twice: {len(first.nodes)} nodes, then {len(second.nodes)}",
        "Whose rows are whose is measured for each structure of the graph, by two or "
        "more further passes, and kept for the last 64. Layers left out at random and "
        "loops of any length make many.",
        "One structure on the steps that are probed, or every= for few of them.",
    )
