"""Functions of users: what may say there where rows go.

A `torch.autograd.Function` (or a custom op) keeps what it likes in its `ctx`. Rows go
where an index in it says, so a layout holds while all numbers and indices in it are
what they were: integers, masks over rows, selections written as zeros and ones. Floats
scale rows and do not move them; masks shaped like what goes in or out work element by
element.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..graph.node import Node
from ..graph.replay import NODE as COMPILED
from ..graph.saved import saved_tensor
from ..graph.tape import Tape

__all__ = ["OwnGuard", "is_own", "own_guard"]

_CPP = "torch::autograd::CppNode"  # its ctx cannot be seen
# Of PyTorch itself: they move no rows, or hold graphs that are read on their own.
_HARMLESS = ("_DDPSink", "CheckpointFunction", COMPILED)
_PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_FIXED = (type, types.FunctionType, types.BuiltinFunctionType, nn.Module)


@dataclass(frozen=True, eq=False)
class OwnGuard:
    """The numbers and indices in one function's `ctx`, which must stay the same."""

    node: int
    numbers: tuple
    indices: tuple[Tensor, ...]

    def holds(self, tape: Tape) -> bool:
        """Whether the function of this graph was called with the same.

        One that kept no index before is the same function still: its tensors are not
        unpacked, which in a checkpointed region would compute that once more.
        """
        if not self.indices:
            return _numbers(tape.nodes[self.node]) == self.numbers
        return own_guard(tape, self.node) == self

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, OwnGuard)
            and (self.node, self.numbers) == (other.node, other.numbers)
            and len(self.indices) == len(other.indices)
            and all(map(_same, self.indices, other.indices))
        )


def is_own(tape: Tape, i: int) -> bool:
    """Whether a node is a function that PyTorch does not know."""
    name = tape.names[i]
    if name.startswith(_CPP):
        return True
    return isinstance(tape.nodes[i], BackwardCFunction) and not name.startswith(
        _HARMLESS
    )


def own_guard(tape: Tape, i: int) -> OwnGuard | None:
    """What must stay the same in a function's `ctx`; None if that cannot be known."""
    if tape.names[i].startswith(_CPP):
        return None
    node = tape.nodes[i]
    shapes = [*tape.shapes(i)]
    edges = [edge for edge in tape.children[i] if edge is not None]
    shapes += [tape.shapes(child)[output] for child, output in edges]
    numbers = _numbers(node)
    if numbers is None:
        return None
    kept = [part for value in vars(node).values() for part in _parts(value)]
    tensors = [*kept, *_saved(node)]
    indices = [
        t.detach().clone()
        for t in tensors
        if isinstance(t, Tensor) and _may_move(t, shapes)
    ]
    return OwnGuard(i, numbers, tuple(indices))


def _saved(node: Node) -> list[Tensor]:
    """The tensors that a function saved, unspent."""
    is_packed = any(raw.unpack_hook for raw in node._raw_saved_tensors)
    saved = saved_tensor(node, "_saved_tensors") if is_packed else node.saved_tensors
    return [t for t in saved if t is not None]


def _numbers(node: Node) -> tuple | None:
    """What a function keeps beside tensors and floats; None for what is not known."""
    numbers: list[Any] = []
    for name, value in vars(node).items():
        for part in _parts(value):
            if isinstance(part, _PLAIN):
                numbers.append((name, part))
            elif isinstance(part, _FIXED):
                numbers.append((name, id(part)))
            elif not isinstance(part, (float, Tensor)):
                return None
    return tuple(numbers)


def _parts(value: Any) -> Iterator[Any]:
    """What nested tuples, lists and dicts hold."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _parts(key)
            yield from _parts(part)
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        yield len(value)
        for part in value:
            yield from _parts(part)
    else:
        yield value


def _may_move(t: Tensor, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether a tensor may say where rows go."""
    if t.requires_grad or t.is_complex() or t.numel() == 0:
        return False
    if not (t.is_floating_point() or t.dtype == torch.bool):
        return True
    if tuple(t.shape) in shapes:
        return False
    if t.dtype == torch.bool:
        return True
    is_square = t.dim() > 1 and t.shape[-1] == t.shape[-2] > 1
    return is_square or bool(((t == 0) | (t == 1)).all() and t.numel() > 1)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
