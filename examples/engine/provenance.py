"""By what code, versions and machine a record was made."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import subprocess
import textwrap
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["code_hash", "hashed_code", "provenance"]

ROOT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """Versions, commit and machine."""
    import numpy as np
    import torch

    import fastminima

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "fastminima": fastminima.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device}",
        "threads": torch.get_num_threads(),
    }


@cache
def code_hash(function: Callable[..., Any], package: str = "examples.") -> str:
    """Hash of a function and of all that it uses from the same package.

    Comments, docstrings and layout do not count; nor does code it does not reach. An
    experiment outside `package` counts with its own module's functions.
    """
    texts = hashed_code(function, package)
    joined = "\n".join(texts[name] for name in sorted(texts))
    return hashlib.sha256(joined.encode()).hexdigest()[:12]


def hashed_code(
    function: Callable[..., Any], package: str = "examples."
) -> dict[str, str]:
    """What `code_hash` is of: definitions and constants by dotted name, as text."""
    texts: dict[str, str] = {}
    home = function.__module__.split(".")[0] + "."
    _collect(function, (package, home), texts)
    return texts


def _collect(thing: Any, packages: tuple[str, ...], texts: dict[str, str]) -> None:
    """Add the source of a function or class, and of what it names."""
    thing = inspect.unwrap(thing) if callable(thing) else thing
    module = getattr(thing, "__module__", None) or ""
    name = f"{module}.{getattr(thing, '__qualname__', '')}"
    if not f"{module}.".startswith(packages) or name in texts:
        return
    texts[name] = _source(thing)
    if inspect.isclass(thing):
        names = {n for member in vars(thing).values() for n in _names(member)}
        names |= {base.__name__ for base in thing.__bases__}
    else:
        names = _names(thing)
    space = vars(inspect.getmodule(thing))
    for used in sorted(names):
        found = space.get(used)
        if isinstance(found, types.ModuleType):
            for inner in sorted(names & vars(found).keys()):
                _follow(
                    f"{found.__name__}.{inner}", vars(found)[inner], packages, texts
                )
        elif used in space:
            _follow(f"{module}.{used}", found, packages, texts)


def _follow(
    name: str, value: Any, packages: tuple[str, ...], texts: dict[str, str]
) -> None:
    if (
        inspect.isfunction(value)
        or inspect.isclass(value)
        or hasattr(value, "cache_info")
    ):
        _collect(value, packages, texts)
    elif isinstance(value, (int, float, str, tuple, dict, frozenset)) and (
        name.startswith(packages)
    ):
        texts[name] = (
            repr(value) if not isinstance(value, dict) else repr(sorted(value))
        )


def _names(thing: Any) -> set[str]:
    """Global names and attributes that a function's code refers to, nested ones too."""
    thing = getattr(thing, "__func__", None) or getattr(thing, "fget", None) or thing
    code = getattr(
        inspect.unwrap(thing) if callable(thing) else thing, "__code__", None
    )
    found: set[str] = set()
    waiting = [code] if code is not None else []
    while waiting:
        code = waiting.pop()
        found |= set(code.co_names)
        waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return found


def _source(thing: Any) -> str:
    """The syntax tree of a definition, without docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree)


@cache
def _commit() -> str:
    """The commit of the repository that this runs from, "+" if changed; else ""."""
    if not (ROOT / ".git").exists():
        return ""
    git = ["git", "-C", str(ROOT)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        return ""
    return commit + ("+" if changed else "")
