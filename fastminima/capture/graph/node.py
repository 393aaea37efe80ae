"""What is relied on of autograd's nodes beyond their public interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import graph

__all__ = ["Node", "OutputInfo", "current_node", "edge_of"]


@runtime_checkable
class OutputInfo(Protocol):
    """What a node knows of one of its outputs, and so of a gradient that reaches it."""

    dtype: torch.dtype
    device: torch.device
    shape: Sequence[int]
    is_nested_tensor: bool


def current_node() -> Node:
    """The node whose hook is running."""
    return cast(Node, torch._C._current_autograd_node())


def edge_of(node: Node, output: int) -> graph.GradientEdge:
    """The edge that leads to an output of a node."""
    return graph.GradientEdge(cast(graph.Node, node), output)


@runtime_checkable
class Node(Protocol):
    """A node of autograd's graph, as `torch.autograd.graph.Node` has it and more.

    What it saved is `node._saved_<name>` (a tensor, or a number), by the names of
    `derivatives.yaml`; `node._raw_saved_<name>` is the same tensor, not unpacked. They
    are gone after the backward pass. `variable` is there on accumulators of gradients
    only, `saved_tensors` on Python functions.
    """

    @property
    def _input_metadata(self) -> Sequence[OutputInfo]:
        """One for each output."""
        ...

    @property
    def next_functions(self) -> Sequence[tuple[Any, int]]:
        """Of each input, the node that it is an output of, and its number there."""
        ...

    def name(self) -> str:
        """Such as AddmmBackward0."""
        ...

    def _sequence_nr(self) -> int:
        """Higher for nodes that were made later, in one thread."""
        ...

    def register_hook(self, fn: Callable[..., Any]) -> Any:
        """Called with the gradients that leave and those that came; a handle."""
        ...

    def register_prehook(self, fn: Callable[..., Any]) -> Any:
        """Called with the gradients that come; a handle."""
        ...

    def __call__(self, *grads: Tensor | None) -> Any:
        """The gradients of its inputs, from those of its outputs."""
        ...

    if TYPE_CHECKING:  # no member of its own at run time

        def __getattr__(self, name: str) -> Any:
            """What it saved."""
            ...
