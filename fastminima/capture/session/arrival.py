"""What really runs: the pass that reaches an attached loss, and what it brings.

Between `attach` and `collect` the backward pass is somebody else's. The gradient that
arrives at the loss says by what the loss was multiplied on the way; the graph between
the tensor that is differentiated and the loss says what else is in the pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph

from ..errors import CaptureError
from ..graph.node import Node, current_node
from ..graph.nodes import ACCUMULATE, EVEN
from ..graph.passes import owner_of_pass
from ..graph.tape import Tape

__all__ = ["Arrival", "PassFilter", "Surroundings", "surroundings"]

_ENGINE = graph._engine_run_backward.__code__


@dataclass
class Surroundings:
    """The nodes of a running pass that are not part of an attached graph.

    Attributes:
        leaves: parameters of the graph that also get gradients from elsewhere.
        shared: name of a node in the graph that does, and is no parameter; None if
            there is none.
        is_even: whether all samples are known to weigh the same, without looking.
        is_known: whether the pass could be seen at all.
    """

    leaves: set[str] = field(default_factory=set)
    shared: str | None = None
    is_even: bool = False
    is_known: bool = True


class Arrival:
    """Waits at an attached loss for the pass that reaches it.

    It holds nothing of the graph, which would keep it alive.

    Args:
        names: of the tracked parameters, by id.
        on_arrival: called with the gradient that arrives and what surrounds the graph,
            once, before anything else of the graph runs.
    """

    def __init__(
        self,
        loss: Tensor,
        names: Mapping[int, str],
        on_arrival: Callable[[Tensor, Surroundings], None],
    ) -> None:
        assert loss.grad_fn is not None
        self.task: int | None = None  # of the pass that has arrived
        self.is_done = False  # that pass has ended
        self._output = loss.output_nr
        self._names = names
        self._on_arrival = on_arrival
        self._handle = loss.grad_fn.register_prehook(self._arrive)

    def is_on(self, *, by_task: bool) -> bool:
        """Whether the pass that calls this has come by the loss.

        Passes inside it (reentrant checkpoints) are tasks of their own.
        """
        if self.task is None:
            return False
        return not by_task or self.task == torch._C._current_graph_task_id()

    def remove(self) -> None:
        """Wait no longer."""
        self._handle.remove()

    def _arrive(self, grads: tuple[Tensor | None, ...]) -> None:
        g = grads[self._output]
        if g is None or owner_of_pass() is not None:
            return
        if self.task is not None:
            raise CaptureError(
                "A second backward pass reached the attached loss. Attach before each "
                "backward pass, and collect after it."
            )
        self.task = torch._C._current_graph_task_id()
        # Where it ends with an error it is not done, and nothing comes after it.
        torch.autograd.Variable._execution_engine.queue_callback(self._end)
        node = current_node()
        self._on_arrival(g.detach(), surroundings(node, self._output, self._names))

    def _end(self) -> None:
        self.is_done = True


class PassFilter:
    """Tells the pass that is observed from all others that come by the same nodes.

    Args:
        owner: of the passes that are run for it; an object of its own if None.
        arrival: of the loss, where the pass is not run by the probe itself.
        has_inner_passes: whether passes inside that one belong to it.
    """

    def __init__(
        self, owner: object, arrival: Arrival | None, *, has_inner_passes: bool
    ) -> None:
        # Not the session: what it holds would hold it.
        self.owner = object() if owner is None else owner
        self.arrival = arrival
        self.by_task = not has_inner_passes
        self._is_closed = False

    def close(self) -> None:
        """Let every pass be another's: of a node that runs, hooks are called still."""
        self._is_closed = True

    def is_anothers(self) -> bool:
        """Whether the pass that calls this is not the one that is observed."""
        if self._is_closed:
            return True
        owner = owner_of_pass()
        if owner is not None:
            return owner is not self.owner
        arrival = self.arrival
        return arrival is not None and not arrival.is_on(by_task=self.by_task)

    def is_over(self) -> bool:
        """Whether what comes now comes after the pass, which left it out.

        As of a probe in fused mode that runs the pass. A pass inside it, which a hook
        of the user may run, does not.
        """
        is_over = self.arrival is not None and self.arrival.is_done
        return is_over and owner_of_pass() is None


def surroundings(node: Node, output: int, names: Mapping[int, str]) -> Surroundings:
    """What else is in the pass that runs, above and beside the graph of a node."""
    roots = _running_roots(node)
    if roots is None:
        return Surroundings(is_known=False)
    walk = _Walk(node, output, names)
    for root, number in roots:
        walk.meet(root, number)
    while walk.waiting:
        above = walk.waiting.pop()
        for child, number in above.next_functions:
            if child is not None:
                walk.meet(child, number, above)
    return walk.surroundings()


class _Walk:
    """From where a pass starts down to the graph of a node."""

    def __init__(self, node: Node, output: int, names: Mapping[int, str]) -> None:
        self._top, self._output, self._names = node, output, names
        self._age = node._sequence_nr()
        self._entered: set[Any] = set()
        self._found = Surroundings()
        self._is_even = self._is_used = False
        self.waiting: list[Any] = []

    @cached_property
    def _graph(self) -> tuple[Tape, dict[Any, int]]:
        """Walked only where something leads past the loss."""
        tape = Tape([self._top], self._names)
        return tape, {node: i for i, node in enumerate(tape.nodes)}

    def meet(self, node: Node, number: int, above: Any = None) -> None:
        """Come to a node by an edge from another one, or start with it."""
        if node == self._top and number == self._output:
            is_even = above is not None and above.name() in EVEN
            self._is_even = is_even and (self._is_even or not self._is_used)
            self._is_used = True
            return
        if node in self._entered:
            return
        self._entered.add(node)
        if node.name() != ACCUMULATE and node._sequence_nr() > self._age:
            self.waiting.append(node)  # it is younger than the loss, so not below it
            return
        tape, numbers = self._graph
        i = numbers.get(node)
        if i is None:
            self.waiting.append(node)
        elif tape.is_leaf(i):
            if i in tape.parameter_at:
                self._found.leaves.add(tape.parameter_at[i])
        else:
            self._found.shared = tape.names[i]

    def surroundings(self) -> Surroundings:
        """What was met."""
        self._found.is_even = self._is_even
        return self._found


def _running_roots(node: Node) -> list[tuple[Any, int]] | None:
    """The nodes that the running pass starts from; None where it cannot be seen.

    The engine was called from Python by this thread or, on GPUs, by another.
    """
    calls = _running_calls()
    reaching = []
    for outputs in calls:
        roots = [_root(t) for t in outputs]
        if len(calls) == 1 or _reaches([root for root, _ in roots], node):
            reaching.append(roots)
    return reaching[0] if len(reaching) == 1 else None


def _running_calls() -> list[Any]:
    """What the engine was asked for by this thread; where it was not, by each other.

    No name here holds a frame: one that holds its own would live, with the graph, until
    the garbage collector runs.
    """
    own = [*_engine_calls(sys._getframe())][:1]
    return own or [
        call
        for frame in sys._current_frames().values()
        for call in [*_engine_calls(frame)][:1]
    ]


def _engine_calls(frame: FrameType | None) -> Iterator[Any]:
    """What the engine was asked to differentiate, innermost call first."""
    while frame is not None:
        if frame.f_code is _ENGINE:
            yield frame.f_locals["t_outputs"]
        frame = frame.f_back


def _root(output: Any) -> tuple[Any, int]:
    if isinstance(output, graph.GradientEdge):
        return output.node, output.output_nr
    return output.grad_fn, output.output_nr


def _reaches(roots: list[Any], node: Node) -> bool:
    """Whether a pass from some nodes comes by another."""
    stack, entered = list(roots), set()
    while stack:
        above = stack.pop()
        if above == node:
            return True
        if above is not None and above not in entered:
            entered.add(above)
            stack += [child for child, _ in above.next_functions]
    return False
