"""The stage that times compiled training steps: probed over not, and whether right.

Every way has a model of its own with the same numbers. What a probe finds is compared
with the uncompiled probe of the same model before anything is timed.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import fastminima as fm
from benchmarks.gpu.device import clock_of, let_go, peak_mib, settle
from benchmarks.gpu.launches import started
from benchmarks.gpu.zoo import RECIPES, TOLERANCE, Recipe, build
from benchmarks.harness import interleave, ratio
from benchmarks.providers import FAILURES, reason_of
from benchmarks.workloads import sample_losses

__all__ = ["compiled"]

_NAMES = ("GPT-2 124M, bfloat16", "ViT-B/16, autocast")
_MODES = (None, "reduce-overhead")  # of the compiler
_SAID = 1500  # characters of an error
_WAYS = ("plain", "not probed", "observe", "fused")


def compiled(
    seconds: float,
    keep: Callable[[dict], None] = lambda found: None,
    *,
    device: str = "cuda",
    size: str = "full",
) -> dict:
    """Each model under each mode of the compiler; `keep` gets what there is."""
    end = time.monotonic() + seconds
    recipes = [r for r in RECIPES if f"{r.name}, {r.precision}" in _NAMES]
    cases = [(r, mode) for r in recipes for mode in _MODES]
    if size == "smoke":
        cases = cases[:1]
    rows: dict[str, dict] = {}

    def result() -> dict:
        bad = [name for name, row in rows.items() if not row.get("ok")]
        return {"ok": not bad, "bad": bad, "size": size, "models": rows}

    for left, (recipe, mode) in enumerate(cases):
        name = f"{recipe.name}, {recipe.precision}, mode={mode}"
        budget = (end - time.monotonic()) / (len(cases) - left)
        rows[name] = {"ok": False}
        if budget < 15 and size != "smoke":
            rows[name]["error"] = "no time was left"
            continue
        try:
            _look_at(recipe, mode, rows[name], budget, device, size)
        except FAILURES as failure:
            rows[name] |= {
                "ok": False,
                "error": reason_of(failure),
                "why": str(failure)[:1500],
            }
        keep(result())
        torch._dynamo.reset()
        let_go(device)
    return result()


def _look_at(
    recipe: Recipe, mode: str | None, row: dict, budget: float, device: str, size: str
) -> None:
    start = time.monotonic()
    steps, said = {}, {}
    for way in _WAYS:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            steps[way] = _step(recipe, mode, way, device, size)
            before = time.monotonic()
            steps[way]()
            steps[way]()
            row[way] = {"first_seconds": time.monotonic() - before}
        said[way] = sorted({str(w.message)[:300] for w in heard})[:5]
    row["said"] = said
    truth = _uncompiled(recipe, device, size)
    for way in ("observe", "fused"):
        error = float(((steps[way]() - truth) / truth).abs().max())
        row[way] |= {
            "worst_error": error,
            "right": error <= TOLERANCE[recipe.precision],
        }
        settle(steps[way])
    row["ok"] = all(row[way]["right"] for way in ("observe", "fused"))
    left = max(2.0, 0.8 * (budget - (time.monotonic() - start)))
    times = interleave(
        steps, plain="plain", budget=left, min_rounds=5, clock=clock_of(device)
    )
    row["plain_ms"] = 1e3 * statistics.median(t for t in times["plain"] if t)
    for way, step in steps.items():
        row[way]["peak_mib"] = peak_mib(step, device)
        row[way] |= {} if device == "cpu" else started(step, device)
        if way != "plain":
            row[way] |= dataclasses.asdict(ratio(times[way], times["plain"]))


def _step(
    recipe: Recipe, mode: str | None, way: str, device: str, size: str
) -> Callable[[], Tensor]:
    """A step that returns the norms of its samples, or their losses."""
    workload = build(recipe, size, device)
    compile_ = torch.compile if way == "plain" else fm.compile
    fast = compile_(workload.model, mode=mode)
    probe = fm.GradientProbe(
        workload.model, mode="fused" if way == "fused" else "observe"
    )

    def step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        workload.model.zero_grad(set_to_none=True)
        losses = sample_losses(fast(workload.inputs), workload.targets)
        if way not in ("observe", "fused"):
            losses.mean().backward()
            return losses.detach()
        stats = probe.backward(losses)
        assert stats is not None
        assert stats.sq_norms is not None
        return stats.sq_norms.double()

    return step


def _uncompiled(recipe: Recipe, device: str, size: str) -> Tensor:
    workload = build(recipe, size, device)
    stats = fm.GradientProbe(workload.model).backward(workload.losses())
    assert stats is not None
    assert stats.sq_norms is not None
    return stats.sq_norms.double()
