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
from benchmarks.gpu import checks, steps, suites, timing
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
    for module in (checks, timing, steps):
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


def test_workloads_grow_and_are_checked(pretended):
    workload = steps.enlarged(build("W1"), 2, "cpu")
    assert workload.inputs.shape == (256, 784)
    assert int(workload.targets.max()) < 10
    step = steps.by_name("fastminima").measures["norms"](workload)
    norms = step()
    assert steps._worst_norm(norms, workload) < 1e-4
    assert steps._worst_norm(2 * norms, workload) > 0.5


def test_a_workload_is_timed_in_both_modes(pretended, monkeypatch):
    monkeypatch.setattr(steps, "FACTORS", {"W1": 1})
    row = steps._workload("W1", 0.1)
    assert row["right"] and row["batch"] == 128
    assert row["observe"]["value"] > 0 and row["fused"]["value"] > 0
