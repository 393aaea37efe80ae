"""How many bytes a call holds at a time beside its arguments and its results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Held", "bytes_of", "held"]


@dataclass(frozen=True)
class Held:
    """The most that was alive at a time, and the operation that made the last of it."""

    most: int
    by: str


class _Recorder(TorchDispatchMode):
    """Notes the storages that are alive after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.moments: list[tuple[str, dict[int, int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        made = {k: s for k, s in _storages(result).items() if k not in before}
        if not made:  # views, and what is in place
            return result
        for key, storage in made.items():
            if key not in self.alive:
                self.alive[key] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        shapes = [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, Tensor)]
        now = {key: size for key, (_, size) in self.alive.items()}
        self.moments.append((f"{func} {shapes}", now))
        return result


def _storages(values: Any) -> dict[int, Any]:
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return {s._cdata: s for s in (x.untyped_storage() for x in tensors)}


def bytes_of(values: Any) -> int:
    """What the tensors in some values take."""
    return sum(x.nbytes for x in tree_leaves(values) if isinstance(x, Tensor))


def held(call: Callable[[], Any]) -> Held:
    """Run a call. What its results take is not counted, wherever it lies."""
    recorder = _Recorder()
    with recorder:
        result = call()
    results: dict[int, int] = {}
    for x in tree_leaves(result):
        if isinstance(x, Tensor):
            key = x.untyped_storage()._cdata
            results[key] = results.get(key, 0) + x.nbytes
    most = Held(0, "")
    for by, now in recorder.moments:
        total = sum(max(0, size - results.get(key, 0)) for key, size in now.items())
        if total > most.most:
            most = Held(total, by)
    return most
