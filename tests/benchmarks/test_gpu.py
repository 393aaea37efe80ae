"""The script for a GPU: what can be known of it without one."""

import importlib
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import (
    checks,
    launches,
    models,
    steps,
    suites,
    timing,
    training,
    zoo,
)
from benchmarks.workloads import build
from tools.kernels.cases import cases

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a CUDA device"
)


@without_gpu
def test_without_a_gpu_it_says_why(capsys):
    assert gpu.main([]) == 2
    assert "CUDA" in capsys.readouterr().out


def test_dry_run_lists_the_stages(capsys):
    assert gpu.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(stage.name in said and stage.what in said for stage in gpu.STAGES)
    together = [stage for stage in gpu.STAGES if stage.name in gpu.DEFAULT]
    assert sum(stage.seconds for stage in together) <= 600 - 30
    assert all(stage.seconds <= 600 - 30 for stage in gpu.STAGES)


def test_unknown_stages_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--stages", "coffee"])
    assert "choose from tests" in capsys.readouterr().err


def test_every_stage_has_its_function():
    for stage in gpu.STAGES:
        module, function = stage.module.split(".")
        found = importlib.import_module(f"benchmarks.gpu.{module}")
        assert callable(getattr(found, function))


@without_gpu
@pytest.mark.slow
def test_a_stage_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    named = {stage.name: stage for stage in gpu.STAGES}
    found = gpu.run_stages([named["rounding"], named["sanitizer"]], 300, tmp_path)
    assert list(found) == ["rounding", "sanitizer"]
    assert not found["rounding"]["ok"]
    assert "status 1" in found["rounding"]["error"]
    assert "CUDA" in found["rounding"]["said"]
    assert "stage_seconds" in found["sanitizer"]
    assert not list(tmp_path.iterdir())


def test_stages_end_with_the_budget(tmp_path):
    found = gpu.run_stages(list(gpu.STAGES), 0, tmp_path)
    assert {r["error"] for r in found.values()} == {"no time was left"}


_FAILING = """
import pytest

def test_right():
    pass

def test_wrong():
    value = 3
    assert value == 4, "the value is off"

@pytest.mark.skip(reason="no such device")
def test_skipped():
    pass
"""


def test_suites_record_counts_and_what_failed(tmp_path, monkeypatch):
    (tmp_path / "test_some.py").write_text(_FAILING)
    monkeypatch.setattr(suites, "ROOT", tmp_path)

    def command(device, report):
        words = suites.sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"
        return [*words, str(tmp_path)]

    monkeypatch.setattr(suites, "command", command)
    found = suites.suites(120)
    assert not found["ok"] and found["status"] == 1
    assert found["counts"] == {"passed": 1, "failure": 1, "skipped": 1}
    ((name, lines),) = found["failed"].items()
    assert name == "test_some::test_wrong"
    assert "the value is off" in lines[0] and "test_some.py:9" in lines[-1]
    assert found["skipped"] == {"no such device": 1}
    assert "test_some" in found["seconds"]


class Patient(subprocess.Popen):
    """Time is out for it once its second test runs, however busy the machine is."""

    began: Path

    def communicate(self, input=None, timeout=None):
        if self.began is not None:
            while not self.began.exists() and self.poll() is None:
                time.sleep(0.02)
            self.began = None
            raise subprocess.TimeoutExpired("pytest", timeout)
        return super().communicate(timeout=120)


def test_suites_that_take_too_long_tell_what_they_found(tmp_path, monkeypatch):
    began = tmp_path / "began"
    (tmp_path / "test_slow.py").write_text(
        "import pathlib, time\n"
        "def test_a(): pass\n"
        f"def test_b(): pathlib.Path({str(began)!r}).touch(); time.sleep(300)\n"
    )
    monkeypatch.setattr(Patient, "began", began, raising=False)
    monkeypatch.setattr(suites.subprocess, "Popen", Patient)
    monkeypatch.setattr(suites, "ROOT", tmp_path)
    monkeypatch.setattr(
        suites,
        "command",
        lambda device, report: [
            *(suites.sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"),
            str(tmp_path),
        ],
    )
    found = suites.suites(600)
    assert not found["ok"] and found["status"] is None
    assert found["counts"]["passed"] >= 1  # pytest counts the interrupted one too
    assert "said" in found


def test_suites_run_on_the_device_asked_for(tmp_path):
    words = suites.command("cuda", tmp_path / "report.xml")
    assert words[words.index("--device") + 1] == "cuda"
    assert all((suites.ROOT / word).is_dir() for word in words if "tests/" in word)
    assert ("-n" in words) == (suites.workers() > 1)


def test_gpu_tests_are_run_in_workers_and_reported(monkeypatch):
    asked = []
    monkeypatch.setenv(suites.WORKERS, "3")

    def run(words, seconds):
        asked.append(words)
        (report,) = (w.split("=")[1] for w in words if w.startswith("--junitxml"))
        Path(report).write_text(
            '<testsuite><testcase classname="tests.a" name="b" time="1"/></testsuite>'
        )
        return None, "interrupted"

    monkeypatch.setattr(suites, "_run", run)
    found = checks.tests(60)
    assert found["counts"] == {"passed": 1} and not found["ok"]
    assert found["said"] == "interrupted"
    ((*words,),) = asked
    assert words[words.index("-m", 3) + 1] == "gpu"
    if suites.workers() > 1:
        assert words[words.index("-n") + 1] == "3"


class _Event:
    """Stands for an event: a millisecond after the one before it."""

    count = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        _Event.count += 1
        self.at = _Event.count

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.fixture
def pretended(monkeypatch):
    """The stages on the CPU, with what they ask of CUDA answered by stand-ins."""
    cuda = {
        "synchronize": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 3 << 20,
        "reset_peak_memory_stats": lambda: None,
        "Event": _Event,
        "Stream": lambda: SimpleNamespace(synchronize=lambda: None),
        "stream": lambda stream: nullcontext(),
        "_sleep": lambda cycles: None,
    }
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    for module in (checks, timing):
        monkeypatch.setattr(module, "DEVICE", "cpu")


def _few(backend):
    wanted = ("row_sq_norms", "sq_norm")
    found = [c for c in cases("reference") if c.op.name in wanted]
    return found if backend == "triton" else []


def _broken(case):
    """The case, with an implementation that returns zeros."""
    op = SimpleNamespace(
        name=case.op.name,
        reference=case.op.reference,
        on=lambda backend, *key: lambda *args: args[0].sum(dim=(1, 2)) * 0,
        backends=lambda *key: ("triton",),
    )
    return SimpleNamespace(
        op=op, key=case.key, make=case.make, dtype=case.dtype, has=lambda b: True
    )


def test_kernels_are_timed_and_compared(pretended, monkeypatch):
    monkeypatch.setattr(timing, "cases", _few)
    monkeypatch.setattr(timing, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(timing, "_BACKENDS", ("reference",))
    found = timing.kernels(5.0)
    assert found["ok"] and not found["left"], found
    row = found["cases"]["sq_norm 3200x3125 float32"]
    assert row["bytes"] == 40_000_000
    assert row["floor_us"] == pytest.approx(3 + 40 / 3)
    assert row["reference"]["median_us"] == 1000
    assert row["reference"]["peak_mib"] == 3
    assert row["reference"]["error_against_float64"] < 1e-5


def test_a_wrong_kernel_is_not_timed(pretended):
    case = next(c for c in cases("reference") if c.op.name == "gram_sq_norms")
    small = _broken(case)
    a, g = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    small.make = lambda new: (a, g)
    row = timing._case(small, 1.0, torch.empty(1))
    assert row["triton"]["verdict"] == "wrong"
    assert "median_us" not in row["triton"]


def test_streams_compare_every_kernel(pretended, monkeypatch):
    monkeypatch.setattr(checks, "_kernels", lambda: [(_few("triton")[0], "reference")])
    assert checks.streams(1.0) == {"ok": True, "checked": 1, "wrong": {}}


def test_small_cases_still_belong_together(pretended, monkeypatch):
    """The reference raises where capped arguments do not fit each other."""
    first = {c.op.name: c for c in reversed(list(cases("reference")))}
    pairs = [(case, "reference") for case in first.values()]
    monkeypatch.setattr(checks, "_kernels", lambda: pairs)
    checks.small()


def test_workloads_grow_and_are_checked():
    workload = steps.enlarged(build("W1"), 2, "cpu")
    assert workload.inputs.shape == (256, 784)
    assert int(workload.targets.max()) < 10
    step = steps.by_name("fastminima").measures["norms"](workload)
    norms = step()
    assert steps._worst_norm(norms, workload, "cpu") < 1e-4
    assert steps._worst_norm(2 * norms, workload, "cpu") > 0.5


def test_a_workload_is_timed_in_both_modes(monkeypatch):
    """And W2 in the run from the command line below."""
    monkeypatch.setattr(steps, "SMOKE", ("W1", "W1L"))
    kept = []
    found = steps.steps(
        0.4, lambda found: kept.append(list(found["workloads"])), **TINY
    )
    assert found["ok"], found
    row = found["workloads"]["W1"]
    assert row["right"] and row["batch"] == 128
    assert row["observe"]["value"] > 0 and row["fused"]["value"] > 0
    assert kept == [["W1"], ["W1", "W1L"]]
    assert steps.FACTORS.keys() == steps.WORKLOADS.keys()


TINY = {"device": "cpu", "size": "smoke"}
LABEL = "ViT-B/16, autocast"


@pytest.fixture
def few_recipes(monkeypatch):
    recipe = next(r for r in zoo.RECIPES if r.name == "ViT-B/16")
    monkeypatch.setattr(training, "RECIPES", (recipe,))
    monkeypatch.setattr(training, "_SMOKE", 0.1)
    monkeypatch.setattr(training, "_HOST_ROUNDS", 3)
    return recipe


def test_training_is_checked_timed_and_kept_as_it_goes(few_recipes, monkeypatch):
    monkeypatch.setattr(training, "PEERS", ("vmap", "fastminima"))
    kept = []
    found = training.training(
        1, lambda found: kept.append({**found["models"][LABEL]}), **TINY
    )
    row = found["models"][LABEL]
    assert found["ok"], row
    for name in training._OURS:
        assert row[name]["right"] and row[name]["value"] > 0
    assert row["every=10"]["value"] > 0
    assert {"plain_ms", "host"}.isdisjoint(kept[0])
    assert "every=10" not in kept[1] and "host" in kept[-1]
    host = row["host"]
    assert host["uses"] == 5 + 2 * 6 and host["observe"]["launches"] is None
    assert host["fused"]["operators_a_use"] > 0 and "us_a_use" in host["fused"]
    assert {p: r["right"] for p, r in row["peers"].items()} == {
        "vmap": True,
        "fastminima": True,
    }


def _planted(measure, change):
    """A provider of ours that is wrong, or raises, by one measure."""
    ours = steps.by_name("fastminima")

    def make(workload):
        step = ours.measures[measure](workload)
        return lambda: change(step())

    return SimpleNamespace(measures=ours.measures | {measure: make})


def _refuse(norms):
    raise RuntimeError("no rule for this")


@pytest.mark.parametrize(
    ("measure", "change", "said"),
    [
        ("norms", lambda norms: 1.1 * norms, None),
        ("norms", lambda norms: norms[:-1], None),
        ("second_moments", lambda m: {k: 1.1 * v for k, v in m.items()}, None),
        ("norms", _refuse, "no rule for this"),
    ],
)
def test_what_is_wrong_is_not_timed(few_recipes, monkeypatch, measure, change, said):
    planted = _planted(measure, change)
    monkeypatch.setattr(
        training, "by_name", lambda n: planted if n == "fastminima-fused" else named(n)
    )
    named = steps.by_name
    row: dict = {}
    training._ours(few_recipes, row, 0.1, "cpu", "smoke", lambda: None)
    key = "fused" if measure == "norms" else "second moments, fused"
    assert not row["ok"] and not row[key]["right"] and "value" not in row[key]
    assert row["observe"]["right"] and row["observe"]["value"] > 0
    assert said is None or said in row[key]["error"]


def test_absent_peers_are_named(few_recipes, monkeypatch):
    from benchmarks.providers import Provider

    absent = Provider("absent", "absent", {}, module="no_such", package="nsl==1")
    monkeypatch.setattr(training, "by_name", lambda name: absent)
    row: dict = {}
    training._peers(few_recipes, row, 10, "cpu", "smoke", lambda: None)
    assert {r["skipped"] for r in row["peers"].values()} == {
        "not installed: pip install nsl==1"
    }


def test_training_without_time_says_what_it_left_out(few_recipes):
    found = training.training(1, device="cpu", size="full")
    assert found["models"][LABEL] == {"left out": ["ours", "peers"]}
    assert found["bad"] == [LABEL]


@pytest.mark.parametrize("recipe", zoo.RECIPES, ids=lambda r: f"{r.name} {r.precision}")
def test_networks_are_those_they_are_named_after(recipe):
    millions = {"GPT-2": 124.4, "Llama": 245.9, "ViT-B/16": 86.6, "ResNet-50": 25.6}
    with torch.device("meta"):
        model = recipe.make("full")
        inputs, _ = recipe.data("full")
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions[recipe.name.split()[0]], abs=0.05)
    assert len(inputs) in (8, 32, 64)
    small = zoo.build(recipe, "smoke", "cpu")
    assert small.losses().shape == (small.batch_size,)
    again = zoo.build(recipe, "smoke", "cpu")
    assert torch.equal(small.losses(), again.losses())


def test_narrow_models_have_all_layers():
    for recipe in zoo.RECIPES:
        with torch.device("meta"):
            full, narrow = recipe.make("full"), recipe.make("narrow")
        names = [[name for name, _ in m.named_parameters()] for m in (full, narrow)]
        assert names[0] == names[1]


def test_operators_of_a_step_are_counted():
    x, y = torch.ones(2), torch.ones(2)
    found = launches.started(lambda: x + y + y, "cpu")
    assert found["operators"] == 2 and found["launches"] is None


def test_kernels_that_the_profiler_does_not_see_are_counted_by_a_graph(monkeypatch):
    nothing = {"operators": 5, "launches": 0, "how": "profiler"}
    monkeypatch.setattr(launches, "_by_profiler", lambda step, device: nothing)
    monkeypatch.setattr(launches, "_by_graph", lambda step: 7)
    assert launches.started(lambda: None, "cuda")["launches"] == 7

    def refuse(step):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(launches, "_by_graph", refuse)
    found = launches.started(lambda: None, "cuda")
    assert found["launches"] is None and "not permitted" in found["how"]


def test_models_that_cannot_be_made_are_named(monkeypatch):
    def absent(device, size):
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(models, "MODELS", (models.Model("A", "float32", absent),))
    found = models.models(60, **TINY)
    assert found["left out"] == ["A, float32"]
    assert found["models"]["A, float32"]["skipped"].endswith("install transformers")


@pytest.mark.parametrize(
    "model", models.MODELS, ids=lambda m: f"{m.name} {m.precision}"
)
def test_models_are_looked_at(model, monkeypatch):
    if model.make.__qualname__.startswith("_language") or "ViT" in model.name:
        pytest.importorskip("transformers")
    monkeypatch.setattr(models, "_ROUNDS", 1)
    row = models._look_at(model, "cpu", "smoke")
    assert row["ok"], row


def test_as_many_workers_as_asked(monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setenv(suites.WORKERS, "5")
    assert suites.workers() == 5
    monkeypatch.delenv(suites.WORKERS)
    assert suites.workers() >= 1


@pytest.mark.slow
def test_a_smoke_run_from_the_command_line(tmp_path):
    words = "--stages", "steps", "--output", str(tmp_path)
    done = subprocess.run(
        [gpu.sys.executable, "-m", "benchmarks.gpu", "--smoke", *words],
        cwd=gpu.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["steps.json"]
    assert '"W2"' in (tmp_path / "steps.json").read_text()


def test_smoke_refuses_what_needs_a_gpu(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--smoke", "--stages", "kernels"])
    assert "need a GPU" in capsys.readouterr().err


def test_what_a_stage_kept_outlives_its_time(tmp_path, monkeypatch):
    """It wrote a part, then took too long: the part is in its record."""

    def late(command, **options):
        Path(command[-1]).write_text('{"ok": true, "models": {"A": {"ok": true}}}')
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(gpu.subprocess, "run", late)
    named = {stage.name: stage for stage in gpu.STAGES}
    written = []
    gpu.run_stages(
        [named["training"]], 300, tmp_path, lambda name, r: written.append((name, r))
    )
    ((name, record),) = written
    assert name == "training" and not record["ok"]
    assert record["models"] == {"A": {"ok": True}}
    assert "took more than" in record["error"]
    assert not list(tmp_path.iterdir())
