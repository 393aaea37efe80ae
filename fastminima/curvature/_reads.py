"""Everything that a closure is known to read, flattened for comparison."""

from __future__ import annotations

import dataclasses
import functools
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._shards import local

__all__ = ["Reads"]

_PLAIN = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.Size, torch.memory_format, type(Ellipsis)),
)
_INTERNAL = frozenset(nn.Module().__dict__)
_REPLICA = nn.parallel.DistributedDataParallel
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_DEPTH = 8
_ENTRIES = 20_000  # of one container, and of what is reached through closures


class Reads:
    """Plain values and identities (`marks`), tensors and arrays, in a fixed order.

    `versions` are the tensors' version counters and addresses.

    Two walks over unchanged objects give equal marks. Containers, dataclasses, plain
    objects, modules (tree, modes, hooks, attributes) and functions (defaults, variables
    of enclosing scopes, the globals that they name) are entered; what belongs to a
    library is known by its identity only.
    """

    def __init__(self) -> None:
        self.marks: list[Any] = []
        self.versions: list[int] = []
        self.tensors: list[Tensor] = []
        self.arrays: list[np.ndarray] = []
        self.held: list[Any] = []  # keeps identities from reuse
        self._seen: set[int] = set()
        self._limit = sys.maxsize
        self._is_batch = False

    def batch(self, value: Any) -> None:
        """A batch, of whatever classes it is made."""
        self._is_batch = True
        self.value(value)
        self._is_batch = False

    def closures(self, values: Sequence[Any]) -> None:
        """Functions and what they reach, up to a bounded number of entries."""
        self._limit = len(self.marks) + _ENTRIES
        for value in values:
            self.value(value)

    def module(self, root: nn.Module, depth: int = _DEPTH) -> None:
        """A module: its tree, modes, hooks, parameters, buffers and attributes."""
        for module in root.modules():
            if id(module) in self._seen:
                continue
            self._is_new(module)
            kind = type(module)
            self.marks += (id(module), kind, module.training)
            for hooks in _HOOKS:
                live = module.__dict__.get(hooks, {})
                self.marks += [id(hook) for hook in live.values()]
            self.marks += [(n, id(child)) for n, child in module._modules.items()]
            for named in (module._parameters, module._buffers):
                for name, tensor in named.items():
                    self.marks.append(name)
                    if tensor is not None:
                        self._tensor(tensor)
            for name, value in module.__dict__.items():
                # What a wrapper for training keeps does not change what it wraps.
                if name not in _INTERNAL and kind is not _REPLICA:
                    self.marks.append(name)
                    self.value(value, depth - 1)
            for base in kind.__mro__:
                if not _is_library(base.__module__) and self._is_new(base):
                    self._class(base, depth - 1)

    def value(self, value: Any, depth: int = _DEPTH) -> None:
        """Any object."""
        kind = type(value)
        if kind in _PLAIN:
            self.marks += (kind, value)
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self.marks += (id(value), value.shape, value.dtype)
            self.arrays.append(value)
        elif isinstance(value, np.generic):
            self.marks += (kind, value.item())
        elif depth == 0 or len(self.marks) > self._limit or not self._is_new(value):
            self.marks.append(id(value))
        else:
            self._inside(value, kind, depth)

    def _inside(self, value: Any, kind: type, depth: int) -> None:
        if self._is_too_long(value):
            self.marks += (id(value), len(value))
        elif isinstance(value, nn.Module):
            self.module(value, depth)
        elif isinstance(value, types.ModuleType):
            self.marks.append(id(value))
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self.value(part, depth - 1)
        elif isinstance(value, types.MethodType):
            self.value(value.__func__, depth - 1)
            self.value(value.__self__, depth - 1)
        elif isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, type):
            self._class(value, depth)
        elif isinstance(value, dict | types.MappingProxyType):
            self.marks += (kind, len(value))
            for name, part in value.items():
                self.value(name, depth - 1)
                self.value(part, depth - 1)
        elif isinstance(value, list | tuple | deque | np.ndarray):
            self.marks += (kind, len(value))
            for part in value.flat if isinstance(value, np.ndarray) else value:
                self.value(part, depth - 1)
        elif isinstance(value, set | frozenset):
            self.marks += (kind, frozenset(map(_plain, value)))
        else:
            self._object(value, kind, depth)

    def _is_too_long(self, value: Any) -> bool:
        """Whether a container, outside batches, is known by its length only."""
        is_container = isinstance(value, dict | list | tuple | deque | set | frozenset)
        return is_container and not self._is_batch and len(value) > _ENTRIES

    def _object(self, value: Any, kind: type, depth: int) -> None:
        self.marks.append(id(value))
        attributes = getattr(value, "__dict__", {})
        if _is_library(kind.__module__) and not self._is_entered(value, kind):
            attributes = {n: part for n, part in attributes.items() if _is_plain(part)}
        for name, part in attributes.items():
            self.marks.append(name)
            self.value(part, depth - 1)
        for name in _slots(kind):
            self.value(getattr(value, name, None), depth - 1)

    def _is_entered(self, value: Any, kind: type) -> bool:
        """Whether an object of a library's class is looked into all the same.

        Of others, such as a configuration, plain attributes and tensors are read.
        """
        return (
            self._is_batch
            or isinstance(value, Mapping | types.SimpleNamespace)
            or dataclasses.is_dataclass(kind)
            or kind.__module__.startswith("torch.distributions")
        )

    def _tensor(self, tensor: Tensor) -> None:
        self.marks += (id(tensor), tensor.requires_grad, tensor.shape, tensor.dtype)
        tensor = local(tensor)
        self.versions.append(0 if tensor.is_inference() else tensor._version)
        if tensor.layout == torch.strided and not tensor.is_nested:
            self.versions.append(0 if tensor.is_meta else tensor.data_ptr())
        self.held.append(tensor)
        self.tensors.append(tensor)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        self.marks.append(id(function.__code__))
        self.held.append(function.__code__)
        if _is_library(function.__module__ or ""):
            return
        for part in (function.__defaults__, function.__kwdefaults__):
            self.value(part, depth - 1)
        for cell in function.__closure__ or ():
            self.value(_contents(cell), depth - 1)
        names = _names(function.__code__)
        for name in names:
            if name not in function.__globals__:
                continue
            value = function.__globals__[name]
            self.marks.append(name)
            if isinstance(value, types.ModuleType):
                self._settings(value, names)
            else:
                self.value(value, depth - 1)

    def _settings(self, module: types.ModuleType, names: tuple[str, ...]) -> None:
        """The plain values of a user's Python module that a function names."""
        if not _is_library(module.__name__):
            for name in names:
                value = vars(module).get(name)
                if _is_plain(value) or isinstance(value, np.ndarray):
                    self.value(value)

    def _class(self, kind: type, depth: int) -> None:
        """A user's class: its plain attributes and its functions."""
        self.marks.append(id(kind))
        if _is_library(kind.__module__):
            return
        for name, part in vars(kind).items():
            if not name.startswith("__"):
                self.marks.append(name)
                self.value(_function_of(part), depth - 1)

    def _is_new(self, value: Any) -> bool:
        self.held.append(value)
        is_new = id(value) not in self._seen
        self._seen.add(id(value))
        return is_new


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or isinstance(value, Tensor)


def _plain(value: Any) -> Any:
    return value if type(value) in _PLAIN else id(value)


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the variable has no value yet
        return None


def _function_of(attribute: Any) -> Any:
    if isinstance(attribute, staticmethod | classmethod):
        return attribute.__func__
    return attribute.fget if isinstance(attribute, property) else attribute


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield name


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that a function's code, and the functions inside it, look up."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    names = dict.fromkeys(code.co_names)
    for part in inner:
        names.update(dict.fromkeys(_names(part)))
    return tuple(names)


@functools.lru_cache(maxsize=4096)
def _is_library(name: str) -> bool:
    """Whether a Python module is installed, rather than the user's own."""
    root = name.partition(".")[0]
    if root in sys.builtin_module_names or root in ("torch", "numpy", "fastminima"):
        return True
    path = getattr(sys.modules.get(name), "__file__", None)
    if path is None:
        return False
    places = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"))
    return any(place in path for place in places)
