"""The page as text: figures that plotly accepts, nothing from outside, all escaped."""

import json
import re
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser
from threading import Thread

import numpy as np
import pytest
from watched_run import LAYERS, write_run

from fastminima.report import open_run, report
from fastminima.report.columns import Columns
from fastminima.report.factors import factors
from fastminima.report.maps import _short
from fastminima.report.page import payload, render
from fastminima.report.server import PageServer

pytest.importorskip("plotly", reason="the page's figures need plotly")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    write_run(folder, 120, resumed=80, back=10)
    return folder


@pytest.fixture(scope="module")
def figures(folder):
    return payload(open_run(folder))["figures"]


def test_plotly_accepts_every_figure(figures):
    """Its Python classes check each name and value."""
    objects = pytest.importorskip("plotly.graph_objects")
    for name, figure in figures.items():
        made = objects.Figure(figure)
        assert len(made.data) == len(figure["data"]), name


def test_every_kind_of_figure_is_there(figures):
    assert list(figures) == [
        *("loss", "gradient-norms", "covariance-trace", "noise-scale"),
        *("temperature", "factors", "sharpness", "eigenvalues"),
        *("layers-share", "layers-noise_scale", "layers-sq_norm"),
        *("sample-norms", "own-0"),
    ]


@pytest.mark.parametrize(
    ("decays", "names"),
    [
        ({"": (0.0, 0.0)}, []),
        ({"": (0.1, 0.2)}, ["weight decay w"]),
        ({"_0": (0.1, 0.1), "_1": (0.0, 0.0)}, ["weight decay w, group 0"]),
    ],
)
def test_weight_decay_is_drawn_where_there_is_some(decays, names):
    columns = Columns()
    for step in range(2):
        row = {f"factors/weight_decay{g}": found[step] for g, found in decays.items()}
        columns.add({"step": step, "factors/learning_rate": 0.1, **row})
    made = factors(columns)
    traces = {t["name"]: t for t in made.figure["data"]}
    assert list(traces) == ["learning rate η", *names]
    assert ("Weight decay w" in made.glossary) == bool(names)
    for name, values in zip(names, decays.values(), strict=False):
        assert traces[name]["y"] == list(values)


def test_layer_maps_hold_the_rows_that_stand(folder, figures):
    run = open_run(folder)
    (trace,) = figures["layers-share"]["data"]
    columns = run.columns
    steps = columns.steps[columns.current]
    assert trace["x"] == steps.tolist()
    for number, layer in enumerate(LAYERS):
        shares = columns[f"layers/{layer}/share"].values[columns.current]
        np.testing.assert_allclose(10.0 ** np.array(trace["z"][number]), shares, 1e-5)
        assert trace["customdata"][number][0] == layer


def test_an_interval_without_an_upper_end_leaves_the_figure(figures):
    traces = {t["name"]: t for t in figures["noise-scale"]["data"]}
    axis = figures["noise-scale"]["layout"]["yaxis"]
    top = 10 ** axis["range"][1]
    assert max(v for v in traces["95 % interval"]["y"] if v is not None) > 10 * top
    assert max(v for v in traces["smoothed"]["y"] if v is not None) < top


def test_error_bars_are_residuals(folder, figures):
    run = open_run(folder)
    trace = figures["sharpness"]["data"][0]
    wanted = run.columns["sharpness/residual_1"].values
    bars = [b for b in trace["error_y"]["array"] if b is not None]
    np.testing.assert_allclose(bars, wanted, 1e-6)


class Outside(HTMLParser):
    """Everything that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.tags = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.found.append(value)


def test_one_file_that_asks_for_nothing(folder):
    page = report(folder)
    assert page == folder / "report.html"
    text = page.read_text()
    parser = Outside()
    parser.feed(text)
    links = {x for x in parser.found if not x.startswith("#")}
    assert links == {"data:,"}  # the icon, so that none is asked for
    assert "default-src 'none'" in text and "connect-src 'none'" in text
    assert len(text) < 8e6
    assert not list(folder.glob("*.part"))


def test_what_a_run_says_is_never_markup(folder, tmp_path):
    evil = "</script><img src=x onerror=alert(1)><!--"
    hit = tmp_path / "b"
    write_run(hit, 30, user=False)
    (hit / "run.json").write_text(json.dumps({"model": evil, evil: evil}))
    row = {"step": 31, evil: 1.0, f"layers/{evil}/share": 0.5, "loss": 1.0}
    with (hit / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    sample = {"id": evil, "norm": 1e9, "layers": {evil: 1.0}, "loss": None}
    for _ in range(3):
        with (hit / "samples.jsonl").open("a") as file:
            file.write(json.dumps({"step": 31, "samples": [sample]}) + "\n")
    spike = {"step": 31, "what": evil, "value": None, "samples": [sample]}
    (hit / "spikes.jsonl").write_text(json.dumps(spike) + "\n")
    text = render(open_run(hit))
    parser = Outside()
    parser.feed(text)
    assert "img" not in parser.tags
    assert text.count("</script>") == 3
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert data is not None
    assert evil in json.dumps(json.loads(data[1]), ensure_ascii=False)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ['{"step": 3}'],
        ['{"step": 0, "loss": null}'],
        ['{"step": 0, "loss": -1.0, "gradient/noise_scale": -3.0}'] * 3,
        ['{"step": 5, "loss": 2.0, "is_finite": false, "note": "text"}'],
        ['{"step": 1, "sharpness/eigenvalue_1": -2.0, "layers/a/share": 0.0}'],
        ['{"step": 1, "factors/temperature": 1.0, "factors/ratio": 0.0}'],
    ],
)
def test_short_and_odd_runs(tmp_path, lines):
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    page = report(path)
    assert page == tmp_path / "odd.html"
    assert "<h1>odd.jsonl</h1>" in page.read_text()


def test_long_runs_are_thinned(tmp_path):
    path = tmp_path / "long.jsonl"
    rows = ({"step": i, "loss": 2.0 + (i == 12_345)} for i in range(30_000))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = payload(open_run(path))["figures"]["loss"]
    raw = figure["data"][0]
    assert len(raw["x"]) <= 2000
    assert raw["x"][raw["y"].index(3.0)] == 12_345


def test_without_plotly(folder, monkeypatch):
    from fastminima.report import page

    page._plotly.cache_clear()
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'fastminima\[report\]'"):
        report(folder)


def test_served_to_this_machine_alone(folder):
    with PageServer(open_run(folder)) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            found = urllib.request.urlopen(f"{server.url}data.json?-1")
            news = json.loads(found.read())
            assert set(news) == {"version", "title", "sections", "figures"}
            again = urllib.request.urlopen(f"{server.url}data.json?{news['version']}")
            assert json.loads(again.read()) == {"version": news["version"]}
            for path, host in (("nowhere", None), ("", "elsewhere.example:80")):
                asked = urllib.request.Request(server.url + path)
                if host:
                    asked.add_header("Host", host)
                with pytest.raises(urllib.error.HTTPError) as refused:
                    urllib.request.urlopen(asked)
                assert refused.value.code == (403 if host else 404)
        finally:
            server.shutdown()
            thread.join()


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("look", [":root", ":root.dark"])
def test_contrast(look):
    """Of text at least 4.5, of what figures draw at least 3 (WCAG 2.2, AA)."""
    from fastminima.report import page

    block = re.search(rf"{re.escape(look)} \{{(.*?)\}}", page._asset("page.css"), re.S)
    assert block is not None
    colours = dict(re.findall(r"--(\w+): (#\w{6})", block[1]))
    for ground in ("page", "panel"):
        for text in ("ink", "faint"):
            assert contrast(colours[text], colours[ground]) >= 4.5
        for drawn in ("blue", "orange", "green", "purple", "focus"):
            assert contrast(colours[drawn], colours[ground]) >= 3


def test_columns_of_the_callbacks_are_not_the_users(tmp_path):
    rows = [
        {"step": s, "loss": 1.0, "batch": s, "backward": 0, "mine": s} for s in (0, 1)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = payload(open_run(tmp_path))["figures"]
    own = [figure["layout"] for name, figure in found.items() if "own" in name]
    assert len(own) == 1 and "mine" in json.dumps(own[0])


def test_why_there_is_no_temperature(tmp_path):
    row = {"step": 0, "factors/learning_rate": 0.1}
    path = tmp_path / "rows.jsonl"
    for more, is_said in (({}, True), ({"factors/ratio": 0.1}, False)):
        path.write_text(json.dumps(row | more) + "\n")
        assert ("no temperature" in render(open_run(tmp_path))) == is_said


def test_advice_is_of_the_usual_batch_not_of_the_last_one(tmp_path):
    """Which is a short one, where an epoch ends."""
    scale = "gradient/noise_scale"
    row = {f"{scale}_smoothed": 48.0, f"{scale}_low": 32.0, f"{scale}_high": 96.0}
    with (tmp_path / "rows.jsonl").open("w") as file:
        for step, size in enumerate((16, 16, 16, 12)):
            line = {"step": step, **row, "factors/batch_size": size}
            file.write(json.dumps(line) + "\n")
    words = "In the batch of 16 that you use, a sample is worth 75%"
    assert words in render(open_run(tmp_path))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("classifier", "classifier"),
        ("bert.encoder.layer.11.attention.self.query", "b.e.l.11.a.self.query"),
        ("bert.encoder.layer.0.output.dense", "b.e.l.0.output.dense"),
        ("a_module_with_a_long_name", "…dule_with_a_long_name"),
    ],
)
def test_names_of_layers_keep_what_tells_them_apart(name, short):
    assert _short(name) == short
