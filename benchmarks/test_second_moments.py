"""Second moments of the gradient: every provider beside the plain step."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.gradients import compare_gradients
from benchmarks.workloads import build

MEASURE = "second_moments"


@pytest.fixture(scope="module")
def results(column, budget):
    return compare_gradients(build(column), MEASURE, budget=budget)


def test_second_moments(results, provider, publish, column):
    result = results[provider]
    benchmark = publish(result)
    benchmark.group = f"{MEASURE} {column}"
    benchmark.extra_info["ratio"] = asdict(result.ratio)
    benchmark.pedantic(result.step, rounds=3, warmup_rounds=1)
