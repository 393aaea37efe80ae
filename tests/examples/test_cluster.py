"""Workers started by submitit and by Ray, one of them killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from examples.engine import launch
from examples.engine.folder import Folder

DEADLINE = 300.0
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def _toy_is_found_by_workers(monkeypatch):
    paths = [str(launch.ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def make(path, **overrides):
    return Folder.create(path / "sweep", "toy:EXPERIMENT", "quick", "", overrides)


def kill_one(sweep) -> int:
    """Kill a process that is at a task."""
    limit = time.monotonic() + DEADLINE
    while time.monotonic() < limit:
        for path in (sweep.path / "claims").glob("[!.]*"):
            if path.stat().st_mtime > 0:
                pid = json.loads(path.read_text())["pid"]
                os.kill(pid, signal.SIGKILL)
                return pid
        time.sleep(0.05)
    raise AssertionError("no worker took up a task")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["submitit-local", "ray"])
def test_a_worker_is_killed_and_all_tasks_are_done(where, tmp_path):
    pytest.importorskip(where.partition("-")[0])
    sweep = make(tmp_path, tasks=12, pause=0.5)
    with launch.cluster(where, [sweep.path], 2) as workers:
        killed = kill_one(sweep)
        launch.watch_until_done([sweep], workers, quiet=True, patience=0.1)
    found = sweep.read()
    assert len({r["task"] for r in found}) == len(found) == 12
    assert all(r["status"] == "finished" for r in found)
    assert sweep.state().finished == 12
    assert killed != os.getpid()
    assert print.__module__ == "builtins"


def test_another_cluster_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match="No cluster 'pbs'"),
        launch.cluster("pbs", [make(tmp_path).path], 1),
    ):
        pass


def test_what_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with (
        pytest.raises(ImportError, match=r"fastminima\[cluster\]"),
        launch.cluster("ray", [make(tmp_path).path], 1),
    ):
        pass
