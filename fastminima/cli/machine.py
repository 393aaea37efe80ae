"""What is installed, and which kernels would run here."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import pkgutil
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from .. import _native, ops
from ..ops.table import REGISTRY, Op

__all__ = ["run", "version"]

_DTYPE = torch.float32
_ISAS = ("avx512", "avx2", "generic")  # the best first


@dataclass(frozen=True)
class _Choice:
    """What runs an op on a device, and by what reason each other way does not."""

    op: str
    device: str
    runs: str
    others: dict[str, list[str]]


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    choices = list(_choices())
    if options.json:
        found = [vars(choice) for choice in choices]
        print(json.dumps(_machine() | {"dtype": str(_DTYPE), "ops": found}, indent=1))
        return 0
    print(*(f"{name:<11}{value}" for name, value in _machine().items()), sep="\n")
    print(f"\nFor each op, what {_DTYPE} tensors run on here; then what they do not:")
    width = max(map(len, REGISTRY)) + 2
    for choice in choices:
        others = "; ".join(
            f"{', '.join(names)}: {reason}" for reason, names in choice.others.items()
        )
        used = f"{choice.device} {choice.runs}"
        print(f"  {choice.op:<{width}}{used:<15}{others}")
    return 0


def version() -> str:
    """Of the package."""
    from .. import __version__  # of the root, which imports all layers

    return __version__


def _machine() -> dict[str, str]:
    """Versions, devices, threads and instruction sets."""
    return {
        "fastminima": version(),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "triton": _version("triton"),
        "devices": ", ".join(_devices()),
        "threads": str(_native.threads()),
        "native": _native_line(),
        "cuda": _cuda_line(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count))]


def _native_line() -> str:
    if _native.missing_reason is not None:
        return f"no: {_native.missing_reason}"
    return f"{_native.available_isas()[0]} (of {', '.join(_native.available_isas())})"


def _cuda_line() -> str:
    if (reason := _native.cuda_missing_reason()) is not None:
        return f"no: {reason}{_without_them()}"
    here = "" if torch.cuda.is_available() else "; no CUDA device here"
    return f"built for {', '.join(_native.cuda_architectures())}{here}"


def _without_them() -> str:
    """What it means that there are no CUDA kernels, where there is a GPU."""
    if not torch.cuda.is_available():
        return ""
    return (
        "; the GPU here runs Triton's kernels and PyTorch's ways only (install with "
        "nvcc on PATH, or CUDA_HOME set, to have the rest)"
    )


def _choices() -> Iterator[_Choice]:
    """For each device and op: what runs, and what does not and why."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"{ops.__name__}.{module.name}")
    for device in dict.fromkeys(torch.device(d.split()[0]).type for d in _devices()):
        for name in sorted(REGISTRY):
            used = REGISTRY[name].backends(device, _dtype_of(REGISTRY[name]))[0]
            yield _Choice(name, device, used, _others(REGISTRY[name], device))


def _dtype_of(op: Op) -> torch.dtype:
    """What decides in a float32 model: the ids of a table come first, in int64."""
    dtypes = {dtype for implementation in op for dtype in implementation.dtypes}
    return torch.int64 if dtypes == {torch.int64} else _DTYPE


def _others(op: Op, device: str) -> dict[str, list[str]]:
    """By reason, the implementations that would not run.

    One that is registered anew for each dtype is named once.
    """
    told = {op.backends(device, _dtype_of(op))[0]}
    reasons: dict[str, list[str]] = {}
    for backend, reason in (*_not_chosen(op, device), *_not_there(op, device)):
        if backend not in told:
            told.add(backend)
            reasons.setdefault(reason, []).append(backend)
    return reasons


def _not_chosen(op: Op, device: str) -> Iterator[tuple[str, str]]:
    used, *others = op.backends(device, _dtype_of(op))
    for backend in others:
        if backend.startswith("native-"):
            yield backend, "narrower vectors, kept for tests"
        elif backend == "reference":
            yield backend, f"slower than {used}"
        else:
            yield backend, f"not preferred to {used}"


def _not_there(op: Op, device: str) -> Iterator[tuple[str, str]]:
    for implementation in op:
        if device not in implementation.devices:
            needed = " or ".join(sorted(implementation.devices))
            yield implementation.backend, f"for {needed} tensors"
        elif _dtype_of(op) not in implementation.dtypes:
            yield implementation.backend, f"not for {_dtype_of(op)}"
    found = {i.backend for i in op}
    if _native.missing_reason is not None:
        yield "native", _native.missing_reason
    elif "native" not in found:
        yield "native", "no such kernel"
    else:
        for isa in _ISAS[: _ISAS.index(_native.available_isas()[0])]:
            yield f"native-{isa}", "not in this build or not on this processor"
    if "triton" not in found:
        yield "triton", "no such kernel"
    if "cuda" not in found:
        yield "cuda", _native.cuda_missing_reason() or "no such kernel"
