"""Launches as the driver takes them: arguments as words, addresses as places."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "KernelLaunch",
    "LauncherCall",
    "NotRecordableError",
    "Recorded",
    "described",
]

# Of every allocation in the scratch; PyTorch's own start so on a GPU.
ALIGNMENT = 512
MOST_ARGUMENTS = 64  # as `kMostArguments` in csrc/host/launches.cpp
INPUT, SCRATCH, OUTPUT = range(3)  # as `Pointer::Where` in csrc/host/launches.h

# How a number of a kernel's signature is laid out in its eight bytes.
_LAYOUTS = {
    "i32": "<i4x",
    "u32": "<I4x",
    "i64": "<q",
    "u64": "<Q",
    "fp32": "<f4x",
    "fp64": "<d",
}


@dataclass(frozen=True)
class Recorded:
    """Launches, as the extension takes them.

    Attributes:
        launches: function, grid, threads, bytes of shared memory, arguments, and of
            those that are addresses (argument, kind, number, offset). A grid of zeros
            for launchers of the extension.
        bytes: of scratch.
        kept: what has the functions.
    """

    launches: list[tuple]
    bytes: int
    kept: list[Any]


@dataclass
class KernelLaunch:
    """A Triton kernel that was launched."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any] = field(repr=False)


@dataclass
class LauncherCall:
    """A launcher of the extension that was called; its last argument is the stream."""

    address: int
    letters: str
    arguments: tuple[Any, ...]


@dataclass
class _Memory:
    """Bytes on the device that launches may point to."""

    start: int
    size: int
    kind: int
    number: int
    offset: int  # of its beginning in what it belongs to

    def place_of(self, address: int) -> tuple[int, int, int] | None:
        """Kind, number and offset of an address; None where it is outside."""
        inside = address - self.start
        if not 0 <= inside < max(1, self.size):
            return None
        return self.kind, self.number, self.offset + inside


class NotRecordableError(Exception):
    """Something that cannot be launched again."""


def described(
    launches: Sequence[KernelLaunch | LauncherCall],
    allocated: Sequence[Tensor],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor | None],
) -> Recorded:
    """What was launched, with addresses as places in inputs, outputs and scratch.

    Raises:
        NotRecordableError: an address is in none of them, an output is no row of
            float32 in memory of its own, or a kernel needs more than to be launched.
    """
    memory = [
        _Memory(*_extent(x), INPUT, i, _extent(x)[0] - x.data_ptr())
        for i, x in enumerate(inputs)
    ]
    if _overlap(memory):
        raise NotRecordableError  # which of them is meant may not be the same next time
    memory += [_of_output(x, i, allocated) for i, x in enumerate(outputs)]
    taken = {m.start for m in memory}
    total = 0
    for x in allocated:
        start, size = _extent(x)
        if size and start not in taken:
            memory.append(_Memory(start, size, SCRATCH, 0, total))
            total += -(-size // ALIGNMENT) * ALIGNMENT
    as_taken = [
        _as_call(each, memory)
        if isinstance(each, LauncherCall)
        else _as_launch(each, memory)
        for each in launches
    ]
    kept = [each.compiled for each in launches if isinstance(each, KernelLaunch)]
    return Recorded(as_taken, total, kept)


def _overlap(memory: Iterable[_Memory]) -> bool:
    """Whether an address may lie in several of them."""
    pairs = pairwise(sorted(memory, key=lambda m: m.start))
    return any(b.start < a.start + max(1, a.size) for a, b in pairs)


def _extent(x: Tensor) -> tuple[int, int]:
    """Where the whole memory of a tensor begins, and its bytes."""
    storage = x.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


def _of_output(x: Tensor | None, number: int, allocated: Sequence[Tensor]) -> _Memory:
    """The memory of an output: all of an allocation, which becomes a row of a table."""
    if x is None or x.dtype != torch.float32 or not x.is_contiguous():
        raise NotRecordableError
    start, size = _extent(x)
    is_own = any(_extent(each)[0] == start for each in allocated)
    if not is_own or x.data_ptr() != start or x.numel() * x.itemsize != size:
        raise NotRecordableError
    return _Memory(start, size, OUTPUT, number, 0)


def _as_launch(launched: KernelLaunch, memory: Sequence[_Memory]) -> tuple:
    compiled = launched.compiled
    function = getattr(compiled, "function", None)
    grid = (*launched.grid, 1, 1)[:3]
    is_empty = not all(grid)  # which Triton passes over, and the driver refuses
    if function is None or is_empty or not _is_plain(compiled.metadata):
        raise NotRecordableError
    arguments, pointers = _packed(launched.arguments, compiled.src.signature, memory)
    arguments += [0, 0]  # scratch of Triton's own: `_is_plain` says there is none
    if len(arguments) > MOST_ARGUMENTS:
        raise NotRecordableError
    metadata = compiled.metadata
    threads = metadata.num_warps * getattr(metadata, "warp_size", 32)
    return function, grid, threads, metadata.shared, arguments, pointers


def _as_call(called: LauncherCall, memory: Sequence[_Memory]) -> tuple:
    if not called.address or len(called.letters) != len(called.arguments):
        raise NotRecordableError
    arguments, pointers = [], []
    pairs = zip(called.letters[:-1], called.arguments, strict=False)
    for i, (letter, value) in enumerate(pairs):
        if letter == "p" and value:
            pointers.append((i, *_place_of(value, memory)))
            value = 0
        layout = "<d" if letter == "d" else "<q"
        arguments += struct.unpack("<Q", struct.pack(layout, value or 0))
    return called.address, (0, 0, 0), 0, 0, [*arguments, 0], pointers


def _is_plain(metadata: Any) -> bool:
    """Whether a kernel is launched by function, grid and arguments alone."""
    names = ("global_scratch_size", "profile_scratch_size")
    flags = ("launch_cooperative_grid", "launch_pdl")
    return (
        all(getattr(metadata, name, None) == 0 for name in names)
        and not any(getattr(metadata, flag, False) for flag in flags)
        and getattr(metadata, "num_ctas", 1) == 1
    )


def _packed(
    given: Mapping[str, Any],
    signature: Mapping[str, Any],
    memory: Sequence[_Memory],
) -> tuple[list[int], list[tuple]]:
    """The arguments as the driver takes them, and those that are addresses."""
    arguments, pointers = [], []
    for kind, value in _flat((signature[name], given.get(name)) for name in signature):
        if kind.startswith("*") and isinstance(value, Tensor):
            pointers.append((len(arguments), *_place_of(value.data_ptr(), memory)))
            arguments.append(0)
        elif kind in _LAYOUTS and isinstance(value, int | float):
            (bits,) = struct.unpack("<Q", struct.pack(_LAYOUTS[kind], value))
            arguments.append(bits)
        else:
            raise NotRecordableError
    return arguments, pointers


def _flat(pairs: Iterable[tuple[Any, Any]]) -> Iterator[tuple[str, Any]]:
    """Kinds and values of arguments, tuples one by one, without constants."""
    for kind, value in pairs:
        if isinstance(kind, tuple):
            yield from _flat(zip(kind, value, strict=True))
        elif kind != "constexpr":
            yield kind, value


def _place_of(address: int, memory: Sequence[_Memory]) -> tuple[int, int, int]:
    for each in memory:
        place = each.place_of(address)
        if place is not None:
            return place
    raise NotRecordableError
