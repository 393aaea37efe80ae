"""Sweeps on disk: claimed once, killed at any moment, taken over, never repeated."""

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import toy

from examples.engine import folder as folders
from examples.engine import worker
from examples.engine.folder import Folder

DEADLINE = 300.0  # of what takes a second when nothing else runs


def make(path, **overrides):
    return Folder.create(path / "sweep", "toy:EXPERIMENT", "quick", "", overrides)


def forked(path: Path, most_lost: int = worker.MOST_LOST) -> int:
    """A worker in a process of its own, which has everything imported already."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            folders.WORKER = f"forked-{os.getpid()}"
            folders.HEARTBEAT = 0.05
            worker.WAIT = 0.02
            worker.MOST_LOST = most_lost
            worker.work([path])
            status = 0
        finally:
            os._exit(status)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def starts(log: Path) -> Counter:
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(int(line.split()[0]) for line in lines)


def test_all_tasks_are_run_once(tmp_path):
    log = tmp_path / "log"
    sweep = make(tmp_path, log=str(log))
    assert worker.work([sweep.path]) == 6
    assert worker.work([sweep.path]) == 0
    assert starts(log) == dict.fromkeys(range(6), 1)
    assert [row["seed"] for row in sweep.rows()] == [0, 1] * 6
    assert sweep.state() == folders.State(6, 6, 0, {})


def test_two_sweeps_on_one_folder_share_the_work(tmp_path):
    log = tmp_path / "log"
    sweep = make(tmp_path, log=str(log), tasks=40, pause=0.02)
    pids = [forked(sweep.path) for _ in range(4)]
    assert [ended(pid) for pid in pids] == [0] * 4
    assert starts(log) == dict.fromkeys(range(40), 1)
    assert len(sweep.read()) == 40


def test_killed_right_after_a_record_fifty_times_nothing_is_lost(tmp_path):
    """Another worker is at work as well; a killed one's task is taken over.

    One task after the other is let go on, so that there is always one to be killed at.
    """
    log, gate = tmp_path / "log", tmp_path / "gate"
    gate.mkdir()
    sweep = make(tmp_path, log=str(log), gate=str(gate), tasks=60)
    rng = random.Random(0)
    running = [forked(sweep.path, most_lost=1000) for _ in range(2)]
    for kills in range(50):
        (gate / str(kills)).touch()
        limit = time.monotonic() + DEADLINE
        while len(sweep.read()) <= kills:
            assert time.monotonic() < limit
            time.sleep(0.001)
        victim = running.pop(rng.randrange(2))
        os.kill(victim, signal.SIGKILL)
        ended(victim)
        running.append(forked(sweep.path, most_lost=1000))
    for number in range(50, 60):
        (gate / str(number)).touch()
    assert [ended(pid) for pid in running] == [0, 0]
    found = sweep.read()
    assert Counter(r["task"] for r in found) == dict.fromkeys(sweep.tasks, 1)
    assert all(r["status"] == "finished" for r in found)
    assert len(sweep.rows()) == 120
    # A killed worker had one task in hand at most.
    assert sum(starts(log).values()) <= 60 + 50


def stale(path: Path, **owner) -> None:
    """A claim as another machine's worker left it an hour ago."""
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, **owner}))
    os.utime(path, (time.time() - 3600,) * 2)


def test_a_claim_of_another_machine_holds_until_it_is_stale(tmp_path):
    sweep = make(tmp_path)
    key = next(iter(sweep.tasks))
    path = sweep.path / "claims" / f"{key}.0"
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1, "fraction": 0.25}))
    assert sweep.claim(key) is None
    assert sweep.state().running == {key: 0.25}
    stale(path)
    claim = sweep.claim(key)
    assert claim is not None
    assert claim.number == 1
    assert sweep.claim(key) is None


def test_a_claim_of_a_process_that_is_gone_is_taken_over_at_once(tmp_path):
    sweep = make(tmp_path)
    key = next(iter(sweep.tasks))
    pid = os.fork()
    if pid == 0:
        sweep.claim(key)
        os._exit(0)
    ended(pid)
    assert sweep.claim(key) is not None


def test_a_number_used_again_is_not_the_same_process(tmp_path):
    sweep = make(tmp_path)
    key = next(iter(sweep.tasks))
    claim = sweep.claim(key)
    content = json.loads(claim.path.read_text())
    claim.path.write_text(json.dumps({**content, "started": "long ago"}))
    assert sweep.claim(key) is not None


def test_a_worker_given_up_for_lost_writes_nothing(tmp_path):
    sweep = make(tmp_path)
    key = next(iter(sweep.tasks))
    slow = sweep.claim(key)
    stale(slow.path)
    assert sweep.claim(key) is not None
    assert not slow.is_mine()
    worker._record(slow, [{"seed": 0, "value": 1.0}], (0.0, 0.0))
    assert sweep.read() == []


def test_of_many_claims_at_once_one_is_granted(tmp_path):
    sweep = make(tmp_path)
    key = next(iter(sweep.tasks))
    gate = tmp_path / "gate"
    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            while not gate.exists():
                pass
            granted = sweep.claim(key) is not None
            if granted:
                (tmp_path / f"granted-{os.getpid()}").touch()
            while not (tmp_path / "over").exists():
                time.sleep(0.01)
            os._exit(0)
        pids.append(pid)
    gate.touch()
    limit = time.monotonic() + DEADLINE
    while not list(tmp_path.glob("granted-*")):
        assert time.monotonic() < limit
    time.sleep(0.2)
    granted = list(tmp_path.glob("granted-*"))
    (tmp_path / "over").touch()
    for pid in pids:
        ended(pid)
    assert len(granted) == 1


def test_what_raises_is_recorded_and_the_rest_goes_on(tmp_path, capfd):
    sweep = make(tmp_path, trouble="raise")
    assert worker.work([sweep.path]) == 6
    assert sweep.state().failed == 1
    failed = [r for r in sweep.read() if r["status"] == "failed"]
    assert [r["message"] for r in failed] == ["FloatingPointError: the loss is 1e40"]
    assert len(sweep.rows()) == 10
    assert "FloatingPointError" in capfd.readouterr().err


def test_what_takes_its_workers_along_is_given_up(tmp_path):
    sweep = make(tmp_path, trouble="die")
    codes = []
    while not codes or codes[-1] != 0:
        codes.append(ended(forked(sweep.path)))
        assert len(codes) < 10
    assert codes == [9] * 3 + [0]
    failed = [r["message"] for r in sweep.read() if r["status"] == "failed"]
    assert failed == ["3 workers were lost at it"]
    assert sweep.state().finished == 6


def test_what_hangs_is_ended_by_its_time_limit(tmp_path):
    sweep = make(tmp_path, trouble="hang", tasks=2)
    pid = os.fork()
    if pid == 0:
        folders.HEARTBEAT = 0.05
        worker.work([sweep.path], time_limit=1.0)
        os._exit(0)
    assert ended(pid) == 3
    assert [r["message"] for r in sweep.read() if r["status"] == "failed"] == [
        "took longer than 1 s"
    ]
    assert worker.work([sweep.path]) == 0


def test_numbers_that_are_not_finite_are_recorded_as_none(tmp_path):
    sweep = make(tmp_path, mean=float("inf"), tasks=1)
    worker.work([sweep.path])
    assert [row["value"] for row in sweep.rows()] == [None, None]


def test_records_say_what_made_them(tmp_path):
    sweep = make(tmp_path, tasks=1)
    worker.work([sweep.path])
    (record,) = sweep.read()
    for name in ("code", "torch", "fastminima", "machine", "threads", "time"):
        assert record[name]
    assert record["config"] == {"number": 0, "seeds": [0, 1]}
    assert record["settings"] == sweep.settings.fingerprint


def test_records_of_other_code_are_not_counted(tmp_path, monkeypatch):
    sweep = make(tmp_path)
    worker.work([sweep.path])
    monkeypatch.setattr(folders, "code_hash", lambda function: "another")
    sweep = Folder(sweep.path)
    assert sweep.finished() == {}
    assert sweep.outdated() == 6
    assert worker.work([sweep.path]) == 6
    assert len(sweep.rows()) == 12


def test_a_folder_holds_one_sweep(tmp_path):
    make(tmp_path, mean=1.0)
    with pytest.raises(ValueError, match="another sweep"):
        make(tmp_path, mean=2.0)


def test_seeds_can_be_added(tmp_path):
    log = tmp_path / "log"
    worker.work([make(tmp_path, log=str(log), tasks=1).path])
    grown = make(tmp_path, log=str(log), tasks=1, seeds=[5, 6, 7])
    worker.work([grown.path])
    assert [row["seed"] for row in grown.rows()] == [5, 6, 7]
    again = make(tmp_path, log=str(log), tasks=1)
    assert [row["seed"] for row in again.rows()] == [0, 1]
    assert sum(starts(log).values()) == 2


def test_an_unknown_setting_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no setting colour; it has preset"):
        make(tmp_path, colour="red")


def test_a_folder_without_a_sweep(tmp_path):
    with pytest.raises(ValueError, match=r"No sweep\.json"):
        worker.work([tmp_path])


def test_a_killed_task_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    sweep = make(tmp_path, tasks=1)
    monkeypatch.setattr(worker, "CHECKPOINT", 0.0)
    key = next(iter(sweep.tasks))
    lost = worker._Watch(sweep.claim(key))
    assert lost.load() is None
    lost.save(lambda: {"step": 7})
    stale(lost.claim.path)
    found = worker._Watch(sweep.claim(key))
    assert found.load() == {"step": 7}
    lost.save(lambda: {"step": 8})  # no longer its own
    assert found.load() == {"step": 7}
    worker._record(found.claim, [], (0.0, 0.0))
    assert list((sweep.path / "checkpoints").iterdir()) == []
    assert toy.EXPERIMENT.id == sweep.experiment.id
