"""The documentation's site: its reference has every name, its checks can fail."""

import importlib
import re
import zlib
from pathlib import Path

import pytest

from benchmarks import pages
from tools.site import check

ROOT = Path(__file__).parents[1]
DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
BESIDE = sorted((ROOT / "docs/coming_from").glob("*.md"))


def documented():
    found = [path.read_text() for path in (ROOT / "docs/api").glob("*.md")]
    return [name for text in found for name in DIRECTIVE.findall(text)]


def test_every_public_name_is_in_the_reference_once():
    modules = {name: importlib.import_module(name) for name in check.MODULES}
    exported = {
        f"{m}.{name}" for m, module in modules.items() for name in module.__all__
    }
    names = documented()
    assert set(names) == exported - set(modules) == check.public_names()
    assert len(names) == len(set(names)) > 50


def site(folder, html, names=None):
    """A site of one page, and the inventory of these names."""
    names = check.public_names() if names is None else names
    lines = "".join(f"{name} py:class 1 api.html#$ -\n" for name in names)
    head = b"# Sphinx inventory version 2\n# Project: x\n# Version: 0\n# zlib\n"
    (folder / "objects.inv").write_bytes(head + zlib.compress(lines.encode()))
    for page in (ROOT / "docs").rglob("*.md"):
        (folder / f"{page.parent.name}-{page.stem}.html").touch()
    (folder / "page.html").write_text(html)
    return list(check.faults(folder))


@pytest.mark.parametrize(
    ("html", "wrong"),
    [
        ("<p>the product <g_n, v> of</p>", "is no tag"),
        ('<script src="https://cdn.example/x.js"></script>', "loads https://cdn"),
        ('<link rel="stylesheet" href="//fonts.example/x.css">', "loads //fonts"),
        ('<link rel="stylesheet" href="assets/gone.css">', "gone.css is not there"),
        ('<img src="../gone.png#only-light">', "gone.png is not there"),
        ("<p>These:\n- one\n- two</p>", "'- one'"),
        ("<p>a table\n| a | b |\n|---|---|</p>", "'| a | b |'"),
        ("<li>and\n```python\nx = 1</li>", "'```python'"),
    ],
)
def test_what_went_wrong_in_a_page_is_found(tmp_path, html, wrong):
    found = site(tmp_path, html)
    assert found, html
    assert wrong in found[0]


def test_a_page_without_faults(tmp_path):
    html = (
        '<p>a - b, <a href="https://x.example">x</a> <code>| a |</code></p>'
        '<img src="page.html"><ul><li>one</li></ul><p><strong>1. One.</strong></p>'
    )
    assert site(tmp_path, html) == []


def test_a_name_that_is_missing_is_found(tmp_path):
    names = check.public_names() - {"fastminima.trace"}
    assert site(tmp_path, "", names) == ["fastminima.trace is in no page of docs/api/"]


@pytest.mark.parametrize("page", BESIDE, ids=lambda page: page.stem)
def test_pairs_of_code_leave_what_is_compared(page):
    found = [b for b in pages.blocks(page.read_text()) if b.pair is not None]
    pairs = {b.pair: b.options for b in found}
    assert len(pairs) >= 4
    for pair, options in pairs.items():
        theirs, ours = (b for b in found if b.pair == pair)
        assert theirs.is_theirs
        assert not ours.is_theirs
        if "raises" not in options:
            assert "theirs =" in theirs.code
            assert "ours =" in ours.code


def beside(theirs, ours, options=""):
    return (
        f'text\n\n<div class="beside"{options} markdown>\n\n```py\n{theirs}\n```\n\n'
        f"```python\n{ours}\n```\n\n</div>\n"
    )


def test_pages_that_agree(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 2.0\n```\n"
        + beside("theirs = [x, 1]", "ours = [2, 1.00001]")
        + beside("theirs = x", "ours = 2.1", ' data-rtol="0.1"')
        + beside("1 / 0", "x = 3", ' data-raises="ZeroDivisionError"')
        + "```python\nassert x == 3\n```\n"
    )
    assert pages.run(page) == 2
    assert capsys.readouterr().out.count("apart by") == 2


@pytest.mark.parametrize(
    "text",
    [
        beside("theirs = 1", "ours = 1.01"),
        beside("theirs = 1", "ours = [1]"),
        beside("theirs = 1", "ours = float('nan')"),
        beside("pass", "pass", ' data-raises="RuntimeError"'),
    ],
)
def test_pages_that_do_not(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError):
        pages.run(page)


def test_a_page_with_nothing_to_compare(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n")
    with pytest.raises(AssertionError, match="nothing to compare"):
        pages.main([str(page)])
