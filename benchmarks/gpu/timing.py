"""The stage that times every op: kernels, PyTorch's way, and the floor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tools.kernels.cases import Case, Tensors, cases
from tools.kernels.floors import H100
from tools.kernels.work import work_of

__all__ = ["kernels"]

DEVICE = "cuda"
_FLUSH_BYTES = 256 << 20  # more than the L2 cache of any GPU of today
_BACKENDS = ("triton", "cuda", "torch", "reference")
_ROUNDS = 100
# Of a result against float64, by norm; kernels of halves keep float32 sums.
_WRONG = 1e-3


def kernels(seconds: float) -> dict:
    """Microseconds of each implementation of each op that has a kernel.

    Every case gets the same share of the time. An answer that is wrong is not timed.
    """
    found = {c.label: c for backend in ("triton", "cuda") for c in cases(backend)}
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    end = time.monotonic() + seconds
    rows: dict[str, dict] = {}
    left = []
    for i, (label, case) in enumerate(found.items()):
        share = (end - time.monotonic()) / (len(found) - i)
        if share < 0.05:
            left.append(label)
            continue
        rows[label] = _case(case, share, flush)
    wrong = [
        f"{label} {backend}"
        for label, row in rows.items()
        for backend in _BACKENDS
        if backend in row and "median_us" not in row[backend]
    ]
    return {"ok": bool(rows) and not wrong, "wrong": wrong, "left": left, "cases": rows}


def _case(case: Case, seconds: float, flush: Tensor) -> dict:
    torch.manual_seed(0)
    arguments = case.make(Tensors(DEVICE, case.dtype))
    work = work_of(case.op.name, arguments)
    row: dict[str, Any] = {
        "bytes": work.bytes,
        "products": work.products,
        "floor_us": 1e6 * (H100.launch + H100.seconds(work, case.dtype)),
    }
    truth = _float64(case, arguments)
    backends = [b for b in _BACKENDS if case.has(b)]
    for backend in backends:
        run = case.op.on(backend, "cuda", case.key)
        try:
            row[backend] = _one(run, arguments, truth, seconds / len(backends), flush)
        except (RuntimeError, TypeError, ValueError) as error:
            row[backend] = {"error": f"{type(error).__name__}: {error}"[:500]}
    return row


def _float64(case: Case, arguments: tuple[Any, ...]) -> list[Tensor] | None:
    """The truth; None where float64 needs too much memory, or numbers are random."""
    if "fill" in case.op.name or "langevin" in case.op.name:
        return None
    try:
        doubled = tree_map(_double, arguments)
        return _results(case.op.reference(*doubled), doubled)
    except torch.OutOfMemoryError:
        return None


def _double(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.double() if x.is_floating_point() else x.clone()


def _results(result: Any, arguments: Any) -> list[Tensor]:
    """What came back, and what may have been written into the arguments."""
    leaves = tree_leaves((result, arguments))
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


def _one(
    run: Callable[..., Any],
    arguments: tuple[Any, ...],
    truth: list[Tensor] | None,
    seconds: float,
    flush: Tensor,
) -> dict:
    mine = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run(*mine)
    torch.cuda.synchronize()
    row: dict[str, Any] = {
        "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20
    }
    if truth is not None:
        row["error_against_float64"] = worst = _worst(_results(result, mine), truth)
        if not worst <= _WRONG:
            return row | {"verdict": "wrong"}
    return row | _times(lambda: run(*mine), seconds, flush)


def _worst(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest |x - y| / |y| of the tensors."""
    return max(
        ((x.double() - y).norm() / y.norm().clamp_min(1e-300)).item()
        for x, y in zip(found, truth, strict=True)
    )


def _times(call: Callable[[], Any], seconds: float, flush: Tensor) -> dict:
    """Microseconds between two events around a call, the L2 cache emptied before."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    end = time.monotonic() + seconds
    pairs = []
    while len(pairs) < _ROUNDS and (len(pairs) < 5 or time.monotonic() < end):
        flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        pairs.append((first, last))
    times = sorted(1e3 * first.elapsed_time(last) for first, last in pairs)
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    return {
        "median_us": median,
        "lower_quartile_us": lower,
        "upper_quartile_us": upper,
        "least_us": times[0],
        "count": len(times),
    }
