"""The page in a real browser: what it draws, asks for, says and how it is reached."""

import json
import math
import shutil
import threading

import chromium
import pytest
from watched_run import write_run

from fastminima.report import open_run, report
from fastminima.report.server import PageServer

pytest.importorskip("plotly", reason="the page's figures need plotly")
pytestmark = pytest.mark.skipif(
    chromium.find() is None, reason="Chromium is not installed (Debian: chromium)"
)
DRAWN = "document.documentElement?.dataset.drawn"


@pytest.fixture(scope="module")
def browser():
    with chromium.running() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 240 rows, resumed once, with its page."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    rows = write_run(folder, 240, resumed=150, back=10)
    return folder, rows, report(folder)


@pytest.fixture(scope="module")
def wide(browser, run):
    tab = browser.tab(1280, 900, "light")
    tab.open(run[2].as_uri(), DRAWN)
    return tab


def drawn(tab, figure, trace):
    """x and y of a trace as plotly has it."""
    place = f"document.querySelector('[data-figure={json.dumps(figure)}]')"
    found = tab.run(f"{place}.data.find((t) => t.name === {json.dumps(trace)})")
    assert found is not None, trace
    return found["x"], found["y"]


def test_asks_no_network_and_has_no_complaints(run, wide):
    wanted = {run[2].as_uri()}
    assert {url for url in wide.requests if not url.startswith("data:")} == wanted
    assert wide.complaints == []
    buttons = wide.run(
        "[...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"
    )
    # None that would send the figure away.
    assert set(buttons) == {
        "Zoom in",
        "Zoom out",
        "Reset axes",
        "Download plot as a PNG",
    }


def test_no_table_or_figure_is_wider_than_the_window(browser, run):
    tab = browser.tab(400, 800, "dark")
    tab.open(run[2].as_uri(), DRAWN)
    assert tab.run("document.documentElement.scrollWidth") <= 400
    plots = "[...document.querySelectorAll('.plot')]"
    widths = tab.run(f"{plots}.map((p) => p.getBoundingClientRect().right)")
    assert len(widths) > 10 and max(widths) <= 400
    # Inside a plot too: what is drawn ends before its edge.
    svg = "p.querySelector('.main-svg')"
    inner = tab.run(f"{plots}.map((p) => {svg}.getBoundingClientRect().right)")
    assert max(inner) <= 401
    assert tab.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(16, 20, 24)"
    )
    assert tab.complaints == []


def test_figures_hold_the_rows(run, wide):
    _, rows, _ = run
    for figure, trace, name, power in (
        ("loss", "loss: rows", "loss", 1),
        ("gradient-norms", "of samples, the largest", "gradient/norm_max", 1),
        (
            "gradient-norms",
            "of the mean gradient: rows",
            "gradient/mean_grad_sq_norm",
            0.5,
        ),
        ("noise-scale", "smoothed", "gradient/noise_scale_smoothed", 1),
        ("noise-scale", "batch size", "factors/batch_size", 1),
        ("temperature", "temperature: rows", "factors/temperature", 1),
        ("sharpness", "λ₁ ± residual", "sharpness/eigenvalue_1", 1),
        ("sharpness", "2/η", "sharpness/two_over_lr", 1),
        ("eigenvalues", "λ2", "sharpness/eigenvalue_2", 1),
        ("own-0", "accuracy: rows", "accuracy", 1),
    ):
        x, y = drawn(wide, figure, trace)
        points = [
            (s, v) for s, v in zip(x, y, strict=True) if s is not None
        ]  # without the gap where the step goes back
        held = [row for row in rows if name in row]
        assert [s for s, _ in points] == [row["step"] for row in held], trace
        for (_, value), row in zip(points, held, strict=True):
            wanted = row[name]
            if wanted is None:
                assert value is None
            else:
                assert math.isclose(value, wanted**power, rel_tol=1e-6), trace


def test_every_section_and_figure_has_its_heading(wide):
    sections = wide.run(
        "[...document.querySelectorAll('main > section')].map((s) => "
        "[document.getElementById(s.getAttribute('aria-labelledby'))?.textContent, "
        "s.querySelector('h2')?.textContent])"
    )
    assert len(sections) == 13
    assert all(label and label == heading for label, heading in sections)
    linked = wide.run(
        "[...document.querySelectorAll('nav a')].map((a) => "
        "document.getElementById(a.hash.slice(1)).querySelector('h2').textContent)"
    )
    assert linked == [heading for _, heading in sections]
    assert wide.run(
        "[...document.querySelectorAll('figure')].every((f) => f.querySelector('h3') "
        "&& f.querySelector('.glossary').textContent.length > 20 "
        "&& f.querySelector('.plot').getAttribute('aria-label'))"
    )


def test_the_keyboard_reaches_every_figure_and_reads_it(run, wide):
    order = wide.run(
        "[...document.querySelectorAll('.plot')].map((p) => p.dataset.figure)"
    )
    wide.run("document.activeElement.blur()")
    met, seen = [], []
    for _ in range(200):
        wide.press("Tab", 9)
        where = wide.run(
            "(() => { const e = document.activeElement, s = getComputedStyle(e); "
            "return [e.className, e.dataset.figure || '', s.outlineStyle]; })()"
        )
        met.append(where)
        if where[1] and where[1] not in seen:
            seen.append(where[1])
        if seen == order:
            break
    assert met[0][0] == "skip"
    assert seen == order
    assert all(outline == "solid" for _, figure, outline in met if figure)
    wide.run("document.querySelector('[data-figure=loss]').focus()")
    wide.press("Home", 36)
    wide.press("ArrowRight", 39)
    said = wide.run(
        "document.querySelector('[data-figure=loss]').nextElementSibling.textContent"
    )
    assert said.startswith("Step 1: loss")
    assert math.isclose(float(said.split()[-1]), run[1][1]["loss"], rel_tol=0.5)


def test_the_look_is_changed_by_a_button(wide):
    colours = (
        "[getComputedStyle(document.body).backgroundColor, document.querySelector"
        "('[data-figure=loss]').layout.font.color, document.querySelector"
        "('[data-figure=loss]').data[0].line.color]"
    )
    before = wide.run(colours)
    wide.run("document.getElementById('look').click()")
    wide.wait(f"JSON.stringify({colours}) !== {json.dumps(json.dumps(before))}")
    after = wide.run(colours)
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_an_axis_is_made_linear_by_a_button(wide):
    kind = "document.querySelector('[data-figure=loss]').layout.yaxis.type"
    assert wide.run(kind) == "log"
    press = "document.querySelector('#figure-loss button').click()"
    wide.run(press)
    wide.wait(f"{kind} === 'linear'")
    wide.run(press)
    wide.wait(f"{kind} === 'log'")


def test_a_live_page_takes_what_is_appended(browser, run, tmp_path):
    folder = tmp_path / "live"
    shutil.copytree(run[0], folder)
    with PageServer(open_run(folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            tab = browser.tab(1000, 700)
            tab.open(server.url, f"{DRAWN} && document.documentElement.dataset.version")
            tab.run("document.querySelector('[data-figure=loss]').mark = 'same'")
            version = tab.run("document.documentElement.dataset.version")
            with (folder / "rows.jsonl").open("a") as file:
                file.write('{"step": 9000, "loss": 0.125}\n')
            tab.wait(f"document.documentElement.dataset.version !== '{version}'")
            x, y = drawn(tab, "loss", "loss: rows")
            assert (x[-1], y[-1]) == (9000, 0.125)
            assert "241 rows" in tab.run("document.getElementById('now').textContent")
            # The figure's element stayed: nothing flickers.
            mark = "document.querySelector('[data-figure=loss]').mark"
            assert tab.run(mark) == "same"
            assert all(url.startswith((server.url, "data:")) for url in tab.requests)
            assert tab.complaints == []
        finally:
            server.shutdown()
            thread.join()
