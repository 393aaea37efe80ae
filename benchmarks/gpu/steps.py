"""The stage that times whole training steps: probed over plain, and their memory."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness import interleave, ratio
from benchmarks.providers import by_name
from benchmarks.workloads import WORKLOADS, Workload, build

__all__ = ["enlarged", "steps"]

DEVICE = "cuda"
# Times the batch of the CPU's workload, so that a step keeps a large GPU busy.
FACTORS = {"W1": 32, "W1L": 32, "W2": 32, "W3": 16, "W4": 16, "W5": 4, "W6": 8}
_CHECKED = 4  # samples whose norms are compared with a backward pass of their own
_WRONG = 1e-2  # cuDNN and cuBLAS choose algorithms; TF32 is off in both steps


def enlarged(workload: Workload, factor: int, device: str) -> Workload:
    """The model on a device, with `factor` times as many samples of the same kind."""
    generator = torch.Generator().manual_seed(1)
    batch = factor * workload.batch_size

    def more(x: torch.Tensor) -> torch.Tensor:
        shape = batch, *x.shape[1:]
        if x.is_floating_point():
            return torch.randn(shape, generator=generator).to(device)
        high = int(x.max()) + 1
        return torch.randint(high, shape, generator=generator).to(device)

    inputs, targets = more(workload.inputs), more(workload.targets)
    model = workload.model.to(device)
    return replace(workload, model=model, inputs=inputs, targets=targets)


def steps(seconds: float) -> dict:
    """Ratio, plain milliseconds and peak memory of each workload."""
    torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {}
    for name in WORKLOADS:
        try:
            found[name] = _workload(name, seconds / len(WORKLOADS) / 2)
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:800]}
    bad = [n for n, row in found.items() if "error" in row or not row["right"]]
    return {"ok": not bad, "bad": bad, "workloads": found}


# By provider of `benchmarks/providers`.
_PROBED = {"observe": "fastminima", "fused": "fastminima-fused"}


def _workload(name: str, budget: float) -> dict:
    plain = enlarged(build(name), FACTORS[name], DEVICE)
    calls = {"plain": by_name("plain").measures["norms"](plain)}
    worst = {}
    for mode, provider in _PROBED.items():
        # Of one data and the same numbers, each step has a model of its own.
        mine = replace(plain, model=enlarged(build(name), 1, DEVICE).model)
        calls[mode] = by_name(provider).measures["norms"](mine)
        worst[mode] = _worst_norm(calls[mode](), mine)
    row: dict[str, Any] = {
        "batch": plain.batch_size,
        "worst_error": worst,
        "right": all(error <= _WRONG for error in worst.values()),
        "peak_mib": {mode: _peak(call) for mode, call in calls.items()},
    }
    if not row["right"]:
        return row
    times = interleave(calls, plain="plain", budget=budget, clock=_clock)
    plain_ms = [1e3 * t for t in times["plain"] if t is not None]
    row["plain_ms"] = statistics.median(plain_ms)
    for mode in _PROBED:
        row[mode] = dataclasses.asdict(ratio(times[mode], times["plain"]))
    return row


def _clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _peak(call: Callable[[], object]) -> float:
    """MiB that the second of two calls needs beside what lives between them."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _worst_norm(norms: torch.Tensor, workload: Workload) -> float:
    """Against backward passes of single samples, in float64."""
    exact = workload.double()
    exact.model.to(DEVICE)
    errors = []
    for n in range(_CHECKED):
        one = replace(
            exact, inputs=exact.inputs[n : n + 1], targets=exact.targets[n : n + 1]
        )
        grads = torch.autograd.grad(one.losses().sum(), list(one.parameters.values()))
        truth = sum(g.square().sum() for g in grads)
        errors.append(abs(norms[n].item() / float(truth) - 1))
    return max(errors)
