"""Per-sample norms and second moments: every provider on one workload."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable

from benchmarks.gradients_oracle import Truth, judge, sample_truth
from benchmarks.harness import Result, compare
from benchmarks.providers import (
    FAILURES,
    Provider,
    by_name,
    providers_of,
    reason_of,
)
from benchmarks.providers.base import gradients
from benchmarks.workloads import Workload, freeze_norms

__all__ = ["choose_option", "compare_gradients", "prepare"]

PLAIN_WITHOUT_NORMS = "plain, norm parameters off"


def compare_gradients(
    workload: Workload,
    measure: str,
    names: Iterable[str] | None = None,
    *,
    budget: float = 20.0,
    progress: Callable[[str], None] = lambda _: None,
    truth: Truth | None = None,
    **options,
) -> dict[str, Result]:
    """Checks and times the providers of "norms" or "second_moments" on a workload.

    With `truth`, that of `sample_truth`, it is not computed again; with `timed=False`
    providers are only checked.
    """
    steps, settings, workloads, baselines, skipped = {}, {}, {}, {}, {}

    def add(label: str, provider: Provider, mine: Workload):
        progress(f"{workload.name}: preparing {label}")
        steps[label], settings[label] = prepare(provider, measure, mine)
        workloads[label] = mine

    add("plain", by_name("plain"), workload.fresh())
    for provider in providers_of(measure):
        if provider.name == "plain" or (names and provider.name not in names):
            continue
        if reason := provider.missing(measure):
            skipped[provider.name] = Result(provider.name, skipped=reason)
            continue
        mine = workload.fresh()
        if workload.name in provider.without_norms:
            mine = freeze_norms(mine)
            baselines[provider.name] = PLAIN_WITHOUT_NORMS
        try:
            add(provider.name, provider, mine)
        except FAILURES as failure:
            reason = reason_of(failure)
            skipped[provider.name] = Result(provider.name, skipped=reason)
    if baselines:
        add(PLAIN_WITHOUT_NORMS, by_name("plain"), freeze_norms(workload.fresh()))

    if truth is None:
        progress(f"{workload.name}: float64 oracle")
        truth = sample_truth(workload)

    def check(label, answer):
        progress(f"{workload.name}: checking {label}")
        mine = workloads[label]
        return judge(answer, gradients(mine), truth.of(mine.parameters))

    results = compare(
        steps,
        plain="plain",
        check=check,
        baselines=baselines,
        budget=budget,
        progress=lambda text: progress(f"{workload.name} {measure} {text}"),
        **options,
    )
    for label, result in results.items():
        result.settings = settings[label]
        chosen = [f"{option} {value}" for option, value in settings[label].items()]
        result.note = ", ".join(filter(None, [workloads[label].note, *chosen]))
    return results | skipped


def prepare(
    provider: Provider,
    measure: str,
    workload: Workload,
    clock: Callable[[], float] = time.perf_counter,
):
    """A provider's step at its best setting, and what that setting is."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    warnings.filterwarnings("ignore", message="Extension saving to .* does not have")
    warnings.filterwarnings("ignore", message="There is a performance drop because")
    make = provider.measures[measure]
    if not provider.choices:
        return make(workload), {}
    ((option, values),) = provider.choices.items()
    if option == "chunk":  # of samples: no more than there are
        values = dict.fromkeys(min(value, workload.batch_size) for value in values)
    values = list(values)
    best = choose_option(lambda value: make(workload, **{option: value}), values, clock)
    return make(workload, **{option: best}), {option: best}


def choose_option(make, values: list, clock=time.perf_counter):
    """The value whose step is fastest; values that start far behind run once only."""
    best, best_seconds = None, float("inf")
    for value in values:
        step = make(value)
        for seconds in (_seconds(step, clock) for _ in range(3)):
            if seconds < best_seconds:
                best, best_seconds = value, seconds
            if seconds > 1.5 * best_seconds:
                break
    return best


def _seconds(step, clock) -> float:
    start = clock()
    step()
    return clock() - start
