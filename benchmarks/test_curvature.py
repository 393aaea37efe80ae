"""One Hessian product of every provider, in plain gradients."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.curvature import compare_products
from benchmarks.workloads import build

MEASURE = "product"


@pytest.fixture(scope="module")
def results(column, budget):
    return compare_products(build(column), budget=budget)


def test_product(results, provider, publish, column):
    result = results[provider]
    benchmark = publish(result)
    benchmark.group = f"{MEASURE} {column}"
    benchmark.extra_info["ratio"] = asdict(result.ratio)
    benchmark.pedantic(result.step, rounds=3, warmup_rounds=1)
