"""Saved tensors of a node, read without spending them.

Activation checkpointing (`torch.utils.checkpoint(..., use_reentrant=False)`) gives each
saved tensor out once a backward pass, and a probe reads it before the node itself does.
So what was taken is put back under the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import SavedTensor
from torch.utils import checkpoint

from .node import Node

__all__ = ["CheckpointedNode", "forget_pass", "frames_of", "readable", "saved_tensor"]

_RAW = "_raw"
_names: dict[str, tuple[str, ...]] = {}  # node name -> its raw saved attributes


def readable(node: Node) -> Any:
    """The node, or a stand-in whose saved tensors can be read any number of times."""
    names = _raw_names(node)
    for raw_name in names:
        raws: Any = getattr(node, raw_name)
        if isinstance(raws, SavedTensor):  # most often so, and this runs often
            if _frame(raws) is None:
                continue
        elif all(_frame(raw) is None for raw in raws):
            continue
        return CheckpointedNode(node, names)
    return node


def saved_tensor(node: Node, name: str) -> Any:
    """What `getattr(node, name)` gives, for a tensor or a list of tensors."""
    raws = getattr(node, _RAW + name, None)
    if raws is None or all(_frame(raw) is None for raw in _each(raws)):
        return getattr(node, name)
    values = [_read(raw) for raw in _each(raws)]
    return values if isinstance(raws, list | tuple) else values[0]


class CheckpointedNode:
    """A node of a checkpointed region; rules read and call it like the node itself."""

    def __init__(self, node: Node, raw_names: tuple[str, ...]) -> None:
        self._node, self._raw_names = node, raw_names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_saved_"):
            return saved_tensor(self._node, name)
        if name == "apply":
            apply = self._node.apply  # AttributeError where the node has none
            return lambda *grads: self._unspent(apply, grads)
        return getattr(self._node, name)

    def __call__(self, *grads: Tensor | None) -> Any:
        """The node's backward."""
        return self._unspent(self._node, grads)

    def _unspent(self, call: Any, grads: tuple[Tensor | None, ...]) -> Any:
        raws = [
            raw
            for name in self._raw_names
            for raw in _each(getattr(self._node, name))
            if _frame(raw) is not None
        ]
        values = [_read(raw) for raw in raws]
        try:
            return call(*grads)
        finally:
            for raw, value in zip(raws, values, strict=True):
                _put_back(raw, value)


def frames_of(nodes: list[Node]) -> list[Any]:
    """The checkpointed regions that saved something for one of these nodes."""
    frames: dict[int, Any] = {}
    for node in nodes:
        for name in _raw_names(node):
            for raw in _each(getattr(node, name)):
                frame = _frame(raw)
                if frame is not None:
                    frames[id(frame)] = frame
    return list(frames.values())


def forget_pass(frames: Sequence[Any], task: Any) -> None:
    """Let go of what a pass that is over has recomputed and nobody took."""
    for frame in frames:
        for reference in frame.weak_holders:
            holder = reference()
            if holder is not None:
                holder.handles.pop(task, None)
        for per_pass in (frame.recomputed, frame.recomp_counter, frame.is_recomputed):
            per_pass.pop(task, None)


def _raw_names(node: Node) -> tuple[str, ...]:
    name = node.name()
    names = _names.get(name)
    if names is None:
        found = (word for word in dir(node) if word.startswith(_RAW + "_saved_"))
        names = _names[name] = tuple(found)
    return names


def _each(raws: Any) -> Iterator[Any]:
    yield from raws if isinstance(raws, list | tuple) else (raws,)


def _frame(raw: Any) -> Any:
    """The checkpointed region behind a saved tensor, if there is one."""
    hook = raw.unpack_hook
    if hook is None or hook.__module__ != checkpoint.__name__:
        return None
    while hook is not None:
        cells = [cell.cell_contents for cell in hook.__closure__ or ()]
        for content in cells:
            if isinstance(content, checkpoint._CheckpointFrame):
                return content
        # In debug mode the hook proper sits inside one that explains errors.
        hook = next((c for c in cells if hasattr(c, "__closure__")), None)
    return None


def _task() -> Any:
    """What one recomputation is kept under."""
    group = torch._C._get_graph_exec_group()
    return torch._C._current_graph_task_id() if group is None else group


def _read(raw: Any) -> Tensor:
    frame = _frame(raw)
    if frame is None:
        return raw.data if raw.unpack_hook is None else raw.unpack_hook(raw.data)
    holder = raw.data
    before = set(holder.handles)
    value = raw.unpack_hook(holder)
    if _task() == -1:  # outside any pass all of the region was recomputed for this
        for task in set(holder.handles) - before:
            forget_pass([frame], task)
    else:
        _put_back(raw, value)
    return value


def _put_back(raw: Any, value: Tensor) -> None:
    frame, holder, task = _frame(raw), raw.data, _task()
    handle = checkpoint._Handle()
    holder.handles[task] = handle
    frame.recomputed[task][handle] = value
