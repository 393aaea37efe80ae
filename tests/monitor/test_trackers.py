"""Trackio and MLflow, offline: what the library itself keeps of the rows."""

import json
import math
import sqlite3
import sys

import pytest

import fastminima as fm

ROW = {"step": 3, "loss": 1.5, "gradient/count": 4, "is_finite": True}
NAN = {**ROW, "step": 4, "loss": math.nan, "layers/(own)/share": 0.5}


def kept(path):
    """Step and numbers of each row in a database of Trackio's, in order."""
    with sqlite3.connect(path) as database:
        found = database.execute("SELECT step, metrics FROM metrics ORDER BY id")
        return [(step, json.loads(metrics)) for step, metrics in found]


@pytest.fixture
def database(tmp_path, monkeypatch):
    """A fresh import of the library: it reads TRACKIO_DIR then."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    pytest.importorskip("trackio", reason="trackio is not installed")
    return tmp_path / "project.db"


def test_trackio(database):
    options = {"auto_log_cpu": False, "auto_log_gpu": False, "embed": False}
    logger = fm.monitor.Trackio("project", name="run", **options)
    assert not database.exists()
    for row in (ROW, NAN, NAN):
        logger.write(row)
    logger.write_histogram(5, "norms", [0.5, 1.0, 2.0, 4.0], [0, 3, 1])
    logger.close()
    logger.close()
    (first, second, third, fourth) = kept(database)
    assert first == (3, {k: v for k, v in ROW.items() if k != "step"})
    assert second[0] == third[0] == 4
    assert math.isnan(float(second[1]["loss"]))
    assert second[1]["layers/(own)/share"] == 0.5
    histogram = {"_type": "trackio.histogram", "bins": [1, 2, 4], "values": [3, 1]}
    assert fourth == (5, {"norms": histogram})


class Run:
    """What is asked of a run that somebody else started."""

    def __init__(self):
        self.rows = []

    def log(self, row, step):
        self.rows.append((step, row))


def test_trackio_run_of_somebody_else_goes_on():
    pytest.importorskip("trackio", reason="trackio is not installed")
    run = Run()
    logger = fm.monitor.Trackio(run=run)
    logger.write({"step": 2, "loss": 1.0})
    logger.close()
    logger.write({"step": 3, "loss": 2.0})
    assert run.rows == [(2, {"loss": 1.0}), (3, {"loss": 2.0})]
    with pytest.raises(ValueError, match=r"takes no options, got \['project'\]"):
        fm.monitor.Trackio("project", run=run)
    with pytest.raises(ValueError, match="needs a project"):
        fm.monitor.Trackio()


@pytest.fixture
def tracking(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow (or mlflow-skinny) is not installed")
    # mlflow-skinny has no database of its own: a folder, or a server.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "runs").as_uri()


def test_mlflow(tracking):
    import mlflow

    logger = fm.monitor.MLflow("new", tracking_uri=tracking, run_name="one")
    client = mlflow.MlflowClient(tracking)
    assert client.get_experiment_by_name("new") is None  # nothing before the first row
    logger.write(ROW)
    logger.write(NAN)
    (run,) = client.search_runs([client.get_experiment_by_name("new").experiment_id])
    assert (run.info.run_name, run.info.status) == ("one", "RUNNING")
    for name in ("gradient/count", "is_finite"):
        metrics = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in metrics] == [(s, ROW[name]) for s in (3, 4)]
    loss = client.get_metric_history(run.info.run_id, "loss")
    assert loss[0].value == 1.5
    assert math.isnan(loss[1].value)
    assert run.data.metrics["layers/_own_/share"] == 0.5
    assert "step" not in run.data.metrics
    logger.close()
    logger.close()
    assert client.get_run(run.info.run_id).info.status == "FINISHED"
    assert mlflow.active_run() is None


def test_mlflow_more_than_a_request_takes_into_a_run_that_goes_on(tracking):
    import mlflow

    client = mlflow.MlflowClient(tracking)
    run_id = client.create_run(client.create_experiment("theirs")).info.run_id
    logger = fm.monitor.MLflow(run_id=run_id, tracking_uri=tracking)
    logger.write({"step": 0, **{f"layers/{i}/share": i for i in range(1003)}})
    logger.close()
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.metrics == {f"layers/{i}/share": i for i in range(1003)}
    with pytest.raises(ValueError, match=r"takes no options, got \['experiment'\]"):
        fm.monitor.MLflow("new", run_id=run_id)
