"""Compiled modules that can be probed: what they compute can be run again uncompiled.

A region compiled by `torch.compile` is one opaque node of the autograd graph. A backend
is given the region as a graph of ordinary PyTorch operations before it compiles it, and
the tensors it is called with; `compile` keeps both on the node. On a probed step the
probe runs that graph on those tensors and takes its backward pass with the same output
gradient; training itself uses the compiled code throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.utils.checkpoint import checkpoint

from ..errors import CaptureError
from .node import Node

__all__ = [
    "NODE",
    "Replay",
    "keeping_graphs",
    "note",
    "replay_of",
    "runnable",
    "versions_of",
]

NODE = "CompiledFunction"
_KEY = "fastminima"


class Place(NamedTuple):
    """Where an output of a region's node is among those of its graph.

    Attributes:
        number: of the graph's output.
        output: of the node's.
        is_base: whether the graph's is a view of the node's.
    """

    number: int
    output: int
    is_base: bool

    def of(self, outputs: Sequence[Any]) -> Any:
        """The tensor, among what the graph has computed."""
        found = outputs[self.number]
        return found._base if self.is_base else found


class Replay:
    """One call of a compiled region: its graph and the tensors it was given."""

    def __init__(
        self,
        graph: Callable[..., Any],
        number: int,
        inputs: Sequence[Any],
        versions: list[int],
        outputs: dict[int, Place],
    ) -> None:
        self.number = number
        self.difference: str | None = None  # why it may not be what it was
        self._graph = graph
        self.inputs = tuple(inputs)
        self._outputs = outputs  # by output of the node
        self._versions = versions  # before the call, which may write into a buffer
        self._autocast = [
            (device, torch.get_autocast_dtype(device))
            for device in {t.device.type for t in self.tensors}
            if torch.is_autocast_enabled(device)
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the inputs."""
        return [t for t in self.inputs if isinstance(t, Tensor)]

    def run(self, *, may_differ: bool = False) -> tuple[list[Tensor], list[Any]]:
        """Compute the region uncompiled: its tensors, and what it returns.

        Args:
            may_differ: whether other numbers will do, as they do where only the rows
                are looked at; `difference` says then what is wrong.

        Raises:
            CaptureError: when it draws random numbers, or a tensor that it was given
                has changed since, so that the result would be another.
        """
        if versions_of(self.inputs) != self._versions:
            self._differ(
                "A tensor that a compiled region reads was changed in place, by the "
                "region or after it (a buffer of the model?), so it cannot be run "
                "again for the probe.",
                may_differ,
            )
        inputs = [_separate(t) for t in self.inputs]
        devices = {t.device for t in self.tensors if t.is_cuda}
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng([d.index for d in devices]))
            before = _random_states(devices)
            stack.enter_context(torch.enable_grad())
            for device, dtype in self._autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            found = self._graph(*inputs)
            after = _random_states(devices)
        if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            self._differ(
                "A compiled region draws random numbers (dropout?), and run again for "
                "the probe it would draw others.",
                may_differ,
            )
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        return tensors, list(found) if isinstance(found, list | tuple) else [found]

    def _differ(self, message: str, may_differ: bool) -> None:
        self.difference = f"{message} Run the uncompiled module on the steps you probe."
        if not may_differ:
            raise CaptureError(self.difference)

    def backward(
        self,
        outputs: Sequence[Any],
        grads: Sequence[Tensor | None],
        leaves: Sequence[Tensor],
    ) -> None:
        """Take the pass through what `run` returned, as far as `leaves`."""
        roots, seeds = [], []
        for number, grad in enumerate(grads):
            if grad is None:
                continue
            place = self._outputs.get(number)
            output = None if place is None else place.of(outputs)
            if output is None or output.shape != grad.shape:
                raise CaptureError(
                    "A gradient came to a compiled region by a way that is not one of "
                    "its outputs. Run the uncompiled module on the steps you probe."
                )
            if output.requires_grad:
                roots.append(output)
                seeds.append(grad)
        if roots and leaves:
            torch.autograd.grad(roots, list(leaves), seeds, allow_unused=True)


def replay_of(node: Node) -> Replay | None:
    """How to run the region behind a node of the graph, if that is known."""
    return node.metadata.get(_KEY)


def runnable(graph: fx.GraphModule) -> fx.GraphModule:
    """A region's graph, or a copy whose checkpoints can run uncompiled.

    As they are, their second computation would draw other random numbers, and what a
    policy chooses to save would be there only once.
    """
    inner = {
        name: runnable(child)
        for name, child in graph.named_children()
        if isinstance(child, fx.GraphModule)
    }
    is_same = all(getattr(graph, name) is child for name, child in inner.items())
    if is_same and not _checkpoints(graph):
        return graph
    found = fx.GraphModule(graph, deepcopy(graph.graph))
    for name, child in inner.items():
        setattr(found, name, child)
    for node in _checkpoints(found):
        _, node.kwargs = tag_activation_checkpoint.divide_kwargs(node.kwargs)
        node.target = _checkpointed
    found.recompile()
    return found


def _checkpoints(graph: fx.GraphModule) -> list[fx.Node]:
    found = graph.graph.find_nodes(op="call_function", target=tag_activation_checkpoint)
    return list(found)


def _checkpointed(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, **options)


def keeping_graphs() -> AbstractContextManager[Any]:
    """What is compiled in it, and then run in it, may keep its graph.

    A pass that measures rows does; buffers that compiled code reuses forbid it.
    """
    from torch._functorch import config

    return config.patch(donated_buffer=False)


def versions_of(inputs: Sequence[Any]) -> list[int]:
    """How often each tensor among some inputs was changed in place."""
    return [t._version for t in inputs if isinstance(t, Tensor)]


def note(
    outputs: Any, graph: Any, number: int, inputs: Sequence[Any], versions: list[int]
) -> None:
    """Keep a call of a region on the node that it left in the graph."""
    found = outputs if isinstance(outputs, list | tuple) else [outputs]
    before = {t.grad_fn for t in inputs if isinstance(t, Tensor)}
    places: dict[Any, dict[int, Place]] = {}
    for i, t in enumerate(found):
        if not isinstance(t, Tensor) or t.grad_fn is None:
            continue
        node, place = t.grad_fn, Place(i, t.output_nr, is_base=False)
        if t._is_view() and not node.name().startswith(NODE):
            # Made outside, of what the region's node has given.
            node, output = node.next_functions[0]
            place = Place(i, output, is_base=True)
        if node is None or node in before or not node.name().startswith(NODE):
            continue  # an input that is passed on
        of_node = places.setdefault(node, {})
        if place.output not in of_node or not place.is_base:
            of_node[place.output] = place
    if len(places) == 1:
        ((node, of_node),) = places.items()
        metadata: Any = node.metadata
        metadata[_KEY] = Replay(graph, number, inputs, versions, of_node)


def _separate(t: Any) -> Any:
    """An input of a region such that its backward pass ends there.

    Parameters stay themselves, frozen ones too; any other tensor that needs no gradient
    is copied, in case the region writes into it.
    """
    if not isinstance(t, Tensor) or isinstance(t, nn.Parameter):
        return t
    if t.requires_grad and t.is_leaf:
        return t
    if t.requires_grad:
        return t.detach().requires_grad_()
    return t.clone()


def _random_states(devices: Sequence[Any] | set) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device) for device in devices]
