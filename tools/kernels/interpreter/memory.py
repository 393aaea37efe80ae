"""Which program of a launch touched each byte of the tensors given to a kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
from torch import Tensor

__all__ = ["CheckError", "Extents", "Shadow"]

_SEVERAL = -1  # in place of a program's number: more than one program


class CheckError(RuntimeError):
    """A kernel did what would be wrong, or undefined, on a GPU."""


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor and the one after its last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    low = tensor.data_ptr()
    return low, low + (last + 1) * tensor.element_size()


def _element_bytes(tensor: Tensor) -> np.ndarray:
    """Every byte of every element, counted from the start of the tensor."""
    offsets = np.zeros((), np.int64)
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + np.arange(n) * stride
    size = tensor.element_size()
    return (offsets.reshape(-1, 1) * size + np.arange(size)).ravel()


def _merged(extents: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Disjoint segments that cover the extents, in order."""
    segments: list[list[int]] = []
    for low, high in sorted(extents):
        if segments and low < segments[-1][1]:
            segments[-1][1] = max(segments[-1][1], high)
        else:
            segments.append([low, high])
    return segments


def _active(addresses: np.ndarray, mask: object) -> np.ndarray:
    """Addresses of the lanes that a mask leaves."""
    addresses = np.asarray(addresses, np.uint64)
    if mask is None:
        return addresses.ravel()
    return addresses[np.broadcast_to(np.asarray(mask, bool), addresses.shape)]


def _refuse_outside(
    what: str, program: int, is_bad: np.ndarray, addresses: np.ndarray
) -> None:
    if is_bad.any():
        raise CheckError(
            f"{what}: {is_bad.sum()} of {is_bad.size} lanes out of bounds in "
            f"program {program - 1}, first at {int(addresses[is_bad][0]):#x}"
        )


class Extents:
    """Memory between the ends of each tensor of one launch: bounds and no more.

    In place of a `Shadow` where that would be too large.
    """

    bytes_read = bytes_written = 0

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        segments = _merged(_extent(t) for t in tensors if t.numel())
        self._low = np.array([low for low, _ in segments], np.uint64)
        self._high = np.array([high for _, high in segments], np.uint64)

    def _count(
        self, what: str, program: int, addresses: np.ndarray, mask: object, size: int
    ) -> int:
        addresses = _active(addresses, mask)
        if not len(self._low):
            is_bad = np.ones(addresses.shape, bool)
        else:
            segment = np.searchsorted(self._low, addresses, side="right") - 1
            end = addresses + np.uint64(size)
            is_bad = (segment < 0) | (end > self._high[np.maximum(segment, 0)])
        _refuse_outside(what, program, is_bad, addresses)
        return addresses.size * size

    load = functools.partialmethod(_count, "load")
    store = functools.partialmethod(_count, "store")
    atomic = functools.partialmethod(_count, "atomic")


class Shadow:
    """Memory that the tensors of one launch occupy, and who accessed it.

    Programs are numbered from 1. `load`, `store` and `atomic` take the addresses of a
    block's lanes, their mask and the size of an element, and return the bytes accessed.

    Raises:
        CheckError: A lane is outside every element of every tensor; two programs touch
            a byte that one of them writes (not atomically); or two lanes of a store
            share an address.
    """

    def __init__(self, tensors: Iterable[Tensor], racecheck: bool = True) -> None:
        tensors = [t for t in tensors if t.numel()]
        segments = _merged(map(_extent, tensors))
        self._racecheck = racecheck
        self._low = np.array([low for low, _ in segments], np.uint64)
        sizes = [high - low for low, high in segments]
        self._base = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        total = int(self._base[-1])
        # One byte more, never an element's: where addresses outside all segments lead.
        self._is_element = np.zeros(total + 1, bool)
        for t in tensors:
            start = self._offsets(np.array([t.data_ptr()], np.uint64))
            self._is_element[start + _element_bytes(t)] = True
        self._writers = np.zeros(total, np.int32)
        self._readers = np.zeros(total, np.int32)
        self._atomics = np.zeros(total, np.int32)

    @property
    def bytes_read(self) -> int:
        """Distinct bytes loaded so far."""
        return int(np.count_nonzero(self._readers))

    @property
    def bytes_written(self) -> int:
        """Distinct bytes stored or updated so far."""
        return int(np.count_nonzero((self._writers != 0) | (self._atomics != 0)))

    def _offsets(self, addresses: np.ndarray) -> np.ndarray:
        """Places of the addresses in the arrays of this object."""
        total = int(self._base[-1])
        segment = np.searchsorted(self._low, addresses, side="right") - 1
        inside = np.maximum(segment, 0)
        if not len(self._low):
            return np.full(addresses.shape, total)
        places = self._base[inside] + (addresses - self._low[inside]).astype(np.int64)
        is_out = (segment < 0) | (places >= self._base[inside + 1])
        return np.where(is_out, total, places)

    def _accessed(
        self, what: str, program: int, addresses: np.ndarray, mask: object, size: int
    ) -> np.ndarray:
        """Every byte that the active lanes access, all checked to be elements'."""
        lanes = _active(addresses, mask)
        places = self._offsets(lanes[:, None] + np.arange(size, dtype=np.uint64))
        is_bad = ~self._is_element[places].all(axis=1)
        _refuse_outside(what, program, is_bad, lanes)
        return places.ravel()

    def _compare(
        self, program: int, verb: str, places: np.ndarray, others: dict[str, np.ndarray]
    ) -> None:
        """Refuse bytes that another program accessed in one of the ways `others`."""
        if not self._racecheck:
            return
        for way, numbers in others.items():
            seen = numbers[places]
            clashes = (seen != 0) & (seen != program)
            if clashes.any():
                raise CheckError(
                    f"race: program {program - 1} {verb} {clashes.sum()} bytes that "
                    f"another one {way}"
                )

    @staticmethod
    def _note(numbers: np.ndarray, places: np.ndarray, program: int) -> None:
        seen = numbers[places]
        is_alone = (seen == 0) | (seen == program)
        numbers[places] = np.where(is_alone, program, _SEVERAL)

    def load(self, program: int, addresses: np.ndarray, mask: object, size: int) -> int:
        """Note what a load reads."""
        places = self._accessed("load", program, addresses, mask, size)
        others = {"writes": self._writers, "updates": self._atomics}
        self._compare(program, "reads", places, others)
        self._note(self._readers, places, program)
        return places.size

    def store(
        self, program: int, addresses: np.ndarray, mask: object, size: int
    ) -> int:
        """Note what a store writes."""
        places = self._accessed("store", program, addresses, mask, size)
        if self._racecheck and np.unique(places).size != places.size:
            raise CheckError(
                f"race: two lanes of one store share an address in program "
                f"{program - 1}"
            )
        others = {
            "writes": self._writers,
            "reads": self._readers,
            "updates": self._atomics,
        }
        self._compare(program, "writes", places, others)
        self._writers[places] = program
        return places.size

    def atomic(
        self, program: int, addresses: np.ndarray, mask: object, size: int
    ) -> int:
        """Note what an atomic operation updates."""
        places = self._accessed("atomic", program, addresses, mask, size)
        others = {"writes": self._writers, "reads": self._readers}
        self._compare(program, "updates", places, others)
        self._note(self._atomics, places, program)
        return places.size
