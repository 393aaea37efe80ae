"""The memory table: peak growth of all that is right on a workload."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.gradients import PLAIN_WITHOUT_NORMS, compare_gradients
from benchmarks.gradients_oracle import Truth
from benchmarks.memory import peak_growth
from benchmarks.providers import by_name, providers_of
from benchmarks.records import summary
from benchmarks.workloads import build

__all__ = ["memory_cells"]

MEASURES = ("norms", "second_moments")
_QUICKLY = 8.0  # a process that takes no longer than these seconds is repeated


def memory_cells(
    column: str,
    known: dict[str, dict],
    *,
    names: Sequence[str] | None,
    threads: int,
    truth: Callable[[], Truth],
    progress: Callable[[str], None],
    repeats: int = 2,
) -> dict[str, dict]:
    """Cells of one workload; those of second moments are named after their measure.

    Args:
        column: the workload.
        known: by measure, the cells that other tables have found already.
        names: of the providers; None for all.
        threads: of every process.
        truth: called where providers have to be checked first.
        progress: told what is being measured.
        repeats: processes that are averaged where they are quick.
    """

    def growth(measure: str, name: str, settings: dict) -> dict:
        progress(f"{name} {measure}")
        return _growth(column, measure, name, settings, threads, repeats)

    cells = {"plain": growth("norms", "plain", {})}
    if any(column in by_name(name).without_norms for name in names or _every()):
        cells[PLAIN_WITHOUT_NORMS] = growth("norms", "plain", {"without_norms": True})
    for measure in MEASURES:
        checked = known.get(measure) or _checked(column, measure, names, truth())
        for name, cell in checked.items():
            if name.startswith("plain"):
                continue
            label = name if measure == "norms" else f"{name} {measure}"
            cells[label] = _cell(column, measure, name, cell, growth)
    return cells


def _every() -> list[str]:
    return [p.name for measure in MEASURES for p in providers_of(measure)]


def _checked(column, measure, names, truth) -> dict[str, dict]:
    """Who is right, and the best setting of each."""
    results = compare_gradients(build(column), measure, names, truth=truth, timed=False)
    return {name: summary(result) for name, result in results.items()}


def _cell(column, measure, name, cell, growth) -> dict:
    if cell.get("skipped") or not cell["right"]:
        return cell
    settings = dict(cell["settings"])
    baseline = {}
    if column in by_name(name).without_norms:
        settings["without_norms"] = True
        baseline = {"baseline": PLAIN_WITHOUT_NORMS}
    try:
        return growth(measure, name, settings) | {"note": cell["note"]} | baseline
    except RuntimeError as failure:
        said = str(failure).splitlines()
        return {"skipped": f"{said[0]} {said[-1]}"}


def _growth(column, measure, name, settings, threads, repeats) -> dict:
    runs: list[dict[str, float]] = []
    start = time.monotonic()
    while not runs or (
        len(runs) < repeats and time.monotonic() - start < _QUICKLY * len(runs)
    ):
        runs.append(peak_growth(column, measure, name, settings, threads))
    mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
    return {"right": True, "worst_error": 0.0, "runs": runs, **mean}
