"""Norms, second moments and Hessian products: every provider beside the plain step."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

from benchmarks.curvature import compare_products
from benchmarks.gradients import compare_gradients
from benchmarks.workloads import build

MEASURES = ("norms", "second_moments", "product")


@lru_cache(maxsize=1)
def results_of(measure, column, budget):
    if measure == "product":
        return compare_products(build(column), budget=budget)
    return compare_gradients(build(column), measure, budget=budget)


def test_step(measure, column, provider, budget, publish):
    result = results_of(measure, column, budget)[provider]
    benchmark = publish(result)
    benchmark.group = f"{measure} {column}"
    benchmark.extra_info["ratio"] = asdict(result.ratio)
    benchmark.pedantic(result.step, rounds=3, warmup_rounds=1)
