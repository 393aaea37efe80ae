"""The figure of rows: its panels, its gaps, its file."""

import math
import sys

import pytest

import fastminima as fm
from fastminima.monitor.panels import series
from fastminima.monitor.trend import trend


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
    assert list(bold) == trend(range(10), thin, 5, logarithmic=True)
    single = line(drawn["noise scale"], "single steps")
    assert [v for v in single if not math.isnan(v)] == [10.0] * 5


@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_the_bold_line_does_not_lag(scale):
    """Of a decaying loss, logged each fifth step, on either kind of axis."""
    found = [
        {"step": step, "loss": scale * 2.3 * math.exp(-step / 50)}
        for step in range(0, 200, 5)
    ]
    ax = panels(fm.monitor.plot(found))["loss"]
    assert ax.get_yscale() == ("log" if scale > 0 else "linear")
    bold = ax.lines[1].get_ydata()
    assert bold[-1] == pytest.approx(found[-1]["loss"], rel=1e-9 if scale > 0 else 0.1)


def test_legends_say_what_is_drawn():
    drawn = fm.monitor.plot(rows(**{"sharpness/eigenvalue_1": 2.0}))
    (legend,) = drawn.legends
    thin, bold = (text.get_text() for text in legend.get_texts())
    assert thin == "single rows"
    assert bold.startswith("trend: a line fitted to 5 % of the rows on each side")
    no_trend = fm.monitor.plot([{"step": 0, "sharpness/eigenvalue_1": 2.0}])
    assert not no_trend.legends


def test_a_second_run_starts_a_new_line():
    steps, values = series(rows([0, 1, 0, 1]), "loss")
    assert math.isnan(steps.pop(2))
    assert steps == [0, 1, 0, 1]
    bold = panels(fm.monitor.plot(rows([0, 1, 0, 1])))["loss"].lines[1].get_ydata()
    assert list(bold) == pytest.approx(values, nan_ok=True)


def test_the_trend_of_the_temperature_follows_the_learning_rate():
    ratios = [0.1] * 5 + [0.01] * 5
    found = [
        row | {"factors/ratio": ratio, "factors/temperature": ratio * 3.0}
        for row, ratio in zip(rows(), ratios, strict=True)
    ]
    bold = panels(fm.monitor.plot(found))["temperature"].lines[1].get_ydata()
    assert list(bold) == pytest.approx([ratio * 3.0 for ratio in ratios])


def sharp(**more):
    """Rows of gradient descent whose sharpness is measured in every second one."""
    measured = {f"sharpness/eigenvalue_{i}": 20.0 / i for i in (1, 2)}
    measured |= {f"sharpness/residual_{i}": 0.5 * i for i in (1, 2)}
    factors = {"factors/learning_rate": 0.05, "factors/ratio": 0.1, **more}
    return [
        row | factors | (measured if row["step"] % 2 == 0 else {}) for row in rows()
    ]


@pytest.mark.parametrize(("momentum", "limit"), [(0.0, 40.0), (0.5, 60.0)])
def test_eigenvalues_with_residuals_beside_the_limit_of_stability(momentum, limit):
    more = {"factors/momentum": momentum}
    ax = panels(fm.monitor.plot(sharp(**more)))["sharpness"]
    label = "2(1 + m)/η, limit of stability" if momentum else "2/η, limit of stability"
    assert line(ax, label) == [limit] * 10
    first, second = ax.containers
    for bars, value, residual in ((first, 20.0, 0.5), (second, 10.0, 1.0)):
        points, _, (stretches,) = bars.lines
        assert points.get_ydata().tolist() == [value] * 5
        (low, high) = stretches.get_segments()[0][:, 1]
        assert (low, high) == (value - residual, value + residual)


def test_an_optimizer_that_rescales_has_no_limit_of_its_own():
    adam = [{k: v for k, v in r.items() if k != "factors/ratio"} for r in sharp()]
    labels = [
        one.get_label() for one in panels(fm.monitor.plot(adam))["sharpness"].lines
    ]
    assert not any("stability" in label for label in labels)
    given = [row | {"sharpness/two_over_lr": 7.0} for row in sharp()]
    ax = panels(fm.monitor.plot(given))["sharpness"]
    assert line(ax, "2/η, limit of stability") == [7.0] * 10


def test_interval_of_the_noise_scale():
    found = [
        row
        | {
            "gradient/noise_scale_low": math.nan if step == 0 else 4.0,
            "gradient/noise_scale_high": math.nan if step < 2 else 9.0,
        }
        for step, row in enumerate(rows())
    ]
    ax = panels(fm.monitor.plot(found))["noise scale"]
    (band,) = ax.collections
    assert band.get_label() == "95 % interval"
    bottom, top = ax.get_ylim()
    corners = band.get_paths()[0].vertices
    at = {x: sorted({y for a, y in corners.tolist() if a == x}) for x in (1, 5)}
    assert 0 not in corners[:, 0]  # nothing is known there
    assert at[1] == [max(4.0, bottom), top]  # no upper end
    assert at[5] == [max(4.0, bottom), min(9.0, top)]


def test_columns_of_the_user():
    found = [row | {"accuracy": 0.5, "note": "text", "epoch": 1} for row in rows()]
    assert {"accuracy", "epoch"} <= set(panels(fm.monitor.plot(found)))
    chosen = panels(fm.monitor.plot(found, columns=["gradient/noise_scale_smoothed"]))
    assert "accuracy" not in chosen
    assert list(chosen)[-1] == "gradient/noise_scale_smoothed"
    for bad in ("note", "missing"):
        with pytest.raises(ValueError, match=f"No row has a number named '{bad}'"):
            fm.monitor.plot(found, columns=[bad])


def test_file_in_and_file_out(tmp_path):
    logger = fm.monitor.JsonLines(tmp_path / "rows.jsonl")
    for row in rows():
        logger.write(row)
    fm.monitor.plot(tmp_path / "rows.jsonl", tmp_path / "x.png")
    assert fm.monitor.read(tmp_path) == rows()
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw():
    with pytest.raises(ValueError, match=r"Nothing to draw in 1 rows.*\['step'\]"):
        fm.monitor.plot([{"step": 0}])


def test_matplotlib_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        fm.monitor.plot(rows())
