"""Runs launchers on tensors without data, and refuses what a CUDA graph cannot hold.

    with capturing() as launches:
        launcher(meta_tensors)

A graph replays launches with the addresses and sizes that they were captured with. So
host code may not look at a value, wait for the device, let a value decide on a shape,
or copy from memory of the host. On `meta` tensors there is no value to look at, and a
launch is noted instead of being run.
"""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastminima import _native, ops
from fastminima.ops.table import REGISTRY, Op
from tools.kernels.compile import stand_in_device

__all__ = ["CudaStandIn", "Launch", "NotCapturableError", "capturing", "cuda_ops"]


class NotCapturableError(AssertionError):
    """Host code did what a CUDA graph cannot hold."""


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, and its arguments that are not tensors."""

    kernel: str
    grid: tuple[int, ...]
    values: tuple[Any, ...]


# They make a tensor from values of the host, which are then copied to the device.
_FROM_HOST = {
    torch.tensor,
    torch.as_tensor,
    torch.asarray,
    torch.from_numpy,
    Tensor.new_tensor,
}
_WAITS = ("synchronize", "Event.synchronize", "Stream.synchronize", "Event.query")


class _NoHostMemory(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _FROM_HOST and result.device.type != "cpu":
            raise NotCapturableError(f"{func.__name__} copies values from the host.")
        return result


class _NoValues(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        try:
            result = func(*args, **(kwargs or {}))
        except (NotImplementedError, RuntimeError) as error:
            raise NotCapturableError(f"{func} needs values: {error}") from error
        if _is_masked_copy(func, args):
            raise NotCapturableError(f"{func} counts the true elements of a mask.")
        if _places((args, kwargs)) | _places(result) == {"cpu", "meta"}:
            raise NotCapturableError(f"{func} copies between host and device.")
        return result


def _places(values: Any) -> set[str]:
    """Where tensors are; one number in memory of the host is passed by value."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
    return {x.device.type for x in tensors if x.dim() or x.device.type != "cpu"}


def _is_masked_copy(func: Any, args: tuple) -> bool:
    """Whether this is `x[mask] = values`; with one number for all it needs no count."""
    if func is not torch.ops.aten.index_put_.default:
        return False
    masks = [x for x in args[1] if x is not None and x.dtype == torch.bool]
    return bool(masks) and args[2].numel() > 1


@contextmanager
def capturing() -> Iterator[list[Launch]]:
    """Note launches of Triton kernels; see the module.

    Raises:
        NotCapturableError: by what is refused.
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def note(self, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        if callable(grid):
            names = [parameter.name for parameter in self.params]
            grid = grid(dict(zip(names, args, strict=False)) | options)
        _check_arguments(self.__name__, args)
        values = tuple(x for x in args if not isinstance(x, Tensor))
        launches.append(Launch(self.__name__, tuple(grid), (*values, *options.items())))

    with ExitStack() as stack:
        stack.enter_context(stand_in_device("sm_90a"))
        stack.enter_context(mock.patch.object(JITFunction, "run", note))
        for name in _WAITS:
            stack.enter_context(mock.patch(f"torch.cuda.{name}", _refusal(name)))
        stack.enter_context(_NoHostMemory())
        stack.enter_context(_NoValues())
        yield launches


class CudaStandIn:
    """Stands for the CUDA launchers of the extension: notes what they are called with.

    Those that tell how much scratch to allocate say 1024.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def note(*args: Any) -> int:
            if any(isinstance(x, Tensor) for x in args):
                raise TypeError(f"{name} takes addresses, and was given a tensor.")
            self.launches.append(Launch(name, (), ()))
            return 1024

        return note


def cuda_ops(kernels: Any) -> dict[str, Op]:
    """The package's ops as they would be where the extension has CUDA kernels.

    Their modules run once more under another name; the package's own stay as they are.
    """
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(_native, "cuda_kernels", lambda: kernels, create=True)
        )
        stack.enter_context(mock.patch.dict(REGISTRY, clear=True))
        for found in pkgutil.iter_modules(ops.__path__, f"{ops.__name__}."):
            spec = importlib.util.find_spec(found.name)
            if spec is not None and spec.origin is not None and not found.ispkg:
                source = Path(spec.origin)
                if "Op(" in source.read_text() and source.stem != "table":
                    _run_again(f"{found.name}_with_cuda", source)
        return dict(REGISTRY)


def _run_again(name: str, source: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _check_arguments(kernel: str, args: tuple[Any, ...]) -> None:
    for x in args:
        if isinstance(x, Tensor) and x.device.type != "meta":
            raise NotCapturableError(f"{kernel} was given a tensor on {x.device}.")


def _refusal(name: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotCapturableError(f"torch.cuda.{name} waits for the device.")

    return refuse
