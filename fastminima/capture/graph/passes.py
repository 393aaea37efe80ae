"""Extra backward passes over a graph that nobody else must take for training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph

from .node import Node
from .replay import keeping_graphs
from .saved import forget_pass

__all__ = [
    "belongs_to_another",
    "is_capturing",
    "is_distributed",
    "nobodys",
    "owner_of_pass",
    "owners",
    "replicas_at_rest",
    "run_pass",
    "run_whole_pass",
]

# Engine pass -> whose it is. A pass that is not here is the user's own.
_owners: dict[int, object] = {}
_NOBODY = object()


def run_pass(
    output: Tensor,
    leaves: Sequence[Tensor],
    owner: object,
    weights: Tensor | None = None,
    frames: Sequence[Any] = (),
) -> tuple[Tensor | None, ...]:
    """Gradients of `output` for `leaves`; hooks of sessions other than `owner` rest.

    The graph stays usable and no `.grad` changes. `frames` are the checkpointed regions
    of the graph, which would keep what they recompute as long as the graph is kept.
    """
    with _owned(output, owner, frames) as top:
        return torch.autograd.grad(
            top,
            leaves,
            grad_outputs=torch.ones_like(top) if weights is None else weights,
            retain_graph=True,
            allow_unused=True,
        )


def run_whole_pass(
    output: Tensor,
    owner: object,
    weights: Tensor | None = None,
    frames: Sequence[Any] = (),
) -> None:
    """A pass by `backward` instead, for graphs that allow nothing else.

    Gradients accumulate in every leaf that the caller has not blocked.
    """
    with _owned(output, owner, frames) as top:
        top.backward(
            torch.ones_like(top) if weights is None else weights, retain_graph=True
        )


@contextmanager
def nobodys(node: Node | graph.Node) -> Iterator[None]:
    """A pass that starts at `node`, inside another one, counts for no session.

    It pushes a gradient through nodes that prepare a parameter, and may come by uses
    of the pass that it is part of.
    """
    number: list[int] = []

    def mark(grads: tuple[Tensor | None, ...]) -> None:
        task = torch._C._current_graph_task_id()
        number.append(task)
        _owners.setdefault(task, _NOBODY)

    handle = node.register_prehook(mark)
    try:
        yield
    finally:
        handle.remove()
        for task in number:
            _owners.pop(task, None)


@contextmanager
def _owned(output: Tensor, owner: object, frames: Sequence[Any]) -> Iterator[Tensor]:
    """A copy of `output` whose backward pass belongs to `owner`."""
    # A pass may run where no graph is made. Inference mode first: leaving it changes
    # whether gradients are on.
    with torch.inference_mode(False), torch.enable_grad():
        top = output.clone()  # its node comes before every hook on the graph
    assert top.grad_fn is not None
    number: list[int] = []

    def mark(grads: tuple[Tensor, ...]) -> None:
        number.append(torch._C._current_graph_task_id())
        _owners[number[0]] = owner

    top.grad_fn.register_prehook(mark)
    try:
        with keeping_graphs():
            yield top
    finally:
        for i in number:
            _owners.pop(i, None)
            forget_pass(frames, i)


def belongs_to_another(session: object) -> bool:
    """Whether the pass that calls this hook is an extra one, not run for `session`."""
    if not _owners:
        return False
    return _owners.get(torch._C._current_graph_task_id(), session) is not session


def owners() -> dict[int, object]:
    """Whom each pass belongs to that is running and not the user's own."""
    return _owners


def owner_of_pass() -> object | None:
    """Whom the pass that calls this hook was run for; None for the user's own."""
    return _owners.get(torch._C._current_graph_task_id()) if _owners else None


def is_capturing(t: Tensor) -> bool:
    """Whether what happens to a tensor goes into a CUDA graph: nothing may be read."""
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


def is_distributed() -> bool:
    """Whether this process is one of several that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


@contextmanager
def replicas_at_rest(nodes: Sequence[Node]) -> Iterator[None]:
    """Keep extra passes over these nodes from DistributedDataParallel's first step.

    Its reducer hangs on the accumulation of gradients, which an extra pass does not do.
    But with `static_graph=True` it counts the first pass through its outputs, whatever
    it is for, as the one whose end is to start the reduction.
    """
    names = (node.name() for node in nodes)
    sinks = [n for n, name in zip(nodes, names, strict=True) if "_DDPSink" in name]
    replicas = [replica for s in sinks if (replica := s.ddp_weakref()) is not None]
    waiting = [r for r in replicas if r.static_graph]
    before = [r._static_graph_delay_allreduce_enqueued for r in waiting]
    for replica in waiting:
        replica._static_graph_delay_allreduce_enqueued = True
    try:
        yield
    finally:
        for replica, was in zip(waiting, before, strict=True):
            replica._static_graph_delay_allreduce_enqueued = was
