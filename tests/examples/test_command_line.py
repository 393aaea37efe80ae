"""`python -m examples`, as a user types it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "examples")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS}
OUTCOMES = ("HELD", "NOT HELD", "UNDECIDED")
DEADLINE = 300.0


def run(*arguments, out, **options):
    command = [sys.executable, "-m", "examples", *arguments, "--out", str(out)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        **options,
    )


def test_list_json(capsys):
    assert main(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"id", "paper", "claim", "status", "minutes"} <= found[0].keys()
    assert {e["status"] for e in found} <= {"run", "partly run", "not run"}
    ids = [e["id"] for e in found]
    assert len(ids) == len(set(ids))
    assert {"f1", "f2", "f3", "f4", "f5", "f6", "f7"} <= set(ids)


def test_list_for_people(capsys):
    assert main(["list"]) == 0
    assert re.search(r"^f1 +(run|not run)", capsys.readouterr().out, re.M)


def test_run_ends_with_the_verdict_and_does_nothing_twice(tmp_path):
    log = tmp_path / "log"
    arguments = ("run", "toy:EXPERIMENT", "--set", f'log="{log}"')
    first = run(*arguments, out=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1].startswith(OUTCOMES)
    assert "6.0/6 tasks" in first.stderr
    assert "left" in first.stderr or "<" in first.stderr
    assert len(log.read_text().splitlines()) == 6
    again = run(*arguments, out=tmp_path)
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert len(log.read_text().splitlines()) == 6
    (folder,) = tmp_path.glob("toy-*/")
    assert {"figure.png", "figure.pdf", "verdict.json"} <= {
        p.name for p in folder.iterdir()
    }


def test_json_is_all_of_the_output(tmp_path):
    found = run("run", "toy:EXPERIMENT", "--json", "--quiet", out=tmp_path)
    verdict = json.loads(found.stdout)
    assert verdict["outcome"] in OUTCOMES
    assert verdict["runs"] == verdict["expected"] == 12
    assert verdict["findings"][0]["interval"][0] < verdict["findings"][0]["mean"]
    assert found.stderr.strip().splitlines()[-1].startswith(OUTCOMES)


def test_seeds_are_chosen(tmp_path):
    found = run("run", "toy:EXPERIMENT", "--seeds", "3-5,9", "--quiet", out=tmp_path)
    assert "24 runs in 6 tasks" in found.stdout
    # Apart from a sweep with the seeds of the preset.
    assert [p.name for p in tmp_path.iterdir()] == ["toy-quick-seeds=3-5,9"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "f99"], r"No experiment 'f99'; there are f1, "),
        (["run", "toy:NOTHING"], "not an Experiment"),
        (["run", "f1", "--set", "colour"], "name=value"),
        (["run", "f1", "--set", "colour=1"], "no setting colour"),
        (["run", "f1", "--set", "rung=low"], r"rung is 0\.25 by default, got 'low'"),
        (["run", "f1", "--set", "hidden=50"], r"hidden is \[50, 50, 50\] by default"),
        (["run", "f1", "--seeds", "a-b"], "Seeds are written"),
        (["run", "f1", "--seeds", "3-1"], "No seed is in"),
        (["run", "f1", "--workers", "0"], "at least 1, got 0"),
        (["run", "f1", "--plot-only"], "Nothing of that was run"),
        (["run", "two-bowls", "--data", "digits"], "has no data set"),
        (["status", "nowhere"], "no folder nowhere"),
        (["worker", "nowhere"], r"No sweep\.json in nowhere"),
    ],
)
def test_mistakes_are_explained(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "run":
        arguments = [*arguments, "--out", str(tmp_path)]
    assert main(arguments) == 2
    assert re.search(words, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []  # and leaves nothing behind


def start(out, *arguments):
    command = [sys.executable, "-m", "examples", "run", "toy:EXPERIMENT"]
    command += ["--set", "pause=0.4", "--set", "tasks=300", "--out", str(out)]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A job in the background of a shell ignores Ctrl-C otherwise.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def claimants(out) -> set[int]:
    found = set()
    for path in out.glob("*/claims/*.*"):
        if path.stat().st_mtime > 0 and not path.name.startswith("."):
            found.add(json.loads(path.read_text())["pid"])
    return found


def wait_until(condition):
    limit = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


def test_interrupted_it_says_what_is_kept_and_goes_on(tmp_path):
    process = start(tmp_path, "--quiet")
    wait_until(lambda: list(tmp_path.glob("*/records/*.jsonl")))
    pids = claimants(tmp_path)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    kept = int(re.search(r"Interrupted: (\d+) of 300 tasks are kept", errors)[1])
    assert kept >= 1
    for pid in pids:
        wait_until(lambda pid=pid: is_gone(pid))
    # What they had in hand is free at once, and was not lost for its own fault.
    assert claimants(tmp_path) <= pids
    again = run("run", "toy:EXPERIMENT", "--set", "pause=0.4", "--set", "tasks=300",
                "--plot-only", out=tmp_path)  # fmt: skip
    assert f"{kept} finished before" in again.stdout


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks in /proc")
def test_killed_it_takes_its_workers_with_it(tmp_path):
    process = start(tmp_path, "--quiet")
    wait_until(lambda: claimants(tmp_path))
    pids = claimants(tmp_path)
    process.kill()
    process.communicate(timeout=DEADLINE)
    for pid in pids:
        wait_until(lambda pid=pid: is_gone(pid))


def test_a_worker_started_by_hand_does_what_is_left(tmp_path):
    process = start(tmp_path, "--quiet", "--workers", "1", "--set", "tasks=4")
    wait_until(lambda: list(tmp_path.glob("*/sweep.json")))
    process.kill()
    process.communicate(timeout=DEADLINE)
    worker = subprocess.run(
        [sys.executable, "-m", "examples", "worker", str(tmp_path)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert worker.returncode == 0, worker.stderr
    assert "none is left" in worker.stdout
    assert main(["status", str(tmp_path)]) == 0


def test_the_experiment_of_the_readme_runs(tmp_path):
    text = (ROOT / "examples" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "mine.py").write_text(code)
    found = subprocess.run(
        [sys.executable, "-m", "examples", "run", "mine:EXPERIMENT", "--out", "."],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert found.stdout.splitlines()[-1].startswith("HELD: the value 1.2 ["), found


def test_report_is_one_page_that_needs_nothing_else(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", "--out", str(page)]) == 0
    text = page.read_text()
    assert text.count("<section") == text.count("<h2>") >= 4
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "experiments in" in capsys.readouterr().out
