"""What a record of kernel timings says about which implementation to prefer.

A kernel is preferred where all sizes of the record together took it less time than the
fastest of PyTorch's ways, and it was slower at none of them by more than a tenth. Times
are the least of each: that of the device. A median holds the host's time too, 20 to 40
us for each kernel of Triton, where launches waited for Python; in a step whose kernels
the extension launches there is none of it (`capture/session/called.py`).
`python -m tools.kernels.floors --preferences` prints the lines.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fastminima.ops.preferences import Preference

__all__ = ["RECORD", "SOURCE", "measured_preferences"]

RECORDS = Path(__file__).resolve().parents[2] / "benchmarks" / "records"
RECORD = RECORDS / "2026-11-26-0058-d17c21fe-h100-kernels.json"
SOURCE = "measured on an H100"
SLOWER = 1.1  # than PyTorch's way a kernel may be at one of the sizes
_KERNELS = ("triton", "cuda")
_TORCH = ("reference", "torch")  # PyTorch's operations, one after the other


def measured_preferences(
    record: Path = RECORD,
) -> dict[tuple[str, torch.dtype], Preference]:
    """By op and dtype: the kernel or PyTorch's way, by the worst of the sizes."""
    found: dict[tuple[str, torch.dtype], list[tuple[str, dict, dict]]] = {}
    for label, timed in json.loads(record.read_text())["cases"].items():
        kernel = next((name for name in _KERNELS if name in timed), None)
        ways = [timed[name] for name in _TORCH if name in timed]
        if kernel is not None and ways:
            way = min(ways, key=lambda times: times["least_us"])
            found.setdefault(_key(label), []).append((kernel, timed[kernel], way))
    return {key: _decided(sizes) for key, sizes in sorted(found.items(), key=str)}


def _decided(sizes: list[tuple[str, dict, dict]]) -> Preference:
    """Of one op and dtype: its backend, times of the kernel and of PyTorch's way."""
    ours, theirs = (sum(size[i]["least_us"] for size in sizes) for i in (1, 2))
    worst = min(way["least_us"] / kernel["least_us"] for _, kernel, way in sizes)
    wins = ours < theirs and worst > 1 / SLOWER
    return Preference(sizes[0][0] if wins else "reference", worst, SOURCE)


def _key(label: str) -> tuple[str, torch.dtype]:
    """The op, and the dtype that decides: ids come first where there are some."""
    op, *_, dtype = label.split()
    ids = op.startswith("embedding_")
    return op, torch.int64 if ids else getattr(torch, dtype)
