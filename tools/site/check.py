"""Checks of a built site: python -m tools.site.check FOLDER.

That every public name has its place in the reference, that pages load nothing from
elsewhere, and that nothing which is Markdown where the repository is browsed was taken
for text or for tags here.
"""

from __future__ import annotations

import ast
import re
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "fastminima": "fastminima/__init__.py",
    "fastminima.callbacks": "fastminima/callbacks/__init__.py",
    "fastminima.monitor": "fastminima/monitor/__init__.py",
    "fastminima.optim": "fastminima/optim/__init__.py",
    "fastminima.theory": "fastminima/theory.py",
    "fastminima.typing": "fastminima/typing.py",
}
# What Markdown and the theme make; another tag is text that was taken for one.
_TAGS = """
    a abbr article aside b blockquote body br button circle code col colgroup dd details
    div dl dt em footer form g h1 h2 h3 h4 h5 h6 head header hr html img input kbd label
    li link main mark meta nav noscript ol p path pre script section small span strong
    style sub summary sup svg table tbody td th thead title tr ul
"""
TAGS = frozenset(_TAGS.split())
VOID = frozenset(["br", "col", "hr", "img", "input", "link", "meta"])
LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src"}
ELSEWHERE = re.compile(r"(?:[a-z]+:|//)", re.IGNORECASE)
PROSE = frozenset({"p", "li"})
# Beside code, bold text may begin like a list.
VERBATIM = frozenset({"pre", "code", "svg", "strong"})
# Lists, tables, headings and fences that were not seen as such.
UNSEEN = re.compile(r"^\s*(?:[-*] |1\. |\|.*\|$|#+ |```|:::)", re.MULTILINE)


def public_names() -> set[str]:
    """What the modules export, without the modules themselves."""
    found = set()
    for module, path in MODULES.items():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        for node in tree.body:
            if (
                isinstance(node, ast.Assign)
                and ast.unparse(node.targets[0]) == "__all__"
            ):
                found |= {f"{module}.{name}" for name in ast.literal_eval(node.value)}
    return found - set(MODULES)


def documented(folder: Path) -> set[str]:
    """The names of the site's inventory, which other sites can link to."""
    *header, packed = (folder / "objects.inv").read_bytes().split(b"\n", 4)
    if b"zlib" not in header[-1]:
        raise ValueError(f"Not an inventory: {header}.")
    return {line.split()[0] for line in zlib.decompress(packed).decode().splitlines()}


class Page(HTMLParser):
    """Collects what is wrong with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong: list[str] = []
        self.needed: set[str] = set()  # files of the site, as written
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in TAGS:
            self.wrong.append(f"<{tag}> at line {self.getpos()[0]} is no tag")
        if tag not in VOID:
            self._open.append(tag)
        given = dict(attrs)
        address = given.get(LOADED.get(tag, "")) or ""
        if not ELSEWHERE.match(address):
            self.needed.add(address.partition("#")[0].partition("?")[0])
        elif not address.startswith("data:") and given.get("rel") != "canonical":
            self.wrong.append(f"loads {address}")

    def handle_endtag(self, tag: str) -> None:
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if PROSE.isdisjoint(self._open) or not VERBATIM.isdisjoint(self._open):
            return
        for found in UNSEEN.finditer(data):
            line = data[found.start() :].strip().splitlines()[0]
            self.wrong.append(f"reads as text: {line[:60]!r}")


def faults(folder: Path) -> Iterator[str]:
    """What is wrong with a site, a line each."""
    for name in sorted(public_names() - documented(folder)):
        yield f"{name} is in no page of docs/api/"
    pages = sorted(folder.rglob("*.html"))
    if len(pages) < len(list((ROOT / "docs").rglob("*.md"))):
        yield f"{len(pages)} pages only"
    for path in pages:
        yield from (f"{path.relative_to(folder)}: {wrong}" for wrong in wrong_in(path))


def wrong_in(path: Path) -> list[str]:
    """What is wrong with one page, and which files of the site it needs and lacks."""
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    if path.name == "404.html":  # served from anywhere: its addresses are the site's
        return page.wrong
    gone = [name for name in sorted(page.needed) if not (path.parent / name).exists()]
    return page.wrong + [f"{name} is not there" for name in gone]


def main(folder: str) -> int:
    """Print the faults, and return 1 if there are any."""
    found = list(faults(Path(folder)))
    print("\n".join(found) or "the site: every public name, nothing from elsewhere")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
