"""How tensors become arguments of the native and the CUDA kernels."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .._dtypes import accumulation_dtype

__all__ = [
    "FLOATS",
    "NATIVE",
    "SUFFIX",
    "TRITON",
    "HostIntegers",
    "accumulated",
    "accumulated_rows",
    "addresses",
    "alike",
    "columns",
    "contiguous_rows",
    "signed",
    "write_back",
]

SUFFIX = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
FLOATS = tuple(SUFFIX)
NATIVE = (torch.float32, torch.float64)  # what native kernels take: no halves
TRITON = (torch.float32, torch.float16, torch.bfloat16)  # what Triton kernels take


class HostIntegers:
    """64-bit integers for C++ that reads them on the host, as addresses of a list.

    No tensor holds them: a default device cannot put them where the host cannot read.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Iterable[int]) -> None:
        self._values = array("q", values)

    def __len__(self) -> int:
        return len(self._values)

    def data_ptr(self) -> int:
        """Address of the first; it holds as long as this object lives."""
        return self._values.buffer_info()[0]


def columns(*rows: Iterable[int]) -> tuple[HostIntegers, list[int]]:
    """Lists of integers of one length, end to end, and where each begins."""
    lists = [list(row) for row in rows]
    memory = HostIntegers(x for some in lists for x in some)
    first, step = memory.data_ptr(), 8 * len(lists[0])
    return memory, [first + i * step for i in range(len(lists))]


def addresses(tensors: Sequence[Tensor]) -> HostIntegers:
    """The tensors' addresses, on the host."""
    return HostIntegers(x.data_ptr() for x in tensors)


def alike(*lists: Sequence[Tensor] | None) -> bool:
    """Whether lists agree in shapes and are all of one device and dtype."""
    there = [xs for xs in lists if xs is not None]
    kinds = {(x.device, x.dtype) for xs in there for x in xs}
    shapes = [[x.shape for x in xs] for xs in there]
    return len(kinds) == 1 and all(some == shapes[0] for some in shapes)


def signed(bits: int) -> int:
    """The 64 bits as C++ takes them."""
    return (bits + 2**63) % 2**64 - 2**63


def write_back(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Put into each tensor what its contiguous copy holds, where that is another.

    A tensor that is its own was written through its address, which autograd cannot see:
    its version is raised, so that a graph which saved the old values refuses them.
    """
    pairs = list(zip(tensors, copies, strict=True))
    increment_version([x for x, copy in pairs if copy is x])
    for x, copy in pairs:
        if copy is not x:
            x.copy_(copy)


def accumulated(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the accumulation dtype of all of them."""
    first = tensors[0].dtype
    if first in NATIVE and all(x.dtype == first for x in tensors):
        return tensors
    dtype = _common(tensors)
    return tuple(x.to(dtype) for x in tensors)


def accumulated_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As `accumulated`, with contiguous rows: each is copied once at most."""
    first = tensors[0].dtype
    if first in NATIVE and all(x.dtype == first for x in tensors):
        return tuple(map(contiguous_rows, tensors))
    dtype = _common(tensors)
    return tuple(
        contiguous_rows(x.to(dtype))
        if x.stride(-1) == 1
        else x.to(dtype, memory_format=torch.contiguous_format)
        for x in tensors
    )


def _common(tensors: tuple[Tensor, ...]) -> torch.dtype:
    dtypes = (x.dtype for x in tensors)
    return accumulation_dtype(reduce(torch.promote_types, dtypes))


def contiguous_rows(x: Tensor) -> Tensor:
    """`x`, copied unless its last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
