"""Options and fixtures of the suites: `pytest benchmarks`."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks.providers import providers_of
from benchmarks.workloads import WORKLOADS


def pytest_addoption(parser):
    group = parser.getgroup("benchmarks")
    group.addoption(
        "--workloads", default="W1,W2", help=f"of {','.join(WORKLOADS)}, or 'all'"
    )
    group.addoption(
        "--budget", type=float, default=5.0, help="seconds of rounds a workload"
    )


def chosen_workloads(config) -> list[str]:
    asked = config.getoption("--workloads")
    return list(WORKLOADS) if asked == "all" else asked.split(",")


def pytest_generate_tests(metafunc):
    """`measure`, `column` and `provider` of a test: all that was asked for."""
    asked = chosen_workloads(metafunc.config)
    columns = getattr(metafunc.module, "COLUMNS", asked)
    combinations = [
        (measure, column, provider.name)
        for measure in getattr(metafunc.module, "MEASURES", ())
        for column in columns
        for provider in providers_of(measure)
        if column.split()[0] in asked
    ]
    if combinations:
        metafunc.parametrize(("measure", "column", "provider"), combinations)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def budget(request) -> float:
    return request.config.getoption("--budget")


@pytest.fixture
def publish(benchmark):
    """Hands a result to pytest-benchmark, or skips or fails the test by its verdict.

    The interleaved ratio and its spread go to `extra_info`; the table that
    pytest-benchmark prints itself shows the seconds of the same step, run alone.
    """

    def run(result, step=None):
        if result.skipped:
            pytest.skip(result.skipped)
        assert result.verdict.ok, f"{result.provider} is {result.verdict}"
        benchmark.extra_info["worst_error"] = result.verdict.worst
        benchmark.extra_info["threads"] = torch.get_num_threads()
        if getattr(result, "note", ""):
            benchmark.extra_info["note"] = result.note
        return benchmark

    return run
