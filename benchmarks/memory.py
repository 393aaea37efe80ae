"""Peak resident memory of a step, each in a fresh process.

Run as a module this file is the child. It builds the workload and the step; runs one
such step of a copy, so that what libraries set up once is not counted, and drops the
copy; notes the resident memory; runs four steps; prints by how much the peak passed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

__all__ = ["peak_growth"]

STEPS = 3  # before the warm one
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[1]


def peak_growth(
    workload: str, measure: str, provider: str, options: dict, threads: int
) -> dict[str, float]:
    """MiB by which the peak of four steps passes what model and data take.

    Returns:
        `growth`, the peak over four steps, and `first`, that of the first alone, over
        the resident memory `before` the first; `warm`, the peak during the fourth step
        over the resident memory between it and the third, which the allocator has by
        then filled with what earlier steps freed.

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
    step = provider.measures[measure](workload, **options)
    provider.measures[measure](workload.fresh(), **options)()
    _return_freed_memory()
    before = _resident()
    _reset_peak()
    step()
    first = _peak()
    for _ in range(STEPS - 1):
        step()
    peak = _peak()
    between = _resident()
    _reset_peak()
    step()
    growths = {
        "first": first - before,
        "growth": max(first, peak, _peak()) - before,
        "warm": _peak() - between,
        "before": before,
    }
    print(json.dumps({name: size / MIB for name, size in growths.items()}))


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


def _resident() -> int:
    if sys.platform == "linux":
        return _status("VmRSS:")
    return _peak()


def _reset_peak() -> None:
    """Starts the kernel's high-water mark anew (Linux: proc(5), clear_refs)."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM:")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    _child(*sys.argv[1:])
