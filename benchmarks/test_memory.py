"""Peak memory of a step, in a fresh process: every provider beside the plain step."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gradients import compare_gradients
from benchmarks.memory import peak_growth
from benchmarks.providers import by_name
from benchmarks.workloads import build

MEASURE = "norms"


@pytest.fixture(scope="module")
def results(column):
    return compare_gradients(build(column), MEASURE, budget=0, min_rounds=1)


@pytest.fixture(scope="module")
def plain_growth(column):
    return peak_growth(column, MEASURE, "plain", {}, torch.get_num_threads())


def test_memory(results, plain_growth, provider, publish, column):
    result = results[provider]
    benchmark = publish(result)
    settings = dict(result.settings)
    if column in by_name(provider).without_norms:
        settings["without_norms"] = True
    growth = benchmark.pedantic(
        peak_growth,
        args=(column, MEASURE, provider, settings, torch.get_num_threads()),
        rounds=1,
    )
    benchmark.group = f"memory {column} (the seconds are those of a whole process)"
    benchmark.extra_info["growth_mib"] = growth
    benchmark.extra_info["plain_growth_mib"] = plain_growth
    assert growth["growth"] > 0
