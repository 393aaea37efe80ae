"""Counts what PyTorch's own operations move and multiply, and what is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tools.kernels.compile import stand_in_device
from tools.kernels.work import Work

__all__ = ["Tally", "tally"]

aten = torch.ops.aten
# They make memory without filling it.
_EMPTY = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
}


# Kernels beside the one that multiplies: they read and write their tensors once.
_BESIDE = {"_parts_kernel", "_sq_norms_kernel", "_turn_kernel"}


class Tally(NamedTuple):
    """Work of each operation of PyTorch in turn, and other kernels' names.

    `beside` has those of them that only move data, and their work.
    """

    steps: list[Work]
    launches: list[str]
    beside: list[tuple[str, Work]]


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Work] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and func not in _EMPTY:
            self.steps.append(_work(func, args, kwargs, result))
        return result


class _NothingIsLost(TorchFunctionMode):
    """Decides what host code asks of the device, `if lost.any()`, by False."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__bool__ and args[0].is_meta:
            return False
        return func(*args, **(kwargs or {}))


def _work(func: Any, args: tuple, kwargs: dict, result: Any) -> Work:
    """Each tensor that goes in is read once, each that comes out is written once.

    What is written over is read too, but where the old values do not matter.
    """
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if func in (aten.copy_.default, aten.fill_.Scalar, aten.zero_.default):
        inputs = inputs[1:]
    moved = sum(_span(x) for x in inputs + outputs)
    count = flop_registry.get(func.overloadpacket)
    products = count(*args, **kwargs, out_val=result) if count else 0
    return Work(moved, products)


def _span(x: Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension is read once."""
    sizes = (n for n, step in zip(x.shape, x.stride(), strict=True) if step or n == 0)
    return prod(sizes) * x.element_size()


@contextmanager
def _launches() -> Iterator[list[tuple[str, Work]]]:
    """Note Triton kernels, and the size of their tensors, instead of running them."""
    try:
        from triton.runtime.jit import JITFunction
    except ModuleNotFoundError:
        yield []
        return
    found: list[tuple[str, Work]] = []

    def note(self, *args: Any, **options: Any) -> None:
        tensors = {id(x): x for x in args if isinstance(x, Tensor)}
        moved = sum(map(_span, tensors.values()))
        found.append((self.__name__, Work(moved, 0)))

    with mock.patch.object(JITFunction, "run", note), stand_in_device("sm_90a"):
        yield found


def tally(run: Callable[..., Any], arguments: tuple[Any, ...]) -> Tally:
    """Run on tensors, with or without data, and count.

    Where a way depends on a condition, it is the one of conditions that are false:
    the cheaper one in this package.
    """
    with _launches() as launches, _NothingIsLost(), _Counter() as counter:
        run(*arguments)
    return Tally(
        counter.steps,
        [name for name, _ in launches],
        [(name, work) for name, work in launches if name in _BESIDE],
    )
