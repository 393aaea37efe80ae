"""A run of the tables: what it plans, what it keeps, and how memory gets its cells."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import memory_cells, tables
from benchmarks.gradients import compare_gradients
from benchmarks.gradients_oracle import sample_truth
from benchmarks.markdown import TITLES
from benchmarks.plan import COLUMNS, FULL, QUICK, QUICK_COLUMNS, blocks
from benchmarks.workloads import WORKLOADS, Recipe, build, freeze_norms

TABLES = list(TITLES)


@pytest.fixture
def tiny(monkeypatch):
    """A workload of two layers and a norm, known to the tables."""

    def model():
        return torch.nn.Sequential(
            torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 10)
        )

    def data():
        return torch.randn(6, 5), torch.randint(10, (6,))

    monkeypatch.setitem(WORKLOADS, "tiny", Recipe(model, data))
    for table in ("norms", "second_moments", "memory"):
        monkeypatch.setitem(COLUMNS, table, ("tiny",))
    return build("tiny")


def options(tmp_path, *words):
    common = ["--quick", "--providers", "fastminima,vmap"]
    parsed = tables._parser().parse_args([*common, *words])
    parsed.workloads, parsed.output = ["tiny"], tmp_path / "record.json"
    return parsed


def test_everything_is_planned_once_and_by_workload():
    work = blocks(TABLES, None, quick=False)
    pairs = [(block.table, block.column) for block in work]
    assert sorted(pairs) == sorted((t, c) for t in TABLES for c in COLUMNS[t])
    workloads = [block.workload for block in work]
    assert workloads == sorted(workloads, key=list(WORKLOADS).index)
    first = [block.table for block in work if block.workload == "W1"]
    assert first.index("norms") < first.index("memory")
    assert set(FULL) == set(QUICK) == set(COLUMNS) == set(TABLES)


def test_memory_and_second_moments_are_taken_of_all_workloads():
    """But of W6, whose peers do not fit beside each other."""
    assert COLUMNS["memory"] == (*COLUMNS["second_moments"], "W6") == tuple(WORKLOADS)


def test_a_full_run_is_estimated_within_forty_minutes():
    full, quick = (blocks(TABLES, None, quick=q) for q in (False, True))
    assert 600 < sum(block.seconds for block in full) < 40 * 60
    assert sum(block.seconds for block in quick) < 10 * 60
    assert {block.column for block in quick} <= set(QUICK_COLUMNS)
    (one,) = blocks(["memory"], ["W6"], quick=True)
    assert (one.table, one.column) == ("memory", "W6")


def test_the_truth_of_some_parameters_is_that_of_freezing_the_others(tiny):
    frozen = freeze_norms(tiny.fresh())
    of_some, alone = sample_truth(tiny).of(frozen.parameters), sample_truth(frozen)
    torch.testing.assert_close(of_some.norms, alone.norms)
    assert of_some.gradient.keys() == alone.gradient.keys() != tiny.parameters.keys()
    for name, moments in alone.second_moments.items():
        torch.testing.assert_close(of_some.second_moments[name], moments)


def test_checking_only_times_nothing(tiny):
    results = compare_gradients(tiny, "norms", ["vmap"], timed=False)
    assert results["vmap"].verdict.ok and not results["vmap"].is_timed


def test_memory_trusts_what_other_tables_have_found(tiny, monkeypatch):
    asked = []

    def growth(column, measure, name, settings, threads):
        asked.append((measure, name, settings))
        return {"growth": 3.0, "first": 2.0}

    monkeypatch.setattr(memory_cells, "peak_growth", growth)
    monkeypatch.setattr(memory_cells, "compare_gradients", None)
    right = {"right": True, "settings": {"chunk": 4}, "note": "chunk 4"}
    wrong = {"right": False, "worst_error": 0.3, "settings": {}, "note": ""}
    known = {
        "norms": {"plain": {}, "vmap": right, "opacus-ghost": wrong},
        "second_moments": {"plain": {}, "vmap": {"skipped": "failed: no rule"}},
    }
    cells = memory_cells.memory_cells(
        "tiny",
        known,
        names=["vmap", "opacus-ghost"],
        threads=1,
        truth=None,
        progress=lambda text: None,
    )
    assert asked == [("norms", "plain", {})] * 2 + [("norms", "vmap", {"chunk": 4})] * 2
    assert cells["vmap"]["growth"] == 3.0 and len(cells["vmap"]["runs"]) == 2
    assert cells["opacus-ghost"] is wrong
    assert cells["vmap second_moments"]["skipped"] == "failed: no rule"


def test_slow_processes_are_not_repeated(monkeypatch):
    now = iter(range(0, 1000, 10))
    monkeypatch.setattr(
        memory_cells, "time", SimpleNamespace(monotonic=lambda: next(now))
    )
    monkeypatch.setattr(memory_cells, "peak_growth", lambda *_: {"growth": 1.0})
    found = memory_cells._growth("W1", "norms", "plain", {}, 1, 2)
    assert len(found["runs"]) == 1


def test_a_record_is_kept_after_each_column(tiny, tmp_path, monkeypatch):
    """What stops the run at its second table leaves the first in the file."""
    chosen = options(tmp_path, "--tables", "norms,memory")
    record = tables.start(chosen)
    path = tables.save(record, chosen.output)

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tables, "memory_cells", stopped)
    tables.measure(record, chosen, keep=lambda: tables.save(record, path))
    kept = json.loads(path.read_text())
    assert list(kept["tables"]) == ["norms"]
    assert kept["tables"]["norms"]["tiny"]["fastminima"]["right"]
    assert "| **fastminima** |" in tables.render(kept)


def test_a_column_that_fails_is_named_and_the_others_go_on(tiny, tmp_path, monkeypatch):
    chosen = options(tmp_path, "--tables", "norms,second_moments")
    record = tables.start(chosen)
    compare = tables.compare_gradients

    def failing(workload, table, *arguments, **named):
        if table == "norms":
            raise RuntimeError("the plain step is wrong")
        return compare(workload, table, *arguments, **named)

    monkeypatch.setattr(tables, "compare_gradients", failing)
    tables.measure(record, chosen, keep=lambda: None)
    assert "plain step" in record["failed"]["norms tiny"]
    assert list(record["tables"]) == ["second_moments"]
