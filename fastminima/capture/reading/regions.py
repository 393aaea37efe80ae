"""Regions of a graph that show one node and hold a graph of their own.

`checkpoint(..., use_reentrant=True)` leaves one node behind; when the backward pass
gets there, the region's function runs again and a backward pass of its own follows. A
region compiled through `fastminima.compile` is one node too; what it computes can be
run again uncompiled (`compiled.py`). Either way the graph in between is shown to
watchers just before the backward pass runs through it, and read like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import checkpoint

from ..compiled.operators import receive
from ..errors import CaptureError
from ..graph import replay as compiled
from ..graph.node import Node
from ..graph.passes import belongs_to_another
from ..graph.tape import Tape
from ..rows.fingerprints import Fingerprints
from ..rows.gates import Gates
from ..rows.measure import leaves_below
from .marked import Sight
from .mixing import freeze, mixing_nodes
from .plan import reads_data, watched_nodes

__all__ = [
    "Survey",
    "Watcher",
    "block_leaves",
    "identity",
    "is_reentrant",
    "named_inputs",
    "region_nodes",
    "region_shapes",
    "tape_of",
    "watch",
]

# Called with the region's inputs and outputs, before its backward pass; returns the
# leaves that the pass has to reach where it is up to us.
Watcher = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]
_NODE = "CheckpointFunctionBackward"
_KINDS = frozenset([_NODE, f"{compiled.NODE}Backward"])
_NODE_TYPE = checkpoint.CheckpointFunction._backward_cls


class Survey:
    """What the measuring passes see of one region."""

    def __init__(
        self,
        names: Mapping[int, str],
        inputs: Mapping[int, str],
        own: set[int],
        *,
        batch: int,
        gates: Gates,
        accumulates: bool,
        freezes: bool,
    ) -> None:
        self._names, self.inputs, self._own = names, inputs, own
        self._batch, self.gates = batch, gates
        self._accumulates = accumulates  # its pass would add to `.grad`
        self._freezes = freezes  # batch statistics are constants
        self.seen: dict[int, Fingerprints] = {}
        self.reads: set[int] = set()  # preparations that read data
        self.tape: Tape | None = None
        self.sight: Sight | None = None  # of a compiled region's own uses
        self._edges: list[GradientEdge] = []  # they keep the nodes of the tape
        self._handles: list[Any] = []
        self._detached: list[Tensor] = []  # inputs, gone with the graph

    def __call__(
        self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Watch the region's graph in its next pass; let no gradient accumulate."""
        tape = self.tape = tape_of(inputs, outputs, self._names, self.inputs)
        self._edges = _edges_of(outputs)
        if region_nodes(tape):
            raise CaptureError(
                "A region under checkpoint(use_reentrant=True), or a compiled one, "
                "contains another such region; use use_reentrant=False."
            )
        watched = watched_nodes(tape)
        if self._freezes:
            self._handles += freeze(tape, mixing_nodes(tape, self._batch))
        self._handles += self.gates.hooks(tape)
        for i in watched:
            prints = self.seen.setdefault(i, Fingerprints(self._batch))
            self._handles.append(tape.nodes[i].register_prehook(prints))
            if tape.is_parameter_side[i] and reads_data(tape, i, self._own):
                self.reads.add(i)
        if self._accumulates:
            self._handles += block_leaves(tape, inputs)
            self._detached = list(inputs)
        return leaves_below(tape, watched)

    def note_copies(self, given: Sequence[Tensor], used: Sequence[Tensor]) -> None:
        """Take copies of the model's own tensors for its own too."""
        for t, copy in zip(given, used, strict=True):
            if t.untyped_storage()._cdata in self._own:
                self._own.add(copy.untyped_storage()._cdata)

    def look_inside(self, node: Node, owner: object) -> list[Any]:
        """Watch the uses that a compiled region shows of itself; returns handles."""
        if is_reentrant(node):
            return []
        if self.sight is None:
            self.sight = Sight(self.seen, self._batch, owner)
        return [receive(node, self.sight)]

    def free_inputs(self, *_: Any) -> None:
        """Let go of the gradients of the region's inputs, once they were passed on."""
        while self._detached:
            self._detached.pop().grad = None

    def remove(self) -> None:
        """Unhook the graph of the last pass."""
        self.free_inputs()
        while self._handles:
            self._handles.pop().remove()


def _edges_of(outputs: Sequence[Any]) -> list[GradientEdge]:
    """What owns a graph, and not the memory of its tensors.

    What Python sees of an `autograd.Function` does not in PyTorch 2.11: it says
    nothing of itself when the graph has gone.
    """
    tensors = [t for t in outputs if isinstance(t, torch.Tensor)]
    return [get_gradient_edge(t) for t in tensors if t.requires_grad]


class _Recomputed:
    """Stands in for the function of a checkpointed region."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.watchers: list[Callable[[Sequence[Any], Any], None]] = []

    def __call__(self, *inputs: Any) -> Any:
        outputs = self.original(*inputs)
        for watcher in list(self.watchers):
            watcher(inputs, outputs)
        return outputs


@dataclass(frozen=True)
class _Handle:
    node: Any
    watcher: Callable[[Sequence[Any], Any], None]

    def remove(self) -> None:
        """Put the region's own function back when nobody watches any more."""
        stand_in = self.node.run_function
        stand_in.watchers.remove(self.watcher)
        if not stand_in.watchers:
            self.node.run_function = stand_in.original


def is_reentrant(node: Node) -> bool:
    """Whether a node is that of a reentrant checkpoint."""
    return isinstance(node, _NODE_TYPE)


def region_nodes(tape: Tape) -> list[int]:
    """Nodes that hold a graph of their own."""
    if _KINDS.isdisjoint(tape.names):
        return []
    return [
        i
        for i, name in enumerate(tape.names)
        if (name == _NODE and is_reentrant(tape.nodes[i]))
        or (name in _KINDS and compiled.replay_of(tape.nodes[i]))
    ]


def identity(tape: Tape, i: int) -> int:
    """A number for what a region computes, where the graph does not show it."""
    replay = compiled.replay_of(tape.nodes[i])
    return 0 if replay is None else replay.number


def region_shapes(tape: Tape, i: int) -> tuple:
    """Shapes of what goes into a region and comes out of it, and the integers it gets.

    These may be sizes too, or say where rows go.
    """
    node = tape.nodes[i]
    replay = compiled.replay_of(node)
    if replay is None:
        tensors, others = node.saved_tensors, node.inputs
    else:
        tensors, others = replay.tensors, replay.inputs
    shapes = (tuple(t.shape) for t in tensors)
    return *tape.shapes(i), *shapes, *(x for x in others if isinstance(x, int))


def named_inputs(tape: Tape, i: int) -> dict[int, str]:
    """Parameters that a region is given: place among its tensors -> name."""
    if not is_reentrant(tape.nodes[i]):
        return {}  # it runs again on the parameters themselves
    return {
        place: tape.parameter_at[edge[0]]
        for place, edge in enumerate(tape.children[i])
        if edge is not None and edge[0] in tape.parameter_at
    }


def watch(
    node: Any, watcher: Watcher, owner: object, *, may_differ: bool = False
) -> Any:
    """Show the region's graph whenever a pass of `owner`, or the user's, gets there.

    `may_differ` lets a compiled region compute other numbers than before.
    """
    replay = compiled.replay_of(node)
    if replay is not None:

        def before(grads: tuple[Tensor | None, ...]) -> None:
            if not belongs_to_another(owner):
                inputs, outputs = replay.run(may_differ=may_differ)
                if isinstance(watcher, Survey):
                    watcher.note_copies(replay.tensors, inputs)
                replay.backward(outputs, grads, watcher(inputs, outputs))

        return node.register_prehook(before)

    def show(inputs: Sequence[Any], outputs: Any) -> None:
        if not belongs_to_another(owner):
            tensors = (outputs,) if isinstance(outputs, Tensor) else outputs
            watcher([t for t in inputs if isinstance(t, Tensor)], tensors)

    if not isinstance(node.run_function, _Recomputed):
        node.run_function = _Recomputed(node.run_function)
    node.run_function.watchers.append(show)
    return _Handle(node, show)


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


def tape_of(
    inputs: Sequence[Tensor],
    outputs: Sequence[Any],
    names: Mapping[int, str],
    given: Mapping[int, str],
) -> Tape:
    """The graph between what goes into a region and what comes out of it.

    `given` names the parameters of which the region gets copies, by place among its
    inputs. It may use the parameters themselves too.
    """
    tensors = [t for t in outputs if isinstance(t, torch.Tensor)]
    roots = [t.grad_fn for t in tensors if t.grad_fn is not None]
    return Tape(
        roots, names, {id(inputs[place]): name for place, name in given.items()}
    )
