"""Kernels that are launched inside a block go to interpreted twins of them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

# Triton imports this when it first needs it; inside the block it would see a
# triton.language whose functions are the interpreter's, and keep them.
import triton.experimental.gluon  # noqa: F401
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from tools.kernels.interpreter.checked import (
    CheckedBuilder,
    CheckedExecutor,
    CheckedReduce,
    CheckedScan,
)
from tools.kernels.interpreter.report import Report

__all__ = ["interpreting"]


class _Twin:
    """An interpreted twin of a kernel, with module globals of its own.

    The interpreter writes its names into the globals of the functions that it rewrites;
    so those are a copy, renewed in each block.
    """

    def __init__(self, function: types.FunctionType) -> None:
        function = inspect.unwrap(function)  # of what checks shapes in annotations
        copy = types.FunctionType(function.__code__, {}, function.__name__)
        self._original = function
        self._globals = copy.__globals__
        self.interpreted = interpreter.InterpretedFunction(
            functools.update_wrapper(copy, function)
        )

    def renew(self) -> None:
        self._globals.update(self._original.__globals__)


_TWINS: dict[types.FunctionType, _Twin] = {}


class _Twins:
    """The twins that are up to date in this block."""

    def __init__(self) -> None:
        self._fresh: set[types.FunctionType] = set()

    def of(self, kernel: JITFunction) -> Any:
        function = kernel.fn
        if function not in self._fresh:
            if function not in _TWINS:
                _TWINS[function] = _Twin(function)
            _TWINS[function].renew()
            self._fresh.add(function)
        return _TWINS[function].interpreted


class _Changes:
    """Attributes that are changed, and can be put back."""

    def __init__(self) -> None:
        self._before: list[tuple[Any, dict[str, Any]]] = []

    def keep(self, holder: Any) -> None:
        """Remember all attributes of a module or class as they are now."""
        self._before.append((holder, dict(vars(holder))))

    def put(self, holder: Any, name: str, value: Any) -> None:
        """Set one attribute, and remember all."""
        self.keep(holder)
        setattr(holder, name, value)

    def undo(self) -> None:
        for holder, before in reversed(self._before):
            now = dict(vars(holder))
            for name in now.keys() - before.keys():
                delattr(holder, name)
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    setattr(holder, name, value)


class _NothingToRestore:
    """Stands for a scope of the interpreter: the block restores everything."""

    def restore(self) -> None:
        pass


def _language() -> list[Any]:
    """The modules of triton.language and the classes that the interpreter changes."""
    modules = [
        module
        for name, module in sys.modules.items()
        if name.split(".")[:2] == ["triton", "language"] and inspect.ismodule(module)
    ]
    classes = [c for c in vars(tl.core).values() if inspect.isclass(c)]
    own = [c for c in classes if c.__module__.startswith("triton.")]
    return [*modules, *dict.fromkeys(own)]


def _index(tensor: Any) -> int:
    # NumPy 2.4 and later convert only arrays without axes to int.
    return int(np.asarray(tensor.handle.data).reshape(-1)[0])


def _patch_language(changes: _Changes) -> None:
    """Once for the block, where the interpreter would at every call of a function."""
    for holder in _language():
        changes.keep(holder)
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "c": tl.core}))
    tl.core.tensor.__index__ = _index
    scope = _NothingToRestore()
    changes.put(interpreter, "_patch_lang", lambda function: scope)


def _patch_kernels(changes: _Changes) -> None:
    """Launches, calls and methods of jitted functions go to their twins."""
    twins = _Twins()

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return twins.of(self).run(*args, **kwargs)

    def call(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return twins.of(self)(*args, **kwargs)

    changes.put(JITFunction, "run", run)
    changes.put(JITFunction, "__call__", call)
    for name, value in list(vars(tl.core.tensor).items()):
        if isinstance(value, JITFunction):
            method = functools.partialmethod(twins.of(value))
            setattr(tl.core.tensor, name, method)


@contextlib.contextmanager
def interpreting(
    *modules: types.ModuleType, report: Report | None = None
) -> Iterator[Report]:
    """Interpret every Triton kernel that is launched inside the block.

    Args:
        modules: Those whose kernels are meant, for the reader: all kernels are
            interpreted, also the helpers that they import from elsewhere.
        report: The checks to make; the default makes them all.

    Raises:
        CheckError: By a launch inside the block: it did what is wrong on a GPU.
    """
    report = report or Report()
    builder, changes = interpreter.interpreter_builder, _Changes()
    usual = type(builder)
    try:
        builder.__class__, builder.report = CheckedBuilder, report
        changes.put(interpreter, "GridExecutor", CheckedExecutor)
        changes.put(interpreter, "ReduceOps", CheckedReduce)
        changes.put(interpreter, "ScanOps", CheckedScan)
        _patch_language(changes)
        _patch_kernels(changes)
        yield report
    finally:
        changes.undo()
        builder.__class__ = usual
        del builder.report
