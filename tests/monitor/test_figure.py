"""The figure of rows: its panels, its gaps, its file."""

import math
import sys

import pytest

import fastminima as fm
from fastminima.monitor import figure


def rows(steps=range(10), **more):
    return [
        {
            "step": step,
            "loss": 2.0 - 0.1 * step,
            "gradient/mean_grad_sq_norm": 4.0 * (1 + step),
            "gradient/noise_scale": (-1) ** step * 10.0,
            "gradient/noise_scale_smoothed": 8.0,
            **more,
        }
        for step in steps
    ]


def panels(drawn):
    return {
        ax.get_title(loc="left").split(",")[0]: ax for ax in drawn.axes if ax.axison
    }


def line(ax, label):
    (found,) = [one for one in ax.lines if one.get_label() == label]
    return found.get_ydata().tolist()


def test_panels_are_those_of_the_rows():
    drawn = panels(fm.monitor.plot(rows()))
    assert set(drawn) == {"loss", "gradient norms", "noise scale"}
    more = {"gradient/covariance_trace": 1.0, "factors/temperature": 1e-4}
    more |= {
        "factors/ratio": 0.01,
        "factors/batch_size": 16,
        "sharpness/eigenvalue_1": -3.0,
    }
    drawn = panels(fm.monitor.plot(rows(**more)))
    assert len(drawn) == 6
    assert line(drawn["noise scale"], "batch size") == [16] * 10
    assert -3.0 in drawn["sharpness"].lines[0].get_ydata()
    assert drawn["sharpness"].get_yscale() == "linear"


def test_values():
    drawn = panels(fm.monitor.plot(rows()))
    thin, bold = (one.get_ydata() for one in drawn["gradient norms"].lines)
    assert list(thin) == pytest.approx([2 * math.sqrt(1 + step) for step in range(10)])
    assert list(bold) == figure._averages(thin)
    single = line(drawn["noise scale"], "single steps")
    assert [v for v in single if not math.isnan(v)] == [10.0] * 5


def test_a_second_run_starts_a_new_line():
    steps, values = figure._series(rows([0, 1, 0, 1]), "loss")
    assert math.isnan(steps.pop(2))
    assert steps == [0, 1, 0, 1]
    averages = figure._averages(values)
    assert averages[3] == values[3] == 2.0
    assert averages[1] == pytest.approx((0.9 * 2.0 + 1.9) / 1.9)


def test_the_average_temperature_follows_the_learning_rate():
    ratios = [0.1] * 5 + [0.01] * 5
    found = [
        row | {"factors/ratio": ratio, "factors/temperature": ratio * 3.0}
        for row, ratio in zip(rows(), ratios, strict=True)
    ]
    bold = panels(fm.monitor.plot(found))["temperature"].lines[1].get_ydata()
    assert list(bold) == pytest.approx([ratio * 3.0 for ratio in ratios])


def test_file_in_and_file_out(tmp_path):
    logger = fm.monitor.JsonLines(tmp_path / "x.jsonl")
    for row in rows():
        logger.write(row)
    fm.monitor.plot(tmp_path / "x.jsonl", tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw():
    with pytest.raises(ValueError, match=r"Nothing to draw in 1 rows.*\['step'\]"):
        fm.monitor.plot([{"step": 0}])


def test_matplotlib_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        fm.monitor.plot(rows())
