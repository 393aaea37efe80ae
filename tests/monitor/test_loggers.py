"""What each logger wrote, read back by its own library; and what is not installed."""

import json
import math
import subprocess
import sys

import pytest
import torch
from read_logs import histograms, history, scalars

import fastminima as fm

ROW = {"step": 3, "loss": 1.5, "gradient/count": 4, "gradient/signal": -0.25}
NAN = {**ROW, "step": 4, "loss": math.nan, "is_finite": False}

# Of sample norms: 1 in [1/4, 1/2), none in [1/2, 1), 3 in [1, 2).
EDGES, COUNTS = [2.0**k for k in range(-4, 4)], [0, 0, 1, 0, 3, 0, 0]
OCCUPIED, FOUND = [0.25, 0.5, 1.0, 2.0], [1, 0, 3]


def test_json_lines_append_and_overwrite(tmp_path):
    path = tmp_path / "new" / "folder" / "x.jsonl"
    for _ in range(2):
        fm.monitor.JsonLines(path).write(ROW)
    assert fm.monitor.read(path) == [ROW, ROW]
    logger = fm.monitor.JsonLines(path, mode="overwrite")
    assert fm.monitor.read(path) == [ROW, ROW]  # nothing happens before the first row
    for step in range(3):
        logger.write({**ROW, "step": step})
    assert [row["step"] for row in fm.monitor.read(path)] == [0, 1, 2]
    with pytest.raises(ValueError, match="Unknown mode 'w'"):
        fm.monitor.JsonLines(path, mode="w")


def test_rows_outlive_a_killed_process(tmp_path):
    code = (
        "import os, sys, fastminima as fm\n"
        "lines = fm.monitor.JsonLines(sys.argv[1] + '/x.jsonl')\n"
        "table = fm.monitor.CSV(sys.argv[1] + '/x.csv')\n"
        "board = fm.monitor.TensorBoard(sys.argv[1])\n"
        "row = {f'gradient/{i}': i for i in range(20)}\n"
        "for step in range(3):\n"
        "    lines.write({'step': step, **row})\n"
        "    table.write({'step': step, f'column {step}': step, **row})\n"
        "    board.write({'step': step, **row})\n"
        "os.kill(os.getpid(), 9)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -9
    rows = fm.monitor.read(tmp_path / "x.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row, step in zip(fm.monitor.read(tmp_path / "x.csv"), rows, strict=True):
        assert row == {**step, f"column {step['step']}": step["step"]}
    found = scalars(tmp_path)
    assert found["gradient/19"] == [(step, 19.0) for step in range(3)]


def test_a_line_cut_off_is_left_out(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW)[:20])
    assert fm.monitor.read(path) == [ROW]
    fm.monitor.JsonLines(path).write(ROW)  # of the run that goes on
    assert fm.monitor.read(path) == [ROW, ROW]


def test_a_whole_line_without_its_end_stays(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROW))
    fm.monitor.JsonLines(path).write(ROW)
    assert fm.monitor.read(path) == [ROW, ROW]


def test_tensorboard(tmp_path):
    logger = fm.monitor.TensorBoard(tmp_path)
    assert not list(tmp_path.iterdir())
    for step in (1, 2, 3):
        logger.write({**ROW, "step": step})
        before_close = scalars(tmp_path)
        assert before_close["gradient/signal"][-1] == (step, -0.25)
    logger.close()
    logger.close()
    logger.write(NAN)  # opens another file
    logger.close()
    found = scalars(tmp_path)
    assert set(found) == {"loss", "gradient/count", "gradient/signal", "is_finite"}
    assert found["gradient/count"] == [(step, 4.0) for step in (1, 2, 3, 4)]
    assert found["is_finite"] == [(4, 0.0)]
    (_, good), (step, bad) = found["loss"][-2:]
    assert (good, step) == (1.5, 4)
    assert math.isnan(bad)


def test_tensorboard_histogram(tmp_path):
    logger = fm.monitor.TensorBoard(tmp_path)
    logger.write_histogram(3, "gradient/sample_norms", EDGES, COUNTS)
    logger.write_histogram(4, "gradient/sample_norms", EDGES, [0] * 7)  # nothing
    (event,) = histograms(tmp_path)["gradient/sample_norms"]  # before it is closed
    logger.close()
    found = event.histogram_value
    assert event.step == 3
    assert (found.min, found.max, found.num) == (0.25, 2.0, 4)
    assert (list(found.bucket_limit), list(found.bucket)) == (OCCUPIED[1:], FOUND)
    assert found.sum == 0.375 + 3 * 1.5
    with pytest.raises(ValueError, match="histogram of 7 bins has 8 edges, got 7"):
        logger.write_histogram(5, "x", EDGES[:-1], COUNTS)


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = fm.monitor.WandB("project", mode="offline", dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
    logger.write(ROW)
    logger.write({**ROW, "loss": 2.5})  # a second row of the same step
    logger.write(NAN)
    logger.write_histogram(5, "gradient/sample_norms", EDGES, COUNTS)
    logger.close()
    first, second, third, fourth = history(tmp_path)
    assert first == ROW
    assert second == {**ROW, "loss": 2.5}
    assert math.isnan(float(third["loss"]))
    histogram = {"_type": "histogram", "values": FOUND, "bins": OCCUPIED}
    assert fourth == {"step": 5, "gradient/sample_norms": histogram}


class Run:
    """What is asked of a run that somebody else started."""

    def __init__(self):
        self.rows, self.metrics = [], []

    def define_metric(self, name, **options):
        self.metrics.append(name)

    def log(self, row):
        self.rows.append(row)


def test_wandb_run_of_somebody_else_goes_on():
    run = Run()
    with fm.monitor.Monitor(fm.monitor.WandB(run=run)) as monitor:
        monitor._loggers[0].write(ROW)
    assert run.rows == [ROW]
    ours = ["gradient/*", "factors/*", "sharpness/*", "layers/*"]
    assert run.metrics == ["step", *ours]
    with pytest.raises(
        ValueError, match=r"takes no options, got \['mode', 'project'\]"
    ):
        fm.monitor.WandB("project", run=run, mode="offline")


@pytest.mark.parametrize(
    ("package", "make", "install"),
    [
        ("tensorboard", lambda: fm.monitor.TensorBoard("x"), "pip install tensorboard"),
        ("wandb", lambda: fm.monitor.WandB("x", mode="offline"), "pip install wandb"),
        ("mlflow", lambda: fm.monitor.MLflow("x"), "pip install mlflow"),
        ("trackio", lambda: fm.monitor.Trackio("x"), "pip install trackio"),
    ],
)
def test_not_installed(package, make, install, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}, which is not") as error:
        make()
    assert install in str(error.value)
    assert f"pip install 'fastminima[{package}]'" in str(error.value)


def test_import_is_light():
    code = (
        "import sys, fastminima as fm; fm.monitor.Monitor('x.jsonl');"
        "fm.callbacks.watch; fm.callbacks.LightningProbe;"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    optional = {"lightning", "pytorch_lightning", "transformers", "accelerate"}
    optional |= {"tensorboard", "wandb", "matplotlib", "mlflow", "trackio", "IPython"}
    assert "fastminima" in out.stdout.split()
    assert not optional & set(out.stdout.split())


def test_several_loggers_get_the_same_row(tmp_path):
    class Memory(fm.monitor.Logger):
        rows, is_closed = (), False

        def write(self, row):
            self.rows = [*self.rows, row]

        def close(self):
            self.is_closed = True

    a, b = Memory(), Memory()
    stats = fm.GradientStatistics(2, 3, torch.ones(2), torch.tensor(0.5))
    with fm.monitor.Monitor(a, b) as monitor:
        row = monitor.log(0, stats)
    assert a.rows == b.rows == [row]
    assert a.is_closed
    assert b.is_closed


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("runs/x", ValueError, r"'runs/x' does not say what to write: .*\.jsonl"),
        (3, TypeError, "Expected a logger or a path, got 3"),
        (print, TypeError, "Expected a logger or a path"),
    ],
)
def test_what_is_not_a_logger(bad, error, message):
    with pytest.raises(error, match=message):
        fm.monitor.Monitor(bad)
