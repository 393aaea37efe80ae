"""Tables as text, their columns aligned."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import groupby

__all__ = ["aligned", "fitted", "terminal_width"]


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells under their heads, the first column to the left, others right."""
    columns = list(zip(head, *lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(wide) if at else cell.ljust(wide)
            for at, (cell, wide) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )


def terminal_width() -> int | None:
    """Columns of the terminal that text goes to, or of COLUMNS; None for a file."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS"):
        return None
    return shutil.get_terminal_size().columns


def fitted(text: str, width: int | None) -> str:
    """Tables made by `aligned`, with text between them, in lines of at most `width`.

    A table that is wider comes in parts below each other: some columns at a time, after
    the first ones, which say which line is which. Longer text is wrapped.
    """
    if width is None:
        return text
    found: list[str] = []
    for is_table, block in groupby(text.splitlines(), key=lambda line: "  " in line):
        lines = list(block)
        if max(map(len, lines)) <= width:
            found += lines
        elif is_table:
            found += "\n\n".join(_parts(lines, width)).splitlines()
        else:
            found += textwrap.fill(" ".join(lines), width).splitlines()
    return "\n".join(found)


def _parts(block: Sequence[str], width: int) -> list[str]:
    columns = _columns(block)
    names = _naming(columns)
    wide = [max(map(len, column)) for column in columns]
    start = sum(wide[:names]) + 2 * (names - 1)
    parts, room = [list(range(names))], width - start
    for at in range(names, len(columns)):
        if wide[at] + 2 > room and len(parts[-1]) > names:
            parts.append(list(range(names)))
            room = width - start
        parts[-1].append(at)
        room -= wide[at] + 2
    head, *cells = list(zip(*columns, strict=True))
    return [
        aligned(
            [head[at] for at in part], [[line[at] for at in part] for line in cells]
        )
        for part in parts
    ]


def _columns(lines: Sequence[str]) -> list[list[str]]:
    """The cells of each column: two places that are blank in all lines part them."""
    length = max(map(len, lines))
    padded = [line.ljust(length) for line in lines]
    blank = "".join(
        " " if all(c == " " for c in place) else "x"
        for place in zip(*padded, strict=True)
    )
    spans = [found.span() for found in re.finditer(r"x+(?: x+)*", blank)]
    return [[line[begin:end].strip() for line in padded] for begin, end in spans]


def _naming(columns: Sequence[Sequence[str]]) -> int:
    """How many of the first columns it takes to tell the lines apart."""
    for count in range(1, len(columns)):
        if len(set(zip(*columns[:count], strict=True))) == len(columns[0]):
            return count
    return 1
