"""A hook of mkdocs: pages have the names that they have in the repository.

So a link between two of them is the same on the site and where the repository is
browsed, also from docs/ to examples/ and back. Files that a page links to, such as
figures and records, are on the site too; a link to anything else fails the build.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# With no other page in their part of the site.
ALONE = ("docs/index.md", "docs/recipes.md")
FENCE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
WIDE = re.compile(r'<div class="(beside|figures)"|<!-- results -->')
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's own files, the pages and what they link to."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = [name for name in tracked() if name.endswith(".md") and name != "README.md"]
    assets = [name for name in tracked() if name.startswith("docs/assets/")]
    names = sorted({*pages, *assets, *linked(pages)})
    return Files([*theme, *(as_file(name, config) for name in names)])


def on_page_markdown(markdown: str, page: Page, **others: Any) -> None:
    """Two columns, or a table of many, have the room of the table of contents."""
    if WIDE.search(markdown):
        page.meta["hide"] = ["toc"]
    if page.file.src_uri in ALONE:
        page.meta["hide"] = ["navigation"]


def tracked() -> list[str]:
    """The repository's files, those not yet added to it among them."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in found.stdout.splitlines() if (ROOT / name).is_file()]


def linked(pages: list[str]) -> set[str]:
    """Files of the repository that the pages link to."""
    found: set[str] = set()
    for page in pages:
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for link in LINK.findall(text):
            target = (ROOT / page).parent.joinpath(link).resolve()
            if target.is_file() and target.is_relative_to(ROOT):
                found.add(target.relative_to(ROOT).as_posix())
    return found


def as_file(name: str, config: MkDocsConfig) -> File:
    """A file of the site; those of docs/ lie at its top."""
    file = File(name, str(ROOT), config.site_dir, config.use_directory_urls)
    file.dest_uri = file.dest_uri.removeprefix("docs/")
    return file
