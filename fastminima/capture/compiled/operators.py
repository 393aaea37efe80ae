"""The operators that stand in compiled code, and who is told what they are given.

    product(mark, left, right)   left @ right, a weight's gradient: computed here, so
                                 that fused statistics may come from the same tiles
    look(mark, [g, ...])         nothing: what another gradient is computed from

Where nobody watches, they do what the compiled step would do without them. Who watches
a region is noted on the node that the region left in the graph: it is the node that
runs, whatever thread and whatever pass it runs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from ..graph.node import Node
from .marks import Mark, mark_of, refusal

__all__ = ["LOOK", "PRODUCT", "Receiver", "receive"]

_KEY = "fastminima.receiver"


@runtime_checkable
class Receiver(Protocol):
    """Takes what the operators of one region are given in a pass."""

    def take(self, mark: Mark, g: Tensor, saved: Sequence[Tensor]) -> Tensor | None:
        """A use's output gradient, and what its node would have saved.

        May return the gradient of the one weight that it adds to, as `mark.into` has
        its shape and moves, where it made it.
        """
        ...

    def refuse(self, reason: str) -> None:
        """The region is not marked."""
        ...


def receive(node: Node, receiver: Receiver) -> Any:
    """Tell `receiver` what the operators of a region are given; returns a handle.

    Several may be told, as several probes may watch one pass.
    """
    metadata: Any = node.metadata
    metadata[_KEY] = (*metadata.get(_KEY, ()), receiver)
    return _Handle(metadata, receiver)


class _Handle:
    """Of a receiver: takes it away."""

    def __init__(self, metadata: dict[str, Any], receiver: Receiver) -> None:
        self._metadata, self._receiver = metadata, receiver

    def remove(self) -> None:
        """Tell it nothing any more."""
        told = self._metadata.get(_KEY, ())
        left = tuple(x for x in told if x is not self._receiver)
        if left:
            self._metadata[_KEY] = left
        else:
            self._metadata.pop(_KEY, None)


def _receivers() -> tuple[Receiver, ...]:
    node: Any = torch._C._current_autograd_node()
    return () if node is None else node.metadata.get(_KEY, ())


def _product(text: str, left: Tensor, right: Tensor) -> Tensor:
    made = None
    for receiver in _receivers():
        mark = mark_of(text)
        own = receiver.take(mark, *_operands(mark, left, right))
        made = own if made is None else made
    if made is not None:
        return made
    return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)


def _operands(mark: Mark, left: Tensor, right: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The gradient, whose rows are those of both factors, and the other factor."""
    left = left.transpose(-1, -2)
    return (left, [right]) if mark.constants["is_left"] else (right, [left])


def _look(text: str, tensors: list[Tensor]) -> None:
    for receiver in _receivers():
        reason = refusal(text)
        if reason is not None:
            receiver.refuse(reason)
        else:
            receiver.take(mark_of(text), tensors[0], tensors[1:])


def _product_shape(text: str, left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]))


def _no_shape(text: str, tensors: list[Tensor]) -> None:
    pass


# Under CUDA graphs they run between the graphs: a replay calls no Python.
_TAGS = torch.Tag.flexible_layout, torch.Tag.cudagraph_unsafe
_LIBRARY = torch.library.Library("fastminima", "FRAGMENT")
for _schema, _run in (
    ("product(str mark, Tensor left, Tensor right) -> Tensor", _product),
    ("look(str mark, Tensor[] tensors) -> ()", _look),
):
    _LIBRARY.define(_schema, tags=_TAGS)
    _LIBRARY.impl(_schema.split("(")[0], _run, "CompositeExplicitAutograd")
PRODUCT = torch.ops.fastminima.product.default
LOOK = torch.ops.fastminima.look.default
torch.library.register_fake("fastminima::product", _product_shape, lib=_LIBRARY)
torch.library.register_fake("fastminima::look", _no_shape, lib=_LIBRARY)
has_side_effect(LOOK)  # compilers take out what nobody reads
