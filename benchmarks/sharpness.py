"""Sharpness while training: what a call costs every ten steps, and what it misses.

    python -m benchmarks.sharpness                       # W1L, W3, W5: some ten minutes
    python -m benchmarks.sharpness --cases W1L --calls 40

Each way of calling has a model of its own, trained by gradient descent on the
workload's batch; all take turns, step by step. The cost of a call is the time of the
step with it less that of a plain step, in plain steps. Where they are compared with the
truth, that is a solve to 1e-4 from the vector found, beside a random one.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import fastminima as fm
from benchmarks.records import describe_run, save
from benchmarks.workloads import Workload, build, sample_losses, train

__all__ = ["WAYS", "main", "measure"]

EVERY = 10  # steps between calls
# Workload: steps before, their size, calls, and calls between comparisons.
CASES = {"W1L": (200, 0.1, 30, 5), "W3": (60, 0.05, 12, 6), "W5": (30, 0.1, 8, 4)}
# How a call is made: whether on the step's own graph, and the probe's options.
WAYS: dict[str, tuple[bool, dict]] = {
    "batch": (False, {}),
    "batch, value": (False, {"criterion": "value"}),
    "step": (True, {}),
    "step, value": (True, {"criterion": "value"}),
    "step, value to 3 %": (True, {"criterion": "value", "rtol": 0.03}),
    "step, budget 2": (True, {"budget": 2}),
}


def loss_of(model, batch):
    """The mean of the samples' losses."""
    return sample_losses(model(batch[0]), batch[1]).mean()


@dataclass
class Way:
    """One way of calling, with its model and what came of it."""

    workload: Workload
    probe: fm.SharpnessProbe
    on_step: bool
    rate: float
    plain: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    products: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    converged: int = 0

    def step(self, clock: Callable[[], float]) -> None:
        """A plain step, timed."""
        start = clock()
        self.workload.losses().mean().backward()
        self.plain.append(clock() - start)
        self._move()

    def call(self, clock: Callable[[], float], *, compare: bool) -> None:
        """A step with a call, timed, and compared with the truth where asked."""
        batch, start = self.workload.batch, clock()
        if self.on_step:
            with fm.twice_differentiable():
                losses = self.workload.losses()
            pairs = self.probe.backward(losses)
        else:
            self.workload.losses().mean().backward()
            pairs = self.probe(batch)
        (self.warm if self.products else self.cold).append(clock() - start)
        self.products.append(pairs.products)
        self.converged += pairs.converged
        if compare:
            hessian = fm.Hessian(self.workload.model, loss_of, batch)
            true = fm.top_eigenpairs(
                hessian, 1, rtol=1e-4, start=pairs.vectors, miss=0.05
            )
            self.errors.append(float(pairs.values[0] / true.values[0]) - 1)
        self._move()

    def _move(self) -> None:
        with torch.no_grad():
            for p in self.workload.parameters.values():
                p -= self.rate * p.grad
        self.workload.model.zero_grad(set_to_none=True)


def measure(
    name: str, calls: int | None, clock: Callable[[], float]
) -> dict[str, dict]:
    """Each way on one workload."""
    steps, rate, usual, compared = CASES[name]
    calls = calls or usual
    workload = train(build(name), steps, rate)
    ways = {
        label: _way(workload.fresh(), on_step, rate, options)
        for label, (on_step, options) in WAYS.items()
    }
    for call in range(calls):
        for way in ways.values():
            way.call(clock, compare=call % compared == compared - 1)
        for _ in range(EVERY - 1):
            for way in ways.values():
                way.step(clock)
        print(f"\r{name}: call {call + 1} of {calls}", end="", flush=True)
    print()
    return {label: _result(way) for label, way in ways.items()}


def _way(workload: Workload, on_step: bool, rate: float, options: dict) -> Way:
    probe = fm.SharpnessProbe(workload.model, loss_of, **options)
    return Way(workload, probe, on_step, rate)


def _result(way: Way) -> dict:
    plain = statistics.median(way.plain)
    costs = [seconds / plain - 1 for seconds in way.warm]
    return {
        "plain_seconds": plain,
        "cold": way.cold[0] / plain - 1,
        "warm": statistics.median(costs),
        "warm_quartiles": statistics.quantiles(costs, n=4)[::2],
        "warm_mean": statistics.fmean(costs),
        "products_cold": way.products[0],
        "products": statistics.fmean(way.products[1:]),
        "converged": way.converged,
        "calls": len(way.products),
        "errors": way.errors,
    }


def main() -> None:
    """All workloads asked for, a line each way, and the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--calls", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--record", type=Path, help="a file, or - for none")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    found = {}
    for name in options.cases.split(","):
        found[name] = measure(name, options.calls, clock)
        for label, result in found[name].items():
            low, high = result["warm_quartiles"]
            worst = max(map(abs, result["errors"]), default=float("nan"))
            print(
                f"{name:4} {label:21} cold {result['cold']:5.1f} gradients "
                f"({result['products_cold']} products), warm {result['warm']:5.2f} "
                f"[{low:.2f}, {high:.2f}] ({result['products']:.2f} products), a run "
                f"{1 + result['warm_mean'] / EVERY:.3f}; worst error {worst:.2%}, "
                f"{result['converged']} of {result['calls']} converged"
            )
    if str(options.record) != "-":
        content = {
            "run": describe_run(options.threads),
            "clock": options.clock,
            "every": EVERY,
            "sharpness": found,
        }
        print("record:", save(content, options.record, suffix="-sharpness"))


if __name__ == "__main__":
    main()
