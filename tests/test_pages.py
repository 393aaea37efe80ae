"""Files, folders and modules that the pages name are there."""

import re
import subprocess
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
KINDS = r"\.(?:py|md|h|cpp|cu|cuh|json|sh|toml|txt)"
# `dense.cpp`, `ops/<family>.py`; `native/`; `tools/kernels`, since there is a tools/
FILE = re.compile(rf"[\w.<>*/-]*[\w>*]{KINDS}")
FOLDER = re.compile(r"(?:[\w.<>*-]+/)+")
PATH = re.compile(r"[\w.<>*-]+(?:/[\w.<>*-]+)+")
MODULE = re.compile(r"-m ([\w.]*\w)")


@cache
def files():
    """Every file that git has, and that is there."""
    command = ["git", "-C", str(ROOT), "ls-files"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"not a clone: {found.stderr}", allow_module_level=True)
    return {name for name in found.stdout.splitlines() if (ROOT / name).exists()}


@cache
def folders():
    """Those of all files: one with nothing but bytecode in it is none."""
    return {str(f) for path in files() for f in Path(path).parents} - {"."}


def tops():
    return {name for name in folders() if "/" not in name and name[0] != "."}


def pages():
    """Every page but the changelog, which may name what has gone."""
    return sorted(n for n in files() if n.endswith(".md") and n != "CHANGELOG.md")


def paths(text):
    """The words in backticks that look like files or folders of this repository."""
    for span in SPAN.findall(FENCE.sub("", text)):
        for word in span.split():
            is_ours = PATH.fullmatch(word) and word.split("/")[0] in tops()
            if is_ours or FILE.fullmatch(word) or FOLDER.fullmatch(word):
                yield word


def modules(text):
    """Modules of this repository that commands run, in blocks too."""
    found = MODULE.findall(text)
    return [name for name in found if name.split(".")[0] in tops()]


def exists(path):
    """Whether it is a path, or the end of one; `*` and `<family>` are anything."""
    pattern = re.sub(r"<\w+>", "*", path.rstrip("/"))
    known = folders() if path.endswith("/") else files() | folders()
    return any(fnmatchcase(f"/{name}", f"*/{pattern}") for name in known)


def runs(module):
    """Whether `python -m` finds a module."""
    place = module.replace(".", "/")
    return not files().isdisjoint((f"{place}.py", f"{place}/__main__.py"))


def missing(text):
    """The paths and modules in a text that are not there."""
    gone = [path for path in paths(text) if not exists(path)]
    return gone + [name for name in modules(text) if not runs(name)]


@pytest.mark.parametrize("page", pages())
def test_what_a_page_names_is_there(page):
    assert not missing((ROOT / page).read_text())


def layout():
    """Folders in the map of CONTRIBUTING.md: what is indented lies in the last one."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = text.split("## Layout\n")[1].split("```")[1]
    above = ""
    for line in block.splitlines():
        names = [word.rstrip("/") for word in line[:27].split() if word.endswith("/")]
        if not line.startswith(" ") and names:
            (above,) = names
        yield from (above if above == n else f"{above}/{n}" for n in names)


def test_the_map_has_every_folder():
    package = {n for n in folders() if re.fullmatch(r"fastminima/\w+", n)}
    named = list(layout())
    assert len(named) > 10
    assert set(named) == tops() | package


def test_the_check_can_fail():
    assert len(pages()) > 10
    assert sum(len(list(paths((ROOT / page).read_text()))) for page in pages()) > 100
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert "tools.kernels.report" in modules(text)
    for here in ("tests/test_pages.py", "docs/", "ops/<family>.py", "tools/kernels"):
        assert not missing(f"See `{here}`.")
    gone = ("tests/no_such.py", "no_such.cpp", "tools/no_such", "no_such/")
    for path in (*gone, "fastminima/<family>_no_such.py", "python -m tools.no_such"):
        assert missing(f"See `{path}`.") == [path.split()[-1]], path
    assert not missing("`gradient/count`, `Conv1d/2d/3d`, `.cu`\n```\n`a.py`\n```\n")
