"""An extension of griffe: docstrings written for a terminal, as Markdown.

`help()` shows them as they are, so they stay plain; what Markdown would take for
something else is written for it here.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

# What griffe knows as a section of code is called so.
EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
# <g_n, v>, which would be a tag of HTML; not in code, nor in a comparison.
INNER_PRODUCT = re.compile(r"<([^<>`\n]+,[^<>`\n]+)>")
CODE = re.compile(r"^\s*(>>>|\.\.\.)")


class AsMarkdown(griffe.Extension):
    """Rewrites the docstring of every object that is loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """See `as_markdown`."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Sections named as griffe expects, inner products in brackets of their own."""
    text = EXAMPLE.sub(r"\1Examples:", text)
    return "\n".join(
        line if CODE.match(line) else INNER_PRODUCT.sub(r"⟨\1⟩", line)
        for line in text.split("\n")
    )
