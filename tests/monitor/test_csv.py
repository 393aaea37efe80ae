"""The table: columns that grow, whole at any moment, readable by others."""

import csv
import math
import os

import pytest

import fastminima as fm
from fastminima.monitor import csv_file

ROW = {"step": 0, "loss": 1.5, "gradient/signal": -0.25, "is_finite": True}


def test_columns_grow_to_the_right(tmp_path):
    path = tmp_path / "new" / "x.csv"
    table = fm.monitor.CSV(path)
    assert not path.parent.exists()  # nothing happens before the first row
    table.write(ROW)
    table.write({"step": 1, "sharpness/eigenvalue_1": 9.0, 'a "b", c': 1e-300})
    table.write({"step": 2, "loss": math.nan, "gradient/signal": math.inf})
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [*ROW, "sharpness/eigenvalue_1", 'a "b", c']
    assert lines == [
        ["0", "1.5", "-0.25", "1", "", ""],
        ["1", "", "", "", "9.0", "1e-300"],
        ["2", "nan", "inf", "", "", ""],
    ]
    assert [p.name for p in path.parent.iterdir()] == ["x.csv"]
    first, second, third = fm.monitor.read(path)
    assert first == ROW
    assert second == {"step": 1, "sharpness/eigenvalue_1": 9.0, 'a "b", c': 1e-300}
    assert math.isnan(third["loss"])
    assert third["gradient/signal"] == math.inf


def test_every_number_comes_back_as_it_was(tmp_path):
    with fm.monitor.Monitor(tmp_path / "x.csv", tmp_path / "x.jsonl") as monitor:
        for logger in monitor._loggers:
            for step in range(5):
                logger.write({"step": step, "a": 1 / 3**step, "b": 2**60 + step})
    assert fm.monitor.read(tmp_path / "x.csv") == fm.monitor.read(tmp_path / "x.jsonl")


def test_pandas_reads_numbers(tmp_path):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    table = fm.monitor.CSV(tmp_path / "x.csv")
    table.write(ROW)
    table.write({"step": 1, "loss": math.inf, "sharpness/converged": False})
    table.write({"step": 2, "loss": math.nan})
    frame = pandas.read_csv(tmp_path / "x.csv")
    assert frame["step"].tolist() == [0, 1, 2]
    assert all(kind.kind in "if" for kind in frame.dtypes)
    assert frame["loss"][:2].tolist() == [1.5, math.inf]
    assert math.isnan(frame["loss"][2])
    assert frame["sharpness/converged"][1] == 0


def test_append_and_overwrite(tmp_path):
    path = tmp_path / "x.csv"
    fm.monitor.CSV(path).write(ROW)
    again = fm.monitor.CSV(path)
    again.write({"loss": 2.5, "step": 1, "new": 3.0})  # in another order
    assert fm.monitor.read(path) == [ROW, {"loss": 2.5, "step": 1, "new": 3.0}]
    other = fm.monitor.CSV(path, mode="overwrite")
    assert len(fm.monitor.read(path)) == 2
    other.write({"step": 7})
    other.write({"step": 8})
    assert path.read_text() == "step\n7\n8\n"
    with pytest.raises(ValueError, match="Unknown mode 'w'"):
        fm.monitor.CSV(path, mode="w")


@pytest.mark.parametrize("cut", range(1, len("0,1.5,-0.25,1\n")))
def test_a_line_cut_off_is_dropped(tmp_path, cut):
    path = tmp_path / "x.csv"
    table = fm.monitor.CSV(path)
    table.write(ROW)
    table.write({**ROW, "step": 1})
    path.write_bytes(path.read_bytes()[:-cut])
    assert fm.monitor.read(path) == [ROW]
    fm.monitor.CSV(path).write({**ROW, "step": 2})
    assert fm.monitor.read(path) == [ROW, {**ROW, "step": 2}]


def test_a_table_of_somebody_else_is_not_touched(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("name,price\nbread,3\n")
    with pytest.raises(ValueError, match="has no column 'step'"):
        fm.monitor.CSV(path).write(ROW)
    assert path.read_text() == "name,price\nbread,3\n"


def test_an_empty_file_and_half_a_header(tmp_path):
    for name, content in (("a.csv", ""), ("b.csv", "step,lo")):
        path = tmp_path / name
        path.write_text(content)
        fm.monitor.CSV(path).write({"step": 0, "loss": 1.0})
        assert path.read_text() == "step,loss\n0,1.0\n"


@pytest.mark.parametrize("moment", range(4))
def test_killed_while_a_column_is_added(tmp_path, monkeypatch, moment):
    """Whatever step of the rewriting fails, the rows so far are there."""
    path = tmp_path / "x.csv"
    table = fm.monitor.CSV(path)
    table.write(ROW)
    calls = {"left": moment}

    def fails(what):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise KeyboardInterrupt
            return what(*args, **kwargs)

        return call

    monkeypatch.setattr(csv_file, "_lines", fails(csv_file._lines))
    monkeypatch.setattr(os, "fsync", fails(os.fsync))
    with pytest.raises(KeyboardInterrupt):
        table.write({**ROW, "step": 1, "new": 2.0})
    monkeypatch.undo()
    assert fm.monitor.read(path) == [ROW]
    fm.monitor.CSV(path).write({**ROW, "step": 2})
    assert fm.monitor.read(path) == [ROW, {**ROW, "step": 2}]
