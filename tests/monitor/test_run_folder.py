"""The files of a run: appended to, cut-off lines, and killed at random."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastminima as fm
from fastminima.monitor.run import RunFolder
from fastminima.monitor.samples import EDGES

ROW = {"step": 3, "loss": 1.5, "gradient/signal": math.inf, "is_finite": True}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_not_finite_becomes_null_at_any_depth(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write(ROW)
    folder.write_samples(
        3, [{"id": (1, "a"), "norm": math.nan, "layers": {"x": math.inf}}]
    )
    assert lines(tmp_path / "rows.jsonl") == [ROW | {"gradient/signal": None}]
    (line,) = lines(tmp_path / "samples.jsonl")
    assert line["samples"] == [{"id": [1, "a"], "norm": None, "layers": {"x": None}}]


def test_histogram(tmp_path):
    RunFolder(tmp_path).write_histogram(3, "norms", EDGES, [1] * 80)
    (line,) = lines(tmp_path / "histograms.jsonl")
    assert line["edges_log2"] == [-20, 20, 80]
    assert line["counts"] == [1] * 80


def test_a_line_that_was_cut_off_goes(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text in (b'{"step": 1}\n{"ste', b'{"st', b""):
        path.write_bytes(text)
        folder = RunFolder(tmp_path)
        folder.write({"step": 2})
        folder.close()
        folder.write({"step": 3})
        folder.close()
        whole = [1] if b"\n" in text else []
        assert [row["step"] for row in lines(path)] == [*whole, 2, 3]


def test_when_a_run_started_stays(tmp_path):
    RunFolder(tmp_path).write_run({"started": "a", "every": 1})
    RunFolder(tmp_path).write_run({"started": "b", "every": 2})
    assert json.loads((tmp_path / "run.json").read_text()) == {
        "started": "a",
        "every": 2,
    }


def test_an_unreadable_run_json_stops_nothing(tmp_path):
    (tmp_path / "run.json").write_text("{")
    RunFolder(tmp_path).write_run({"started": "b"})
    assert json.loads((tmp_path / "run.json").read_text()) == {"started": "b"}


def test_a_run_that_begins_in_anothers_folder_says_so(tmp_path):
    for step, is_said in ((0, False), (5, False), (0, True)):
        folder = RunFolder(tmp_path)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            folder.write({"step": step})
            folder.write({"step": step})  # as of two batches of one step
        folder.close()
        assert ["earlier run" in str(one.message) for one in caught] == [True] * is_said


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(ValueError, match="is a file, and a run is a folder"):
        fm.monitor.watch(torch.nn.Linear(2, 1), to=tmp_path / "a")


def child(folder, told):
    """Log steps until killed; say after each that it was logged."""
    monitor = fm.monitor.Monitor(fm.monitor.RunFolder(folder))
    columns = {f"layers/{i}/share": 0.1 for i in range(30)}
    for step in range(10**6):
        for logger in monitor._loggers:
            logger.write({"step": step, **columns})
            logger.write_samples(step, [{"id": i, "norm": 1.0} for i in range(8)])
            if step % 5 == 0:
                logger.write_spike({"step": step, "what": "loss", "samples": []})
        os.write(told, step.to_bytes(4, "big"))


def killed(folder, seed):
    """The last step that a child said was logged before it was killed."""
    hear, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(folder, tell)
        finally:
            os._exit(1)
    os.close(tell)
    wait = random.Random(seed).randrange(1, 60)
    last = -1
    for _ in range(wait):  # a moment of its own, however busy the machine is
        last = int.from_bytes(os.read(hear, 4), "big")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while heard := os.read(hear, 4):
        last = int.from_bytes(heard, "big")
    os.close(hear)
    return last


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*")
@pytest.mark.parametrize("seed", range(50))
def test_killed_at_random_loses_nothing(seed, tmp_path):
    last = killed(tmp_path, seed)
    assert last >= 0
    for name, every in (("rows", 1), ("samples", 1), ("spikes", 5)):
        text = (tmp_path / f"{name}.jsonl").read_text()
        found = [json.loads(x)["step"] for x in text.splitlines(True) if x[-1] == "\n"]
        assert found == list(range(0, len(found) * every, every)), name
        assert found[-1] >= last - last % every, name
    RunFolder(tmp_path).write({"step": -1})  # and it can be gone on with
    assert lines(tmp_path / "rows.jsonl")[-1] == {"step": -1}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
def test_training_that_is_killed(tmp_path):
    """Whole loops, in a process of their own: it has used no thread when it forks."""
    script = Path(__file__).with_name("killed_runs.py")
    root = os.pathsep.join([str(Path(fm.__file__).parents[1]), *sys.path])
    done = subprocess.run(
        [sys.executable, script, tmp_path, "--kills", "6"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 6
    assert len(set(rows)) > 2  # killed at different steps
