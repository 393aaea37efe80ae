"""Packages that are imported only where something asks for them."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["INTEGRATIONS", "extra", "require"]

INTEGRATIONS = "`pip install 'fastminima[integrations]'` for all of them"


def extra(name: str) -> str:
    """What installs fastminima with one of its extras."""
    return f"`pip install 'fastminima[{name}]'`"


def require(module: str, what: str, otherwise: str) -> Any:
    """A module of an optional package, for `what`.

    Raises:
        ImportError: it is not installed; says how to install it, or do `otherwise`.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise  # a package that is there but broken speaks for itself
        raise ImportError(
            f"{what} needs {package}, which is not installed. Run `pip install "
            f"{package}`, or {otherwise}.",
            name=package,
        ) from error
