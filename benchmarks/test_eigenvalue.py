"""The largest Hessian eigenvalue of every provider: products, cost, error."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.curvature import PROBLEMS, compare_eigenvalues

MEASURE = "eigenvalue"
COLUMNS = tuple(PROBLEMS)


@pytest.fixture(scope="module")
def results(column, budget):
    return compare_eigenvalues(column, budget=budget, max_rounds=2)


def test_eigenvalue(results, provider, publish, column):
    if provider == "plain":
        pytest.skip("the plain gradient is the unit")
    result = results[provider]
    benchmark = publish(result)
    benchmark.group = f"{MEASURE} {column}"
    benchmark.extra_info["products"] = result.products
    benchmark.extra_info["gradients"] = statistics.median(result.gradients)
    benchmark.pedantic(lambda: result.solve(0), rounds=1)
