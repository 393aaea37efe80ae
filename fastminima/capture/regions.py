"""Regions that reentrant checkpointing runs again inside the backward pass.

`torch.utils.checkpoint(..., use_reentrant=True)` leaves one node in the graph. When the
backward pass gets there, the region's function runs again and a backward pass of its
own follows. The graph in between is read like any other: the function that the node
runs is replaced, for one pass, by one that shows the new graph to its watchers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from .errors import CaptureError
from .layout import RowLayout
from .measure import Fingerprints
from .plan import Plan, reads_data, watched_nodes
from .tape import Tape

__all__ = ["Region", "Survey", "Watcher", "block_leaves", "region_nodes", "watch"]

Watcher = Callable[[Sequence[Any], Sequence[Tensor]], None]
_NODE = "CheckpointFunctionBackward"
_NODE_TYPE = checkpoint.CheckpointFunction._backward_cls


@dataclass(frozen=True)
class Region:
    """What was found out about a recomputed region: how to read it."""

    key: tuple
    plan: Plan
    layouts: Sequence[Sequence[RowLayout | None]]
    shapes: tuple

    def read(self, outputs: Sequence[Tensor], names: Mapping[int, str]) -> Tape:
        """The graph of a recomputation, when it is the one that was measured.

        Raises:
            CaptureError: when it is another.
        """
        tape = Tape(_roots(outputs), names)
        if tape.key != self.key or self.plan.signature(tape) != self.shapes:
            raise CaptureError(
                "A region under checkpoint(use_reentrant=True) computed something else "
                "now than when its rows were measured. Use use_reentrant=False."
            )
        return tape


class Survey:
    """What the measuring passes see of one region."""

    def __init__(self, names: Mapping[int, str], own: set[int]) -> None:
        self._names, self._own = names, own
        self.seen: dict[int, Fingerprints] = {}
        self.reads: set[int] = set()  # preparations that read data
        self.tape: Tape | None = None
        self._handles: list[Any] = []
        self._inputs: list[Tensor] = []  # detached copies, gone with the graph

    def __call__(self, inputs: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        """Watch the region's graph in its next pass; let no gradient accumulate."""
        tape = self.tape = Tape(_roots(outputs), self._names)
        if region_nodes(tape):
            raise CaptureError(
                "A region under checkpoint(use_reentrant=True) contains another one; "
                "use use_reentrant=False."
            )
        for i in watched_nodes(tape):
            prints = self.seen.setdefault(i, Fingerprints())
            self._handles.append(tape.nodes[i].register_prehook(prints))
            if tape.is_parameter_side[i] and reads_data(tape, i, self._own):
                self.reads.add(i)
        spared = [t for t in inputs if isinstance(t, Tensor)]
        self._handles += block_leaves(tape, spared)
        self._inputs = spared

    def free_inputs(self, *_: Any) -> None:
        """Let go of the gradients of the region's inputs, once they were passed on."""
        while self._inputs:
            self._inputs.pop().grad = None

    def remove(self) -> None:
        """Unhook the graph of the last pass."""
        self.free_inputs()
        while self._handles:
            self._handles.pop().remove()


class _Recomputed:
    """Stands in for the function of a checkpointed region."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.watchers: list[Watcher] = []

    def __call__(self, *inputs: Any) -> Any:
        outputs = self.original(*inputs)
        for watcher in list(self.watchers):
            watcher(inputs, (outputs,) if isinstance(outputs, Tensor) else outputs)
        return outputs


@dataclass(frozen=True)
class _Handle:
    node: Any
    watcher: Watcher

    def remove(self) -> None:
        """Put the region's own function back when nobody watches any more."""
        stand_in = self.node.run_function
        stand_in.watchers.remove(self.watcher)
        if not stand_in.watchers:
            self.node.run_function = stand_in.original


def region_nodes(tape: Tape) -> list[int]:
    """Nodes of reentrant checkpoints."""
    return [
        i
        for i, name in enumerate(tape.names)
        if name == _NODE and isinstance(tape.nodes[i], _NODE_TYPE)
    ]


def watch(node: Any, watcher: Watcher) -> _Handle:
    """Show every recomputation of the node's region: `watcher(inputs, outputs)`."""
    if not isinstance(node.run_function, _Recomputed):
        node.run_function = _Recomputed(node.run_function)
    node.run_function.watchers.append(watcher)
    return _Handle(node, watcher)


def block_leaves(tape: Tape, but: Sequence[Tensor] = ()) -> list[Any]:
    """Let no gradient accumulate in the leaves of a graph; returns handles."""
    spared = {id(t) for t in but}
    return [
        node.register_prehook(_blocked)
        for i, node in enumerate(tape.nodes)
        if tape.is_leaf(i) and id(node.variable) not in spared
    ]


def _blocked(grads: tuple[Tensor | None, ...]) -> tuple[None, ...]:
    return (None,) * len(grads)


def _roots(outputs: Sequence[Any]) -> list[Any]:
    tensors = [t for t in outputs if isinstance(t, torch.Tensor)]
    return [t.grad_fn for t in tensors if t.grad_fn is not None]
