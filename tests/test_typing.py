"""The types that users' checkers see: of the README's loop, and of words."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_origin

import pytest
import typed_usage

import fastminima as fm

ROOT = Path(__file__).parents[1]
WRONG = [  # a line, and the rule that finds it
    ('fm.GradientProbe(model, mode="fuse")', "reportCallIssue"),
    ("fm.GradientProbe(model, every=2).backward(losses).count", "reportOptional"),
    ("noise_of(fm.GradientProbe(model, every=2))", "reportArgumentType"),
    ('fm.top_eigenpairs(torch.eye(3), which="top")', "reportArgumentType"),
    ('extreme("top")', "reportArgumentType"),
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


def public_functions():
    """Functions and public methods of what the package exports."""
    for module in (fm, fm.callbacks, fm.monitor, fm.optim, fm.theory):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing):
                members = inspect.getmembers(thing, inspect.isfunction)
                yield from (f for n, f in members if n == "__init__" or n[0] != "_")
            elif inspect.isfunction(thing):
                yield thing


def words_of(function):
    """Choices that a function's arguments take by the name of a type."""
    function = inspect.unwrap(function)
    for annotation in function.__annotations__.values():
        text = annotation if isinstance(annotation, str) else ""
        named = [function.__globals__.get(n) for n in re.findall(r"\w+", text)]
        yield from (t for t in [annotation, *named] if get_origin(t) is Literal)


def test_every_choice_of_a_public_argument_can_be_named():
    named = [getattr(fm.typing, name) for name in fm.typing.__all__]
    words = [word for function in public_functions() for word in words_of(function)]
    assert len(words) > 15
    assert [word for word in words if word not in named] == []
    choices = {t for t in named if get_origin(t) is Literal}
    assert choices == set(words), "one that no public argument takes"
