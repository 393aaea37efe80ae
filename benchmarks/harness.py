"""Times steps against each other, in one process, in interleaved rounds.

A comparison has one plain step and any number of steps that do the same work and
more. Every step is checked before anything is timed; a wrong one is not timed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.providers.base import FAILURES, reason_of

__all__ = ["Ratio", "Result", "Verdict", "compare", "interleave", "ratio"]

Step = Callable[[], object]
Clock = Callable[[], float]

# A step slower than this many plain steps takes part in every fifth round only, and is
# not run once untimed before it is timed.
SLOW = 5.0
SLOW_EVERY = 5


@dataclass(frozen=True)
class Verdict:
    """Whether a provider's answer is right, and by how much it is off at worst."""

    ok: bool
    worst: float
    what: str

    def __str__(self) -> str:
        return "right" if self.ok else f"wrong: {self.what} off by {self.worst:.2g}"


@dataclass(frozen=True)
class Ratio:
    """How many times the plain step a step takes, over interleaved rounds."""

    value: float  # ratio of the medians
    low: float  # 95 % bootstrap interval of that ratio
    high: float
    lower_quartile: float  # quartiles of the rounds' own ratios
    upper_quartile: float
    rounds: int

    def __str__(self) -> str:
        digits = 1 if self.value >= 10 else 2
        return f"{self.value:.{digits}f} ± {(self.high - self.low) / 2:.{digits}f}"


@dataclass
class Result:
    """One provider on one workload: its verdict and, if right, its times."""

    provider: str
    verdict: Verdict | None = None
    skipped: str = ""
    note: str = ""
    settings: dict = field(default_factory=dict)
    step: Step | None = None
    seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    ratio: Ratio | None = None

    @property
    def is_timed(self) -> bool:
        return self.ratio is not None


def interleave(
    steps: Mapping[str, Step],
    *,
    plain: str,
    budget: float,
    min_rounds: int = 7,
    max_rounds: int = 200,
    clock: Clock = time.perf_counter,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float | None]]:
    """Seconds of each step in each round; None in rounds a slow step sat out.

    Two rounds of warm-up are thrown away; they also tell what a round costs, and so
    how many rounds fit in `budget` seconds. In each round the steps come in a new
    random order, and each runs once untimed before its timed run: in a training loop
    the previous step left its own data in the caches, not another library's.
    """
    costs = {name: _warm_up(step, clock) for name, step in steps.items()}
    slow = {name for name, cost in costs.items() if cost > SLOW * costs[plain]}
    a_round = sum(
        cost / SLOW_EVERY if name in slow else 2 * cost for name, cost in costs.items()
    )
    rounds = int(min(max_rounds, max(min_rounds, budget / a_round)))
    if slow:
        rounds = max(rounds, 3 * SLOW_EVERY)
    order = random.Random(0)
    times: dict[str, list[float | None]] = {name: [] for name in steps}
    for i in range(rounds):
        names = [n for n in steps if n not in slow or i % SLOW_EVERY == 0]
        order.shuffle(names)
        for name in steps:
            if name not in names:
                times[name].append(None)
        for name in names:
            progress(f"round {i + 1}/{rounds}: {name}")
            if name not in slow:
                steps[name]()
            times[name].append(_time(steps[name], clock))
    return times


def _warm_up(step: Step, clock: Clock) -> float:
    step()
    return _time(step, clock)


def _time(step: Step, clock: Clock) -> float:
    start = clock()
    step()
    return clock() - start


def ratio(seconds: list[float | None], plain: list[float | None]) -> Ratio:
    """Ratio of medians over the rounds that both took part in, with its spread."""
    pairs = [(s, p) for s, p in zip(seconds, plain, strict=True) if None not in (s, p)]
    # The plain median uses every round, also those that a slow step sat out.
    all_plain = [p for p in plain if p is not None]
    each = sorted(s / p for s, p in pairs)
    value = statistics.median(s for s, _ in pairs) / statistics.median(all_plain)
    draws = random.Random(1)
    boot = sorted(_resampled(pairs, draws) for _ in range(1000))
    lower, _, upper = (
        statistics.quantiles(each, n=4, method="inclusive")
        if len(each) > 1
        else each * 3
    )
    return Ratio(value, boot[25], boot[974], lower, upper, len(pairs))


def _resampled(pairs: list[tuple[float, float]], draws: random.Random) -> float:
    sample = draws.choices(pairs, k=len(pairs))
    seconds, plain = zip(*sample, strict=True)
    return statistics.median(seconds) / statistics.median(plain)


def compare(
    steps: Mapping[str, Step],
    *,
    plain: str,
    check: Callable[[str, object], Verdict],
    baselines: Mapping[str, str] | None = None,
    timed: bool = True,
    **options,
) -> dict[str, Result]:
    """Checks every step once, then times the right ones against the plain step.

    Args:
        steps: what to time, by provider; each call is one whole step.
        plain: the name of the step that the others are divided by.
        check: judges a provider's answer, before anything is timed.
        baselines: the plain step of a provider that needs another one than `plain`.
        timed: whether to time at all, or to check only.
        **options: of `interleave`.

    Raises:
        RuntimeError: when a plain step is wrong: then nothing can be compared.
    """
    baselines = baselines or {}
    results = {name: Result(name, step=step) for name, step in steps.items()}
    for name, step in steps.items():
        try:
            answer = step()
        except FAILURES as failure:
            results[name].skipped = reason_of(failure)
        else:
            results[name].verdict = check(name, answer)
    right = {
        name: step
        for name, step in steps.items()
        if results[name].verdict and results[name].verdict.ok
    }
    for name in {plain, *baselines.values()} - right.keys():
        said = results[name].skipped or results[name].verdict
        raise RuntimeError(f"The plain step {name!r} is {said}.")
    if not timed:
        return results
    times = interleave(right, plain=plain, **options)
    for name, seconds in times.items():
        baseline = times[baselines.get(name, plain)]
        results[name].seconds = [s for s in seconds if s is not None]
        results[name].plain_seconds = [s for s in baseline if s is not None]
        results[name].ratio = ratio(seconds, baseline)
    return results
