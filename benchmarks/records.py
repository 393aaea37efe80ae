"""What a run is recorded with: machine, versions, commit, threads, shapes, numbers."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.harness import Result
from benchmarks.workloads import Workload

__all__ = ["describe_run", "describe_workload", "save", "summary"]

HERE = Path(__file__).resolve().parent
PACKAGES = (
    "fastminima",
    "torch",
    "triton",
    "numpy",
    "backpack-for-pytorch",
    "opacus",
    "dattri-llm",
    "PyHessian",
    "curvlinops-for-pytorch",
    "hessian-eigenthings",
    "scipy",
)


def describe_run(threads: int) -> dict:
    """Everything about this run that its numbers depend on."""
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "threads": threads,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "native_kernels": _native_kernels(),
    }


def describe_workload(workload: Workload) -> dict:
    """Shapes and size of a workload."""
    return {
        "inputs": list(workload.inputs.shape),
        "targets": list(workload.targets.shape),
        "parameters": sum(p.numel() for p in workload.parameters.values()),
    }


def summary(result: Result) -> dict:
    """A result as JSON: the verdict, and of the times median and quantiles."""
    record: dict = {"note": result.note, "settings": result.settings}
    if result.skipped:
        return record | {"skipped": result.skipped}
    record["right"] = result.verdict.ok
    record["worst_error"] = result.verdict.worst
    record["verdict"] = str(result.verdict)
    if result.ratio is not None:
        record["ratio"] = dataclasses.asdict(result.ratio)
        record["seconds"] = _quantiles(result.seconds)
        record["plain_seconds"] = _quantiles(result.plain_seconds)
    return record


def _quantiles(seconds: list[float]) -> dict:
    if len(seconds) > 1:
        lower, _, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    else:
        lower = upper = seconds[0]
    return {
        "median": statistics.median(seconds),
        "lower_quartile": lower,
        "upper_quartile": upper,
        "least": min(seconds),
        "count": len(seconds),
    }


def save(record: dict, path: Path | None = None, *, suffix: str = "") -> Path:
    """Writes the record; by default under records/, named by time and commit."""
    if path is None:
        run = record["run"]
        stamp = run["when"][:16].replace(":", "").replace("T", "-")
        path = (
            HERE
            / "records"
            / f"{stamp}-{(run['commit'] or 'unknown')[:8]}{suffix}.json"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _native_kernels() -> bool | None:
    """Whether fastminima has its compiled kernels here; None without fastminima."""
    from importlib.util import find_spec

    if find_spec("fastminima") is None:
        return None
    return find_spec("fastminima._native_ext") is not None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return None
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return round(size / (1 << 30), 1)
