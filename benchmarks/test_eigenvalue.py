"""The largest Hessian eigenvalue of every provider: products, cost, error."""

from __future__ import annotations

import statistics
from functools import lru_cache

import pytest

from benchmarks.curvature import PROBLEMS, compare_eigenvalues

MEASURES = ("eigenvalue",)
COLUMNS = tuple(PROBLEMS)


@lru_cache(maxsize=1)
def results_of(column, budget):
    return compare_eigenvalues(column, budget=budget, max_rounds=2)


def test_eigenvalue(measure, column, provider, budget, publish):
    if provider == "plain":
        pytest.skip("the plain gradient is the unit")
    result = results_of(column, budget)[provider]
    benchmark = publish(result)
    benchmark.group = f"{measure} {column}"
    benchmark.extra_info["products"] = result.products
    benchmark.extra_info["gradients"] = statistics.median(result.gradients)
    benchmark.pedantic(lambda: result.solve(0), rounds=1)
