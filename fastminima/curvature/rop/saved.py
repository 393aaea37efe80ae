"""What nodes have saved: whether it can be read, and whether it is what it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .rule import NotCovered

__all__ = ["Saved"]

_RAW = "_raw"
_names: dict[str, tuple[str, ...]] = {}  # by the name of a node


class Saved:
    """The tensors that some nodes have saved, as rules have read them."""

    def __init__(self) -> None:
        self._versions: list[tuple[Tensor, int, str]] = []

    def note(self, node: Any) -> None:
        """Take in those of a node.

        Raises:
            NotCovered: It keeps them by hooks (activation checkpointing): they are
                there during a backward pass only.
        """
        for word in _raw_names(node):
            if any(raw.unpack_hook is not None for raw in _each(getattr(node, word))):
                raise NotCovered(
                    f"{node.name()} keeps tensors by hooks, as activation "
                    "checkpointing does."
                )
            for tensor in _each(getattr(node, word.removeprefix(_RAW))):
                if tensor is not None:
                    self._versions.append((tensor, tensor._version, node.name()))

    def check(self) -> None:
        """RuntimeError, as PyTorch's own, if one of them was overwritten since."""
        for tensor, version, name in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    "A tensor needed for the product was modified by an inplace "
                    f"operation: {list(tensor.shape)}, saved by {name}, is at version "
                    f"{tensor._version}, expected {version}. Record the graph again."
                )


def _raw_names(node: Any) -> tuple[str, ...]:
    name = node.name()
    if name not in _names:
        words = (word for word in dir(node) if word.startswith(_RAW + "_saved_"))
        _names[name] = tuple(words)
    return _names[name]


def _each(values: Any) -> Iterator[Any]:
    yield from values if isinstance(values, list | tuple) else (values,)
