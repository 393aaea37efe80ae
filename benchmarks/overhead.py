"""What a probe costs besides its statistics, and what its knobs save.

python -m benchmarks.overhead                      everything, some ten minutes
python -m benchmarks.overhead --quick              fewer rounds
python -m benchmarks.overhead --parts walk,knobs   some of it

- walk: Python time of walking and hooking GPT-2 with 12 layers, a node and a use, in
  CPU seconds of the thread (other programs do not count).
- knobs: the ratio of ten steps of W5 to ten plain ones, interleaved, with `every=10`
  and with `sample=4`; and of one probed step.
- adapters: the ratio for a model of frozen layers of which only adapters are tracked.
- first: the first step of a model, in plain steps, and its peak memory.
- compiled: W3 and W5 compiled by `fm.compile`, probed in both modes and not, beside
  `torch.compile`; and the uncompiled module probed. Compile times too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

import fastminima as fm
from benchmarks.first_step import NAMES, first_step
from benchmarks.harness import interleave, ratio
from benchmarks.internals import pieces_of
from benchmarks.models import narrow_gpt2
from benchmarks.records import describe_run, save
from benchmarks.workloads import Workload, build, sample_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--parts", default="walk,knobs,adapters,first,compiled")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="where the record goes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    budget = 6.0 if options.quick else 40.0
    parts = {
        "walk": walk,
        "knobs": lambda: knobs(budget),
        "adapters": lambda: adapters(budget / 4),
        "first": lambda: first(3 if options.quick else 7),
        "compiled": lambda: compiled(budget),
    }
    asked = options.parts.split(",")
    if unknown := set(asked) - set(parts):
        parser.error(f"unknown parts {sorted(unknown)}; choose from {list(parts)}")
    record: dict = {"run": describe_run(options.threads)}
    for name in asked:
        record[name] = parts[name]()
    path = save(record, options.output)
    print(json.dumps({k: v for k, v in record.items() if k != "run"}, indent=1))
    print(f"Recorded in {path}")


def walk() -> dict:
    """Microseconds of Python a node and a use; the width does not matter for them."""
    model, losses = narrow_gpt2(width=24)
    probe = fm.GradientProbe(model)
    for _ in range(3):
        probe.backward(losses())
    pieces = pieces_of(probe, losses())
    nodes, uses = pieces.nodes, pieces.uses
    return {
        "nodes": nodes,
        "uses": uses,
        "walk_us_a_node": _cpu_us(pieces.walk) / nodes,
        "read_us_a_node": _cpu_us(pieces.read) / nodes,
        "hook_us_a_use": _cpu_us(pieces.hook) / uses,
        "hook_us_a_use_with_gradients": _cpu_us(pieces.hook_with_gradients) / uses,
    }


def _cpu_us(call: Callable[[], object], rounds: int = 50) -> float:
    """Median microseconds of CPU time of this thread."""
    found = []
    for _ in range(rounds):
        start = time.thread_time_ns()
        call()
        found.append((time.thread_time_ns() - start) / 1e3)
    return statistics.median(found)


def knobs(budget: float) -> dict:
    """Ten steps with each setting beside ten plain steps, on W5."""
    plain = build("W5")

    def plain_steps() -> None:
        for _ in range(10):
            plain.model.zero_grad(set_to_none=True)
            plain.losses().mean().backward()

    def steps(**options) -> Callable[[], None]:
        workload = plain.fresh()
        probe = fm.GradientProbe(workload.model, **options)

        def run() -> None:
            for _ in range(10):
                _step(workload, probe)

        return run

    return _ratios(
        {
            "plain": plain_steps,
            "every=10": steps(every=10),
            "sample=4 of 16": steps(sample=4),
            "every step": steps(),
        },
        budget,
    )


def _step(workload: Workload, probe: fm.GradientProbe) -> None:
    workload.model.zero_grad(set_to_none=True)
    probe.backward(workload.losses())


class _Adapted(nn.Module):
    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, width) / width**0.5)
        self.up = nn.Parameter(torch.randn(width, rank))

    def forward(self, x):
        linear = nn.functional.linear
        return self.layer(x) + linear(linear(x, self.down), self.up)


def adapters(budget: float) -> dict:
    """Six frozen layers of width 512 with adapters of rank 8; the same all trained."""
    torch.manual_seed(0)
    layers = []
    for _ in range(6):
        layers += [_Adapted(512, 8), nn.Tanh()]
    model = nn.Sequential(*layers)
    x = torch.randn(16, 64, 512)
    probe = fm.GradientProbe(model)

    def losses():
        model.zero_grad(set_to_none=True)
        return model(x).square().mean((1, 2))

    return _ratios(
        {
            "plain": lambda: losses().mean().backward(),
            "adapters probed": lambda: probe.backward(losses()),
        },
        budget,
    )


def first(rounds: int) -> dict:
    """The first probed step of all workloads and of a longer GPT-2."""
    return {name: first_step(name, rounds) for name in NAMES}


def compiled(budget: float) -> dict:
    """Steps of compiled models; compiling takes minutes besides, and is timed too."""
    return {name: _compiled(name, budget) for name in ("W3", "W5")}


def _compiled(name: str, budget: float) -> dict:
    """One step of a workload in each way."""
    ways = ("plain", "not probed", "probed", "fused", "uncompiled, probed")
    workloads = {way: build(name) for way in ways}
    models = {way: workload.model for way, workload in workloads.items()}
    runs = {way: fm.compile(model) for way, model in models.items()}
    runs["plain"] = torch.compile(models["plain"])
    runs["uncompiled, probed"] = models["uncompiled, probed"]
    probes = {
        "probed": fm.GradientProbe(models["probed"]),
        "fused": fm.GradientProbe(models["fused"], mode="fused"),
        "uncompiled, probed": fm.GradientProbe(models["uncompiled, probed"]),
    }

    def step(way: str) -> object:
        workload = workloads[way]
        workload.model.zero_grad(set_to_none=True)
        losses = sample_losses(runs[way](workload.inputs), workload.targets)
        if way in probes:
            return probes[way].backward(losses)
        return losses.mean().backward()

    seconds = {way: _compile_seconds(partial(step, way)) for way in ways[:2]}
    found = _ratios({way: partial(step, way) for way in ways}, budget)
    return {**found, "compile_seconds": seconds}


def _compile_seconds(step: Callable[[], object]) -> float:
    """Of the first step, with nothing in the compiler's caches."""
    with torch._inductor.utils.fresh_cache():
        torch._dynamo.reset()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


def _ratios(steps: dict[str, Callable[[], object]], budget: float) -> dict:
    times = interleave(steps, plain="plain", budget=budget)
    found: dict = {"plain_seconds": statistics.median(_seconds(times["plain"]))}
    for name in steps:
        if name != "plain":
            found[name] = vars(ratio(times[name], times["plain"]))
    return found


def _seconds(times) -> list[float]:
    return [t for t in times if t is not None]


if __name__ == "__main__":
    main()
