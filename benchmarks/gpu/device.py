"""What stages ask of a device; a CPU answers too, so that they can be tried on one."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

__all__ = ["clock_of", "let_go", "peak_mib", "settle", "wait"]

_UNTIL_KNOWN = 14


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def clock_of(device: str) -> Callable[[], float]:
    """Seconds, told when the device has nothing left to do."""

    def now() -> float:
        wait(device)
        return time.perf_counter()

    return now


def settle(step: Callable[[], object]) -> None:
    """Step until a probe does what it does from then on.

    A graph is measured anew after ten steps; then kernels are recorded in one step and
    compared in the next, before the extension launches them.
    """
    for _ in range(_UNTIL_KNOWN):
        step()


def let_go(device: str) -> None:
    """Gives back the memory of what nothing refers to."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def peak_mib(step: Callable[[], object], device: str) -> float | None:
    """MiB that a step needs beside what lives between steps; None on a CPU."""
    if device == "cpu":
        step()
        return None
    wait(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20
