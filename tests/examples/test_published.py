"""The records in the repository: verdicts that can fail, tables that agree."""

import ast
import random
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from examples.catalog import EXPERIMENTS
from examples.engine import conclude, provenance, publish
from examples.engine.outcome import HELD, UNDECIDED

EXAMPLES = Path(publish.__file__).resolve().parents[1]
PUBLISHED = [e for e in EXPERIMENTS.values() if publish.status(e) != "not run"]
PRESETS = ("quick", "laptop", "paper")


@pytest.fixture(scope="module")
def conclusions():
    return {e.id: publish.published(e) for e in PUBLISHED}


def test_every_table_is_that_of_the_records():
    assert publish.check() == []


def test_what_is_committed_is_small():
    kinds = ("*/records/*", "*/figures/*")
    sizes = [p.stat().st_size for kind in kinds for p in EXAMPLES.glob(kind)]
    assert sum(sizes) <= 5e6


@pytest.mark.parametrize("e", PUBLISHED, ids=lambda e: e.id)
def test_of_records_made_to_fail_nothing_is_held(e, conclusions):
    c = conclusions[e.id]
    names = e.nulls(c.rows, 0)
    assert names, "every experiment says what would be false of its records"
    for seed in range(5):
        for name, rows in e.nulls(c.rows, seed).items():
            verdict = e.judge(c.settings, rows, c.expected)
            assert verdict.outcome != HELD, f"{name}: {verdict}"


@pytest.mark.parametrize("e", PUBLISHED, ids=lambda e: e.id)
def test_of_half_of_the_runs_nothing_is_decided(e, conclusions):
    c = conclusions[e.id]
    rows = random.Random(0).sample(c.rows, len(c.rows) // 2)
    assert e.judge(c.settings, rows, c.expected).outcome == UNDECIDED
    assert conclude.conclude(e, c.settings, []).verdict.outcome == UNDECIDED
    plt.close(e.draw(c.settings, rows))


@pytest.mark.parametrize("e", PUBLISHED, ids=lambda e: e.id)
def test_the_verdict_does_not_depend_on_the_order_of_the_rows(e, conclusions):
    c = conclusions[e.id]
    rows = random.Random(0).sample(c.rows, len(c.rows))
    assert e.judge(c.settings, rows, c.expected).outcome == c.verdict.outcome


@pytest.mark.parametrize("e", PUBLISHED, ids=lambda e: e.id)
def test_enough_seeds(e, conclusions):
    verdict = conclusions[e.id].verdict
    assert all(len(f.claim.values) >= 5 for f in verdict.findings)


@pytest.mark.parametrize("e", EXPERIMENTS.values(), ids=lambda e: e.id)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_grid_of_distinct_tasks(e, preset):
    for dataset in e.preferred(preset) or ("",):
        settings = e.settings(preset, dataset)
        assert (settings.preset, settings.dataset) == (preset, dataset)
        tasks = e.tasks(settings)
        assert len({str(task) for task in tasks}) == len(tasks) > 0
        assert e.expected(settings) > 0


@pytest.mark.parametrize("e", EXPERIMENTS.values(), ids=lambda e: e.id)
def test_every_experiment_has_a_place_in_a_readme(e):
    texts = [p.read_text() for p in (EXAMPLES / e.folder).glob("README*.md")]
    assert any(f"<!-- results:{e.id} -->" in text for text in texts)


def definitions(path):
    """Lines of a module's functions and classes, by dotted name."""
    module = ".".join(path.relative_to(EXAMPLES.parent).with_suffix("").parts)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield f"{module}.{node.name}", range(node.lineno, node.end_lineno + 1)


def test_the_type_checker_is_overruled_only_in_code_that_records_are_of():
    """Other code has its types mended: an edit there makes no record outdated."""
    kept = {n for e in EXPERIMENTS.values() for n in provenance.hashed_code(e.run)}
    overruled = 0
    for path in sorted(EXAMPLES.rglob("*.py")):
        lines = path.read_text().splitlines()
        at = [i for i, line in enumerate(lines, 1) if "# pyright: ignore" in line]
        spans = [lines for name, lines in definitions(path) if name in kept]
        assert [i for i in at if not any(i in s for s in spans)] == [], path
        overruled += len(at)
    assert overruled
