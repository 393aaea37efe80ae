"""Every Python block of README.md and docs/ runs, in the order of its page."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
ANCHOR = re.compile(r"\]\((?!https?:)([^)#]*)#([^)]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def name(path):
    return str(path.relative_to(ROOT))


def blocks(path):
    """Each block's code, padded so that tracebacks show the page's own line numbers."""
    text = path.read_text()
    for found in BLOCK.finditer(text):
        yield "\n" * text[: found.start(1)].count("\n") + found[1]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_run(page, capsys):
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for code in blocks(page):
        exec(compile(code, str(page), "exec"), namespace)


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    fences = [("python", "x = 1"), ("sh", "ls"), ("python", "1 / 0")]
    text = "".join(f"```{kind}\n{code}\n```\n" for kind, code in fences)
    page.write_text("text\n" + text)
    first, second = blocks(page)
    assert first.split() == ["x", "=", "1"]
    with pytest.raises(ZeroDivisionError) as error:
        exec(compile(second, str(page), "exec"), {})
    assert error.traceback[-1].lineno + 1 == 9
    assert list(blocks(ROOT / "README.md"))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_lead_somewhere(page):
    broken = [
        link
        for link in LINK.findall(page.read_text())
        if not (page.parent / link).exists()
    ]
    assert not broken


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_anchors_lead_to_headings(page):
    broken = [
        f"{link}#{anchor}"
        for link, anchor in ANCHOR.findall(page.read_text())
        if anchor not in anchors((page.parent / link) if link else page)
    ]
    assert not broken


def anchors(page):
    """What GitHub calls the headings of a page."""
    titles = (
        re.sub(r"[^\w\- ]", "", t.lower()) for t in HEADING.findall(page.read_text())
    )
    return {title.strip().replace(" ", "-") for title in titles}
