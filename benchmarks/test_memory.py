"""Peak memory of a step, in a fresh process: every provider beside the plain step."""

from __future__ import annotations

from functools import lru_cache

import torch

from benchmarks.gradients import compare_gradients
from benchmarks.memory import peak_growth
from benchmarks.providers import by_name
from benchmarks.workloads import build

MEASURES = ("norms",)


@lru_cache(maxsize=1)
def results_of(measure, column):
    return compare_gradients(build(column), measure, timed=False)


@lru_cache(maxsize=1)
def plain_growth_of(measure, column):
    return peak_growth(column, measure, "plain", {}, torch.get_num_threads())


def test_memory(measure, column, provider, publish):
    result = results_of(measure, column)[provider]
    benchmark = publish(result)
    settings = dict(result.settings)
    if column in by_name(provider).without_norms:
        settings["without_norms"] = True
    growth = benchmark.pedantic(
        peak_growth,
        args=(column, measure, provider, settings, torch.get_num_threads()),
        rounds=1,
    )
    benchmark.group = f"memory {column} (the seconds are those of a whole process)"
    benchmark.extra_info["growth_mib"] = growth
    benchmark.extra_info["plain_growth_mib"] = plain_growth_of(measure, column)
    assert growth["growth"] > 0
