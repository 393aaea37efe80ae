"""The stage that times the training of real models: ours in each mode, then peers.

Each step is one of `benchmarks/providers`; what it answers is compared with backward
passes of single samples before it is timed.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastminima as fm
from benchmarks.gpu.device import clock_of, let_go, peak_mib, settle
from benchmarks.gpu.launches import started
from benchmarks.gpu.zoo import RECIPES, TOLERANCE, Recipe, build
from benchmarks.gradients import prepare
from benchmarks.harness import interleave, ratio
from benchmarks.internals import uses_of
from benchmarks.providers import FAILURES, Provider, by_name, reason_of
from benchmarks.workloads import Workload, freeze_norms

__all__ = ["PEERS", "training"]

PEERS = ("dattri-llm", "opacus-ghost", "backpack", "vmap", "opacus-per-sample")
_OURS = {
    "observe": ("fastminima", "norms"),
    "fused": ("fastminima-fused", "norms"),
    "second moments": ("fastminima", "second_moments"),
    "second moments, fused": ("fastminima-fused", "second_moments"),
}
_SINGLE = 3  # samples that are differentiated one by one
_HOST_ROUNDS = 15
_SMOKE = 2.0  # seconds a model, however long it takes

Keep = Callable[[dict], None]
Truth = dict[str, Tensor]  # by parameter, squared norms of the first samples


def training(
    seconds: float,
    keep: Keep = lambda found: None,
    *,
    device: str = "cuda",
    size: str = "full",
) -> dict:
    """Ours on all models first, then peers as far as the time goes.

    Args:
        seconds: for everything.
        keep: called with what there is after each part.
        device: where.
        size: "full", or "smoke" to try the script itself.
    """
    end = time.monotonic() + seconds
    rows: dict[str, dict] = {f"{r.name}, {r.precision}": {} for r in RECIPES}

    def result() -> dict:
        bad = [name for name, row in rows.items() if not row.get("ok")]
        return {"ok": not bad, "bad": bad, "size": size, "models": rows}

    parts = [(_ours, 0.7), (_peers, 1.0)]
    for part, share in parts:
        stop = time.monotonic() + share * (end - time.monotonic())
        for left, (recipe, row) in enumerate(zip(RECIPES, rows.values(), strict=True)):
            budget = (stop - time.monotonic()) / (len(RECIPES) - left)
            if size == "smoke":
                budget = _SMOKE
            elif budget < 3:
                row.setdefault("left out", []).append(part.__name__.strip("_"))
                continue
            try:
                part(recipe, row, budget, device, size, lambda: keep(result()))
            except FAILURES as failure:
                row |= {"ok": False, "error": reason_of(failure)}
            keep(result())
            let_go(device)
    return result()


def _ours(
    recipe: Recipe,
    row: dict,
    budget: float,
    device: str,
    size: str,
    tell: Callable[[], None],
) -> None:
    workload = build(recipe, size, device)
    truth = _truth(workload)
    row |= {
        "inputs": list(workload.inputs.shape),
        "parameters": sum(p.numel() for p in workload.parameters.values()),
    }
    steps = {"plain": by_name("plain").measures["norms"](workload)}
    for name, (provider, measure) in _OURS.items():
        try:
            step, row[name] = _checked(
                by_name(provider).measures[measure], workload, truth, recipe.precision
            )
        except FAILURES as failure:
            row[name] = {"right": False, "error": reason_of(failure)}
        else:
            if row[name]["right"]:
                steps[name] = step
    row["ok"] = all(row[name]["right"] for name in _OURS)
    tell()
    _time(steps, row, 0.5 * budget, device)
    tell()
    row["every=10"] = _every(workload, 0.2 * budget, device)
    tell()
    del workload, steps
    let_go(device)
    modes = [mode for mode in ("observe", "fused") if row[mode]["right"]]
    row["host"] = _host(recipe, modes, device, "narrow" if size == "full" else size)


def _checked(
    make: Callable[[Workload], Callable[[], Any]],
    workload: Workload,
    truth: Truth,
    precision: str,
) -> tuple[Callable[[], Any], dict]:
    """A step, whether it is right, and the seconds of its first call."""
    start = time.monotonic()
    step = make(workload)
    error = _error(step(), truth, workload)
    seconds = time.monotonic() - start
    found = {"worst_error": error, "right": error <= TOLERANCE[precision]}
    if found["right"]:
        settle(step)
    return step, found | {"first_seconds": seconds}


def _truth(workload: Workload) -> Truth:
    """Of the first samples, one backward pass each through the graph of all."""
    losses, parameters = workload.losses(), workload.parameters
    norms: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for loss in losses[:_SINGLE]:
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        for name, g in zip(parameters, grads, strict=True):
            norms[name].append(g.double().square().sum())
    return {name: torch.stack(squares) for name, squares in norms.items()}


def _error(answer: Any, truth: Truth, workload: Workload) -> float:
    """Of squared norms, or of what the second moments of all parameters add up to."""
    want = torch.stack([truth[name] for name in workload.parameters]).sum(dim=0)
    if isinstance(answer, dict):
        found = sum(m.double().sum() for m in answer.values())
        norms = by_name("fastminima").measures["norms"](workload)()
        return abs(float(found / norms.double().mean()) - 1)
    if len(answer) != workload.batch_size:
        return float("inf")
    return float(((answer[:_SINGLE].double() - want) / want).abs().max())


def _time(steps: dict, row: dict, budget: float, device: str) -> None:
    times = interleave(
        steps, plain="plain", budget=budget, min_rounds=3, clock=clock_of(device)
    )
    plain = [1e3 * t for t in times["plain"] if t is not None]
    row["plain_ms"] = statistics.median(plain)
    row["peak_mib"] = {name: peak_mib(step, device) for name, step in steps.items()}
    for name in steps:
        if name != "plain":
            row[name] |= dataclasses.asdict(ratio(times[name], times["plain"]))


def _every(workload: Workload, budget: float, device: str) -> dict:
    """Ten steps of which one is probed, over ten plain ones."""
    probe = fm.GradientProbe(workload.model, mode="fused", every=10)

    def ten(backward: Callable[[Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(10):
                workload.model.zero_grad(set_to_none=True)
                backward(workload.losses())

        return run

    steps = {"plain": ten(lambda losses: losses.mean().backward())}
    steps["every=10"] = ten(probe.backward)
    times = interleave(
        steps, plain="plain", budget=budget, min_rounds=3, clock=clock_of(device)
    )
    return dataclasses.asdict(ratio(times["every=10"], times["plain"]))


def _host(recipe: Recipe, modes: list[str], device: str, size: str) -> dict:
    """What the host does for a use: microseconds, launches and operators beyond plain.

    Of a model with few numbers and all layers, whose steps wait for nothing else.
    """
    workload = build(recipe, size, device)
    steps = {"plain": by_name("plain").measures["norms"](workload)}
    for mode in modes:
        provider, measure = _OURS[mode]
        steps[mode] = by_name(provider).measures[measure](workload)
    probe = fm.GradientProbe(workload.model)
    uses = uses_of(probe, workload.losses())
    clock = clock_of(device)
    found: dict[str, Any] = {"uses": uses, "inputs": list(workload.inputs.shape)}
    for name, step in steps.items():
        settle(step)
        seconds = []
        for _ in range(_HOST_ROUNDS):
            start = clock()
            step()
            seconds.append(clock() - start)
        found[name] = {"ms": 1e3 * statistics.median(seconds)} | started(step, device)
    for mode in modes:
        found[mode] |= _beyond(found[mode], found["plain"], uses)
    return found


def _beyond(probed: dict, plain: dict, uses: int) -> dict:
    found = {"us_a_use": 1e3 * (probed["ms"] - plain["ms"]) / uses}
    for what in ("launches", "operators"):
        if probed[what] is not None and plain[what] is not None:
            found[f"{what}_a_use"] = (probed[what] - plain[what]) / uses
    return found


def _peers(
    recipe: Recipe,
    row: dict,
    budget: float,
    device: str,
    size: str,
    tell: Callable[[], None],
) -> None:
    """Each on a model of its own, beside the plain step of that model."""
    end = time.monotonic() + budget
    found = row.setdefault("peers", {})
    for left, name in enumerate(PEERS):
        share = (end - time.monotonic()) / (len(PEERS) - left)
        provider = by_name(name)
        if reason := provider.missing("norms"):
            found[name] = {"skipped": reason}
        elif share < 1 and size != "smoke":
            found[name] = {"skipped": "no time was left"}
        else:
            try:
                found[name] = _peer(provider, recipe, share, device, size)
            except FAILURES as failure:
                found[name] = {"skipped": reason_of(failure)}
        tell()
        let_go(device)


def _peer(
    provider: Provider, recipe: Recipe, budget: float, device: str, size: str
) -> dict:
    other, mine = (build(recipe, size, device) for _ in range(2))
    if provider.without_norms:  # it skips such layers, on whatever model
        other, mine = freeze_norms(other), freeze_norms(mine)
    clock = clock_of(device)
    truth = _truth(mine)
    step, settings = prepare(provider, "norms", mine, clock)
    error = _error(step(), truth, mine)
    found = {"worst_error": error, "settings": settings, "note": mine.note}
    found["right"] = error <= TOLERANCE[recipe.precision]
    if not found["right"]:
        return found
    steps = {"plain": by_name("plain").measures["norms"](other), provider.name: step}
    times = interleave(
        steps, plain="plain", budget=0.5 * budget, min_rounds=3, clock=clock
    )
    found["peak_mib"] = peak_mib(step, device)
    return found | dataclasses.asdict(ratio(times[provider.name], times["plain"]))
