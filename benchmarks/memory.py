"""Peak resident memory of a step, each in a fresh process.

Run as a module this file is the child. It builds the workload and the step; runs one
such step of a copy, so that what libraries set up once is not counted, and drops the
copy; notes the resident memory; runs four steps, or as many as begin within five
seconds, at least two; prints by how much the peak passed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["peak", "peak_growth", "resident"]

STEPS = 4
ENOUGH = 5.0  # seconds of steps: slow ones have their peak in the first already
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[1]


def peak_growth(
    workload: str, measure: str, provider: str, options: dict, threads: int
) -> dict[str, float]:
    """MiB by which the peak of four steps passes what model and data take.

    Returns:
        `growth`, the peak over all steps, and `first`, that of the first alone, over
        the resident memory `before` the first; `warm`, the peak during the last step
        over the resident memory just before it, which the allocator has by then filled
        with what earlier steps freed; and how many `steps` there were.

    Raises:
        RuntimeError: when the child fails, with the end of what it said.
    """
    arguments = [workload, measure, provider, json.dumps(options), str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"Measuring {provider} on {workload} failed:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def _child(workload_name, measure, provider_name, options, threads):
    import torch

    from benchmarks.providers import by_name
    from benchmarks.workloads import build, freeze_norms

    torch.set_num_threads(int(threads))
    provider = by_name(provider_name)
    workload = build(workload_name)
    options = json.loads(options)
    if options.pop("without_norms", False):
        workload = freeze_norms(workload)
    make = provider.measures[measure]
    step = make(workload, **options)
    make(workload.fresh(), **options)()
    print(json.dumps(_growth_of(step)))


def _growth_of(step) -> dict[str, float]:
    _return_freed_memory()
    before = resident()
    peaks: list[int] = []
    end = time.monotonic() + ENOUGH
    while len(peaks) < 2 or (len(peaks) < STEPS and time.monotonic() < end):
        between = resident()
        _reset_peak()
        step()
        peaks.append(peak())
    growths = {
        "first": peaks[0] - before,
        "growth": max(peaks) - before,
        "warm": peaks[-1] - between,
        "before": before,
    }
    return {name: size / MIB for name, size in growths.items()} | {"steps": len(peaks)}


def _return_freed_memory() -> None:
    """Hands what building the model freed back to the system, where glibc can."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def resident() -> int:
    """Bytes that this process has in memory."""
    if sys.platform == "linux":
        return _status("VmRSS:")
    return peak()


def _reset_peak() -> None:
    """Starts the kernel's high-water mark anew (Linux: proc(5), clear_refs)."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most that it had, since the mark was reset."""
    if sys.platform == "linux":
        return _status("VmHWM:")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    _child(*sys.argv[1:])
