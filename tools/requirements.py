"""Prints what an extra of the package asks for, a line each, without building it.

python tools/requirements.py EXTRA [--alone]    --alone leaves out what all users need
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def of_extra(project: dict, extra: str) -> Iterator[str]:
    """Its requirements, and those of extras of the package that it names."""
    for line in project["optional-dependencies"][extra]:
        own = re.fullmatch(rf"{project['name']}\[(.+)\]", line)
        if own is None:
            yield line
            continue
        for other in own[1].split(","):
            yield from of_extra(project, other.strip())


if __name__ == "__main__":
    project = tomllib.loads(PROJECT.read_text())["project"]
    lines = [] if "--alone" in sys.argv else project["dependencies"]
    print(*lines, *of_extra(project, sys.argv[1]), sep="\n")
