"""A stage that runs the suites of whole models on the GPU, and what they found."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

from benchmarks.records import HERE

__all__ = ["FOLDERS", "WORKERS", "command", "reported", "suites", "workers"]

ROOT = HERE.parent
FOLDERS = ("capture", "curvature", "spectrum", "optim")
WORKERS = "FASTMINIMA_TEST_WORKERS"  # in the environment: how many processes
_LINES = 4  # of each error
_TO_REPORT = 20.0  # seconds that pytest gets to write down what it has found


def suites(seconds: float, device: str = "cuda") -> dict:
    """Runs capture, curvature, spectrum and optim with models and batches there."""
    return reported(lambda report: command(device, report), seconds) | {
        "device": device
    }


def reported(words: Callable[[Path], list[str]], seconds: float) -> dict:
    """What pytest found, also where it was interrupted for time.

    Args:
        words: the command, of the file that pytest writes its report to.
        seconds: for everything.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status, said = _run(words(report), seconds)
        found = read_report(report)
    found["ok"] = status == 0 and found["counts"].get("passed", 0) > 0
    if not report_is_enough(found):
        found["said"] = said[-4000:]
    return found | {"status": status, "workers": workers()}


def workers() -> int:
    """Processes that share the device: as `-n` says, or half the cores.

    One without pytest-xdist.
    """
    if importlib.util.find_spec("xdist") is None:
        return 1
    if asked := os.environ.get(WORKERS):
        return max(1, int(asked))
    return max(1, (os.cpu_count() or 2) // 2)


def command(device: str, report: Path) -> list[str]:
    """How the suites are run."""
    words = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in FOLDERS)]
    words += ["--device", device, "-q", "--tb=short", "-p", "no:cacheprovider"]
    words += [f"--junitxml={report}", "--durations=10"]
    if workers() > 1:
        words += ["-n", str(workers())]
    return words


def _run(words: list[str], seconds: float) -> tuple[int | None, str]:
    """The exit status, None where time ran out, and what was printed."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # What runs in the background hands down an ignored Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        said, _ = process.communicate(timeout=max(1.0, seconds - _TO_REPORT))
        return process.returncode, said
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest writes its report then
    try:
        said, _ = process.communicate(timeout=_TO_REPORT)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
    return None, said


def report_is_enough(found: dict) -> bool:
    """Whether the report says what went wrong, if anything did."""
    return found["ok"] or bool(found["failed"])


def read_report(report: Path) -> dict:
    """Counts, the tests that failed with their errors' first lines, and times."""
    found: dict = {"counts": {}, "failed": {}, "skipped": {}, "seconds": {}}
    if not report.exists():
        return found
    for case in ET.parse(report).iter("testcase"):
        outcome, problem = _outcome(case)
        counts = found["counts"]
        counts[outcome] = counts.get(outcome, 0) + 1
        module = case.get("classname", "").removeprefix("tests.")
        seconds = found["seconds"]
        spent = seconds.get(module, 0.0) + float(case.get("time", 0))
        seconds[module] = round(spent, 2)
        name = f"{module}::{case.get('name')}"
        if outcome in ("failure", "error"):
            found["failed"][name] = _first_lines(problem)
        elif outcome == "skipped":
            why = problem.get("message", "") if problem is not None else ""
            found["skipped"][why] = found["skipped"].get(why, 0) + 1
    return found


def _outcome(case: ET.Element) -> tuple[str, ET.Element | None]:
    for outcome in ("failure", "error", "skipped"):
        problem = case.find(outcome)
        if problem is not None:
            return outcome, problem
    return "passed", None


def _first_lines(problem: ET.Element | None) -> list[str]:
    """What an error says first, then where it was raised."""
    if problem is None:
        return []
    message = problem.get("message", "").splitlines()[:_LINES]
    places = [
        line
        for line in (problem.text or "").splitlines()
        if ".py:" in line and not line.startswith("E ")
    ]
    return [line[:300] for line in (*message, *places[-2:])]
