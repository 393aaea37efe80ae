"""Where the kernels under test run: interpreted on CPU tensors, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tools.kernels.interpreter import Report, interpreting

__all__ = ["Cuda", "Interpreter"]


def _moved(value: Any, device: str) -> Any:
    """A tensor on another device, with the strides and the offset that it has."""
    if not isinstance(value, Tensor):
        return value
    count = value.untyped_storage().nbytes() // value.element_size()
    whole = value.as_strided((count,), (1,), 0).to(device)
    return whole.as_strided(value.size(), value.stride(), value.storage_offset())


def _parts(result: Any) -> list[Tensor | None]:
    return list(result) if isinstance(result, tuple) else [result]


def _assert_same(first: Any, second: Any, what: str) -> None:
    for one, other in zip(_parts(first), _parts(second), strict=True):
        if one is not None:
            same = torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
            assert same, what


class Interpreter:
    """Kernels on CPU tensors, with every check, their programs in both orders."""

    device = "cpu"

    def __init__(self) -> None:
        self.report = Report()

    def __call__(self, launcher: Callable[..., Any], *args: Any) -> Any:
        """What the launcher returns; `report` holds the counts of one run."""
        with interpreting(report=Report(order="reverse")):
            backwards = launcher(*args)
        self.report = Report()
        with interpreting(report=self.report):
            result = launcher(*args)
        _assert_same(result, backwards, "the order of the programs changes the result")
        return result


class Cuda:
    """Kernels on the GPU, run twice: the result must be the same, bit by bit."""

    device = "cuda"
    report = None

    def __call__(self, launcher: Callable[..., Any], *args: Any) -> Any:
        """What the launcher returns, on the CPU."""
        moved = [_moved(a, self.device) for a in args]
        result = launcher(*moved)
        _assert_same(result, launcher(*moved), "two runs differ")
        if isinstance(result, tuple):
            return tuple(_moved(part, "cpu") for part in result)
        return _moved(result, "cpu")
