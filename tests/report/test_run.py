"""Runs are read however far they are written, and however old they are."""

import json
import math

import numpy as np
import pytest
from watched_run import EDGES, write_run

from fastminima.report import open_run
from fastminima.report.appended import AppendedLines
from fastminima.report.columns import Columns
from fastminima.report.page import summary
from fastminima.report.tables import sample_table
from fastminima.report.thin import band, envelope, segments


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """60 rows, the last 20 of which begin five steps further back."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    rows = write_run(folder, 60, resumed=40, back=5)
    return folder, rows


def test_columns_are_the_rows(run):
    folder, rows = run
    columns = open_run(folder).columns
    assert columns.steps.tolist() == [row["step"] for row in rows]
    for name in ("loss", "sharpness/eigenvalue_2", "layers/head/share", "is_finite"):
        held = [
            (i, math.nan if row[name] is None else float(row[name]))
            for i, row in enumerate(rows)
            if name in row
        ]
        assert columns[name].at.tolist() == [i for i, _ in held]
        np.testing.assert_array_equal(columns[name].values, [v for _, v in held])


def test_of_a_resumed_run_the_later_rows_stand(run):
    folder, rows = run
    columns = open_run(folder).columns
    redone = [i for i in range(40) if rows[i]["step"] >= rows[40]["step"] + 1]
    assert np.flatnonzero(~columns.current).tolist() == redone
    assert len(redone) == 4
    assert [part.start for part in segments(columns.steps)] == [0, 40]


def test_rows_of_one_step_all_stand():
    columns = Columns()
    for step in (1, 2, 2, 3):
        columns.add({"step": step, "loss": 1.0})
    assert columns.current.all()


def test_a_file_of_rows_alone(run, tmp_path):
    path = tmp_path / "old.jsonl"
    path.write_text((run[0] / "rows.jsonl").read_text())
    found = open_run(path)
    assert len(found.columns) == 60
    assert (found.about, found.spikes, found.edges, len(found.tally)) == (
        *({}, [], None),
        0,
    )


def test_what_is_cut_off_is_left_for_later(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = AppendedLines(path)
    assert lines.read() == []
    whole = ['{"step": 0, "loss": 1.5}\n', '{"step": 1, "loss": null}\n']
    path.write_text(whole[0] + whole[1][:-9])
    assert lines.read() == [{"step": 0, "loss": 1.5}]
    assert lines.read() == []
    path.write_text("".join(whole))
    assert lines.read() == [{"step": 1, "loss": None}]
    assert lines.skipped == 0


def test_a_row_behind_one_that_was_killed(tmp_path):
    """The process died inside a row, and the resumed one appended to the line."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 7, "lo{"step": 5, "loss": 2.0}\n\nnot json\n')
    lines = AppendedLines(path)
    assert lines.read() == [{"step": 5, "loss": 2.0}]
    assert lines.skipped == 1


def test_bytes_that_are_no_text_do_not_end_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xff\xfe{"st\n{"step": 1}\n')
    run = open_run(path)
    assert run.columns.steps.tolist() == [1]
    assert run.skipped == 1


def test_a_run_that_is_being_written(run, tmp_path):
    folder = tmp_path / "b"
    folder.mkdir()
    lines = (run[0] / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:10]) + lines[10][:50])
    found = open_run(folder)
    assert len(found.columns) == 10
    assert not found.refresh()
    with (folder / "rows.jsonl").open("a") as file:
        file.write(lines[10][50:] + lines[11])
    (folder / "run.json").write_text('{"model": "hal')  # half of it
    assert found.refresh()
    assert len(found.columns) == 12 and found.about == {}
    (folder / "run.json").write_text('{"model": "Net"}')
    assert found.refresh() and found.about == {"model": "Net"}
    (folder / "rows.jsonl").write_text(lines[0])  # begun anew
    assert found.refresh() and len(found.columns) == 1


def test_histograms_and_samples(run):
    folder, _ = run
    found = open_run(folder)
    assert found.edges == tuple(EDGES)
    lines = [json.loads(x) for x in (folder / "histograms.jsonl").open()]
    assert [list(c) for _, c in found.histograms] == [x["counts"] for x in lines]
    listed = [
        s["id"]
        for line in (folder / "samples.jsonl").open()
        for s in json.loads(line)["samples"]
    ]
    most = found.tally.most(5)
    assert [s.listed for s in most] == [listed.count(s.id) for s in most]
    assert most[0].listed == max(map(listed.count, listed))


def test_an_index_in_the_batch_is_no_name(tmp_path):
    """The third sample of one batch is another than the third of the next."""
    (tmp_path / "rows.jsonl").write_text('{"step": 0}\n')

    def tally(*batches):
        lines = []
        for step, samples in enumerate(batches):
            found = [{"id": i, "index": n, "rank": r, "norm": 1.0 + step + n / 10}
                     for i, n, r in samples]  # fmt: skip
            lines.append(json.dumps({"step": step, "samples": found}))
        (tmp_path / "samples.jsonl").write_text("\n".join([*lines, ""]))
        found = open_run(tmp_path)
        return found.tally, summary(found), sample_table(found)

    nameless, said, table = tally([(2, 2, 0), (0, 0, 0)], [(2, 2, 0), (1, 1, 0)])
    assert not nameless.is_named and said["samples_most_often"] == []
    assert [(s["step"], s["index"]) for s in nameless.largest(3)] == [
        *((1, 2), (1, 1), (0, 2)),
    ]
    assert "have no ids" in table and "most often" not in table

    named, said, table = tally([(17, 2, 0), (1, 1, 0)], [(17, 0, 0), (1, 1, 1)])
    assert named.is_named and "most often" in table
    listed = {one["id"]: one["listed"] for one in said["samples_most_often"]}
    assert listed == {17: 2, 1: 1}  # of the other rank the id is not known


@pytest.mark.parametrize("line", ["[1]", '"x"', '{"samples": 3}', '{"samples": [7]}'])
def test_samples_of_another_form(run, tmp_path, line):
    (tmp_path / "rows.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "samples.jsonl").write_text(line + "\n")
    assert len(open_run(tmp_path).tally) == 0


def test_no_run_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run at"):
        open_run(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no rows\.jsonl.*notes\.txt"):
        open_run(tmp_path)


def test_quantities_and_their_intervals(run):
    folder, rows = run
    found = {q["name"]: q for q in summary(open_run(folder))["quantities"]}
    scale, last = found["noise scale"], rows[-1]
    assert scale["value"] == last["gradient/noise_scale_smoothed"]
    assert scale["low"] == last["gradient/noise_scale_low"]
    assert scale["high"] is None  # unbounded at the end
    worth = scale["value"] / (scale["value"] + 128)
    assert f"a sample is worth {worth:.0%} (95 % interval" in scale["words"]
    assert "to 100%)" in scale["words"]
    sharp = [row for row in rows if "sharpness/eigenvalue_1" in row][-1]
    value, residual = sharp["sharpness/eigenvalue_1"], sharp["sharpness/residual_1"]
    assert found["sharpness λ₁"]["low"] == pytest.approx(value - residual)
    part = value / sharp["sharpness/two_over_lr"]
    assert f"{part:.0%} of 2/η" in found["sharpness λ₁"]["words"]
    heat = [row["factors/temperature"] for row in rows][-50:]
    low, middle, high = np.quantile(heat, (0.1, 0.5, 0.9))
    assert found["temperature"]["value"] == pytest.approx(middle)
    assert (found["temperature"]["low"], found["temperature"]["high"]) == (
        pytest.approx(low),
        pytest.approx(high),
    )


def test_a_signal_below_zero_gives_no_noise_scale_but_a_lower_end(tmp_path):
    row = {
        "step": 3,
        "gradient/noise_scale_smoothed": -870.0,
        "gradient/noise_scale_low": 173.0,
        "gradient/noise_scale_high": None,
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (scale,) = summary(open_run(tmp_path))["quantities"]
    assert (scale["value"], scale["low"], scale["high"]) == (None, 173.0, None)
    assert "cannot be told from zero" in scale["words"]


def test_noise_scales_in_other_norms_have_their_own_words(tmp_path):
    kinds = {"": 100.0, "preconditioned_": 200.0, "sign_": 300.0}
    row = {"step": 3, "factors/batch_size": 50}
    for kind, value in kinds.items():
        group = f"gradient/{kind}noise_scale"
        ends = {f"{group}_low": value / 2, f"{group}_high": value * 2}
        row |= {group: value, f"{group}_smoothed": value, **ends}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    plain, normed, signs = summary(open_run(tmp_path))["quantities"]
    assert [q["value"] for q in (plain, normed, signs)] == list(kinds.values())
    assert (signs["low"], signs["high"]) == (150.0, 600.0)
    assert "a sample is worth 80%" in normed["words"]
    assert signs["name"] == "noise scale of signs" and "84 %" in signs["words"]


def test_thin_keeps_what_sticks_out():
    random = np.random.default_rng(0)
    x = np.arange(100_000.0)
    y = random.normal(size=len(x))
    y[[17, 50_001, 99_998]] = 40.0, -50.0, math.nan
    thin_x, thin_y = envelope(x, y)
    assert len(thin_x) <= 2000
    assert (np.diff(thin_x) > 0).all()
    for at in (17, 50_001):
        assert thin_y[thin_x == at] == y[at]
    assert np.isnan(thin_y[thin_x == 99_998]).all()
    assert np.isnan(thin_y).sum() == 1
    # Of each stretch both extremes: nothing lies outside what is drawn around it.
    for start in range(0, len(x), 1000):
        part = slice(start, start + 1000)
        near = (thin_x >= start - 300) & (thin_x < start + 1300)
        assert np.nanmax(thin_y[near]) >= np.nanmax(y[part])
        assert np.nanmin(thin_y[near]) <= np.nanmin(y[part])


def test_short_series_stay_as_they_are():
    x = np.arange(2000.0)
    assert envelope(x, x)[0] is x


def test_the_median_does_not_lag():
    """On a falling curve it is the curve, at both ends too."""
    x = np.arange(1000.0)
    y = np.exp(-x / 100)
    found = band(x, y)
    assert found is not None
    np.testing.assert_allclose(found.middle, np.exp(-found.x / 100), rtol=1e-12)
    assert found.x[0] == 0 and found.x[-1] == 999


def test_percentiles_hold_what_they_say():
    random = np.random.default_rng(0)
    x = np.arange(20_000.0)
    found = band(x, random.normal(size=len(x)))
    assert found is not None
    inner = slice(30, -30)  # windows get narrow at the ends
    # 801 rows a window: the 90th percentile has a standard error of
    # sqrt(.1 * .9 / 801) / .1755 = .06, averaged over some 25 independent windows.
    assert abs(found.high[inner].mean() - 1.2816) < 4 * 0.06 / 5
    assert abs(found.low[inner].mean() + 1.2816) < 4 * 0.06 / 5


def test_few_rows_have_no_band():
    assert band(np.arange(20.0), np.ones(20)) is None
