"""The stage that times whole training steps: probed over plain, and their memory."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.device import clock_of, let_go, peak_mib, settle
from benchmarks.harness import interleave, ratio
from benchmarks.providers import by_name
from benchmarks.workloads import WORKLOADS, Workload, build

__all__ = ["enlarged", "steps"]

# Times the batch of the CPU's workload, so that a step keeps a large GPU busy.
FACTORS = {"W1": 32, "W1L": 32, "W2": 32, "W3": 16, "W4": 16, "W5": 4, "W6": 8}
SMOKE = ("W1", "W2")  # with their own batch
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


def steps(
    seconds: float,
    keep: Callable[[dict], None] = lambda found: None,
    *,
    device: str = "cuda",
    size: str = "full",
) -> dict:
    """Ratio, plain milliseconds and peak memory; `keep` gets what there is."""
    names = list(WORKLOADS) if size == "full" else SMOKE
    found: dict[str, Any] = {}

    def result() -> dict:
        bad = [n for n, row in found.items() if "error" in row or not row["right"]]
        return {"ok": not bad, "bad": bad, "workloads": found}

    for name in names:
        factor = FACTORS[name] if size == "full" else 1
        try:
            # Set for the time alone: torch.testing forbids to set it for ever.
            with torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=False, allow_tf32=False
            ):
                found[name] = _workload(name, factor, seconds / len(names) / 2, device)
        except (RuntimeError, TypeError, ValueError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"[:800]}
        keep(result())
        let_go(device)
    return result()


# By provider of `benchmarks/providers`.
_PROBED = {"observe": "fastminima", "fused": "fastminima-fused"}


def _workload(name: str, factor: int, budget: float, device: str) -> dict:
    plain = enlarged(build(name), factor, device)
    calls = {"plain": by_name("plain").measures["norms"](plain)}
    worst = {}
    for mode, provider in _PROBED.items():
        # Of one data and the same numbers, each step has a model of its own.
        mine = replace(plain, model=enlarged(build(name), 1, device).model)
        calls[mode] = by_name(provider).measures["norms"](mine)
        worst[mode] = _worst_norm(calls[mode](), mine, device)
        settle(calls[mode])
    row: dict[str, Any] = {
        "batch": plain.batch_size,
        "worst_error": worst,
        "right": all(error <= _WRONG for error in worst.values()),
        "peak_mib": {mode: peak_mib(call, device) for mode, call in calls.items()},
    }
    if not row["right"]:
        return row
    times = interleave(calls, plain="plain", budget=budget, clock=clock_of(device))
    plain_ms = [1e3 * t for t in times["plain"] if t is not None]
    row["plain_ms"] = statistics.median(plain_ms)
    for mode in _PROBED:
        row[mode] = dataclasses.asdict(ratio(times[mode], times["plain"]))
    return row


def _worst_norm(norms: torch.Tensor, workload: Workload, device: str) -> float:
    """Against backward passes of single samples, in float64."""
    exact = workload.double()
    exact.model.to(device)
    errors = []
    for n in range(_CHECKED):
        one = replace(
            exact, inputs=exact.inputs[n : n + 1], targets=exact.targets[n : n + 1]
        )
        grads = torch.autograd.grad(one.losses().sum(), list(one.parameters.values()))
        truth = sum(g.square().sum() for g in grads)
        errors.append(abs(norms[n].item() / float(truth) - 1))
    return max(errors)
