"""Hessian products and largest eigenvalues: every provider on one workload."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from benchmarks.curvature_oracle import (
    judge_eigenvalue,
    judge_product,
    product_truth,
    top_eigenvalue,
)
from benchmarks.harness import Result, Verdict, compare
from benchmarks.providers import FAILURES, by_name, providers_of, reason_of
from benchmarks.workloads import Workload, build, train

__all__ = ["PROBLEMS", "EigenvalueResult", "compare_eigenvalues", "compare_products"]

# Whose largest eigenvalue: workload, steps of gradient descent before, their size.
PROBLEMS: dict[str, tuple[str, int, float]] = {
    "W1L trained": ("W1L", 200, 0.1),
    "W1L at init": ("W1L", 0, 0.0),
    "W3 trained": ("W3", 60, 0.05),
    "W5 trained": ("W5", 30, 0.1),
}


def compare_products(
    workload: Workload,
    names: Iterable[str] | None = None,
    *,
    budget: float = 20.0,
    progress: Callable[[str], None] = lambda _: None,
    **options,
) -> dict[str, Result]:
    """Checks and times one Hessian product of each provider, in plain gradients."""
    vector = _direction(workload)
    truth = product_truth(workload, vector)
    plain = by_name("plain").measures["product"](workload.fresh())
    steps, skipped = {"plain": plain}, {}
    for provider in _chosen("product", names):
        if reason := provider.missing("product"):
            skipped[provider.name] = Result(provider.name, skipped=reason)
            continue
        progress(f"{workload.name} product: preparing {provider.name}")
        make = provider.measures["product"]
        try:
            steps[provider.name] = make(workload.fresh(), vector)
        except FAILURES as failure:
            reason = reason_of(failure)
            skipped[provider.name] = Result(provider.name, skipped=reason)

    def check(label, answer):
        if label == "plain":
            return Verdict(True, 0.0, "nothing measured")
        return judge_product(answer, truth, workload)

    return skipped | compare(
        steps,
        plain="plain",
        check=check,
        budget=budget,
        progress=lambda text: progress(f"{workload.name} product {text}"),
        **options,
    )


def _direction(workload: Workload) -> torch.Tensor:
    count = sum(p.numel() for p in workload.parameters.values())
    vector = torch.randn(count, generator=torch.Generator().manual_seed(5))
    return vector / vector.norm()


def _chosen(measure: str, names: Iterable[str] | None):
    names = set(names or ())
    return [
        p
        for p in providers_of(measure)
        if p.name != "plain" and (not names or p.name in names)
    ]


@dataclass
class EigenvalueResult:
    """A provider's searches for one largest eigenvalue."""

    provider: str
    verdict: Verdict | None = None
    skipped: str = ""
    products: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)  # seconds in plain gradients
    solve: Callable[[int], tuple[float, int]] | None = None
    truth: float = float("nan")
    truth_residual: float = float("nan")


def compare_eigenvalues(
    problem: str,
    names: Iterable[str] | None = None,
    *,
    budget: float = 30.0,
    max_rounds: int = 5,
    include_slow: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, EigenvalueResult]:
    """Searches with another seed in each round, until the budget is spent.

    A search includes its set-up (the gradient graph). Its cost is its seconds over
    the median of the plain gradients timed before each search of the same run.
    """
    name, steps, lr = PROBLEMS[problem]
    progress(f"{problem}: training and finding the true eigenvalue")
    workload = train(build(name), steps, lr) if steps else build(name)
    truth, residual = top_eigenvalue(workload.fresh())
    gradient = by_name("plain").measures["eigenvalue"](workload.fresh())
    results: dict[str, EigenvalueResult] = {}
    solvers = {}
    for provider in _chosen("eigenvalue", names):
        reason = provider.missing("eigenvalue")
        if name in provider.slow_eigenvalue and not include_slow:
            reason = "takes minutes here; --slow runs it"
        results[provider.name] = EigenvalueResult(provider.name, skipped=reason)
        if not reason:
            solve = provider.measures["eigenvalue"](workload.fresh())
            results[provider.name].solve = solvers[provider.name] = solve
    unit: list[float] = []
    order = random.Random(0)
    started = clock()
    for i in range(max_rounds):
        labels = list(solvers)
        order.shuffle(labels)
        for label in labels:
            progress(f"{problem}, round {i + 1}: {label}")
            gradient()
            unit += [_timed(gradient, clock)[1] for _ in range(2)]
            try:
                if prepare := getattr(solvers[label], "prepare", None):
                    prepare()
                (value, products), seconds = _timed(
                    lambda solve=solvers[label], seed=i: solve(seed), clock
                )
            except FAILURES as failure:
                results[label].skipped = reason_of(failure)
                del solvers[label]
                continue
            results[label].values.append(value)
            results[label].products.append(products)
            results[label].seconds.append(seconds)
        if (clock() - started) * (i + 2) / (i + 1) > budget:
            break
    one = statistics.median(unit) if unit else float("nan")
    for label in solvers:
        result = results[label]
        result.verdict = judge_eigenvalue(result.values, truth)
        result.gradients = [s / one for s in result.seconds]
    for result in results.values():
        result.truth, result.truth_residual = truth, residual
    return results


def _timed(call, clock):
    start = clock()
    answer = call()
    return answer, clock() - start
