"""The types that users' checkers see: of the README's loop, and of words."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typed_usage

ROOT = Path(__file__).parents[1]
WRONG = [  # a line, and the rule that finds it
    ('fm.GradientProbe(model, mode="fuse")', "reportCallIssue"),
    ("fm.GradientProbe(model, every=2).backward(losses).count", "reportOptional"),
    ("noise_of(fm.GradientProbe(model, every=2))", "reportArgumentType"),
    ('fm.top_eigenpairs(torch.eye(3), which="top")', "reportArgumentType"),
]


def first_example(page):
    return re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What pyright says of each file, by name: [(line, rule)]."""
    pytest.importorskip("pyright")  # one of the linters
    folder = tmp_path_factory.mktemp("typed")
    usage = Path(typed_usage.__file__).read_text()
    (folder / "readme.py").write_text(first_example((ROOT / "README.md").read_text()))
    (folder / "right.py").write_text(usage)
    (folder / "wrong.py").write_text("\n".join([usage, *(line for line, _ in WRONG)]))
    config = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--outputjson", "-p", str(folder)]
    command += ["--pythonpath", sys.executable]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = {path.name: path.read_text().splitlines() for path in folder.glob("*.py")}
    found = {name: [] for name in lines}
    for each in json.loads(said.stdout)["generalDiagnostics"]:
        name = Path(each["file"]).name
        line = lines[name][each["range"]["start"]["line"]]
        found[name].append((line, each.get("rule", "")))
    return found


def test_the_readme_and_right_uses_have_no_error(found):
    assert found["readme.py"] == []
    assert found["right.py"] == []


def test_wrong_uses_are_found(found):
    for line, rule in WRONG:
        assert any(line == at and met.startswith(rule) for at, met in found["wrong.py"])
