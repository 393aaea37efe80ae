"""What the launches of a `with interpreting()` block did, and what to look for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from tools.kernels.interpreter.memory import Extents, Shadow

__all__ = ["Launch", "Report"]

_SUMS = ("load_bytes", "store_bytes", "atomic_bytes", "dot_flops")
_DISTINCT = ("unique_load_bytes", "unique_store_bytes")


@dataclass
class Launch:
    """Counts of one launch, over all programs of its grid.

    Attributes:
        kernel: Name of the kernel.
        grid: Programs along each axis.
        programs: Programs of the grid.
        sampled: Programs that ran. Where that is fewer, the sums are scaled up.
        load_bytes: Bytes that the active lanes of loads asked for.
        store_bytes: Bytes that stores wrote.
        atomic_bytes: Bytes that atomic operations updated.
        dot_flops: Two a multiply-add of `tl.dot`, on blocks as they are, padding
            included.
        unique_load_bytes: Distinct bytes that were loaded; 0 where programs were
            sampled.
        unique_store_bytes: Distinct bytes that were stored or updated; 0 likewise.
    """

    kernel: str
    grid: tuple[int, ...]
    programs: int = 0
    sampled: int = 0
    load_bytes: float = 0
    store_bytes: float = 0
    atomic_bytes: float = 0
    dot_flops: float = 0
    unique_load_bytes: int = 0
    unique_store_bytes: int = 0


class Report:
    """Options of the checks, then counts: of each launch, and summed.

    `load_bytes`, `store_bytes`, `atomic_bytes`, `dot_flops`, `unique_load_bytes`,
    `unique_store_bytes` are sums of what `Launch` describes, `programs` those that ran.

    Args:
        racecheck: Refuse two programs that touch one byte which either writes.
        strict_bf16: Refuse bfloat16 arithmetic other than `tl.dot`: the interpreter
            would compute on the raw bits.
        tf32: What `tl.dot` does to float32 operands with input_precision="tf32":
            "trunc" as a GPU does to operands that the compiler did not round, "rne"
            round to nearest, None keep them in full.
        order: In which order the programs run.
        sample: Run only about that many programs of each launch, spread over the grid,
            and scale the counts. Results are meaningless; of memory only the ends of
            tensors are checked, and no races.
    """

    def __init__(
        self,
        *,
        racecheck: bool = True,
        strict_bf16: bool = True,
        tf32: Literal["trunc", "rne"] | None = "trunc",
        order: Literal["forward", "reverse"] = "forward",
        sample: int = 0,
    ) -> None:
        self.racecheck, self.strict_bf16 = racecheck, strict_bf16
        self.tf32, self.order, self.sample = tf32, order, sample
        self.per_launch: list[Launch] = []
        self.programs = 0
        self.load_bytes = self.store_bytes = self.atomic_bytes = 0
        self.unique_load_bytes = self.unique_store_bytes = 0
        self.dot_flops = 0
        self._now = Launch("", ())
        self._memory: Shadow | Extents = Extents(())
        self._program = 0  # the one that runs, from 1

    @property
    def launches(self) -> int:
        """How many launches ended."""
        return len(self.per_launch)

    def begin(self, kernel: str, tensors: Iterable[Tensor]) -> None:
        """A launch on these tensors begins."""
        self._now = Launch(kernel, ())
        if self.sample:
            self._memory = Extents(tensors)
        else:
            self._memory = Shadow(tensors, self.racecheck)
        self._program = 0

    def is_next_run(self, programs: int) -> bool:
        """Go to the next program of the grid, and tell whether it runs."""
        self._program += 1
        step = max(1, programs // self.sample) if self.sample else 1
        runs = (self._program - 1) % step == 0
        self._now.sampled += runs
        return runs

    def end(self, grid: tuple[int, ...]) -> None:
        """The launch is over."""
        now = self._now
        now.grid, now.programs = grid, int(np.prod(grid))
        now.unique_load_bytes = self._memory.bytes_read
        now.unique_store_bytes = self._memory.bytes_written
        for name in _SUMS:
            scaled = getattr(now, name) * now.programs / max(1, now.sampled)
            setattr(now, name, scaled if now.sampled < now.programs else round(scaled))
        for name in (*_SUMS, *_DISTINCT):
            setattr(self, name, getattr(self, name) + getattr(now, name))
        self.programs += now.sampled
        self.per_launch.append(now)

    def _access(
        self, kind: str, addresses: np.ndarray, mask: object, size: int
    ) -> None:
        note = getattr(self._memory, kind)
        count = note(self._program, addresses, mask, size)
        name = f"{kind}_bytes"
        setattr(self._now, name, getattr(self._now, name) + count)

    def load(self, addresses: np.ndarray, mask: object, size: int) -> None:
        """Lanes of a block load elements of `size` bytes."""
        self._access("load", addresses, mask, size)

    def store(self, addresses: np.ndarray, mask: object, size: int) -> None:
        """Lanes of a block store elements of `size` bytes."""
        self._access("store", addresses, mask, size)

    def atomic(self, addresses: np.ndarray, mask: object, size: int) -> None:
        """Lanes of a block update elements of `size` bytes atomically."""
        self._access("atomic", addresses, mask, size)

    def dot(self, flops: int) -> None:
        """A matrix product of this many operations runs."""
        self._now.dot_flops += flops
