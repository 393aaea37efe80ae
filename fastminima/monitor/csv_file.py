"""Rows as a table of comma-separated values, whose columns may grow."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

from .loggers import Logger, checked_mode

__all__ = ["CSV", "read_csv"]


class CSV(Logger):
    """A file of comma-separated values, a line a row, under a header of all names.

    A name that was not there before (the first sharpness of a run) adds a column at
    the right: the file is written anew beside itself and takes its own place in one
    step, so that it is whole whenever it is read. Every row is in the file when `write`
    returns, and no file stays open. What a row does not have is empty, booleans are 1
    and 0, and NaN is `nan`: `pandas.read_csv` gives numbers in all columns.

    Args:
        path: the file; missing folders are made.
        mode: "append" to what is there, or "overwrite" it at the first row. A last line
            that was cut off while it was written is dropped.

    Raises:
        ValueError: for another mode; at the first row, for a file without a "step" in
            its header.

    Example:
        >>> import tempfile, fastminima as fm
        >>> folder = tempfile.TemporaryDirectory()
        >>> table = fm.monitor.CSV(folder.name + "/run.csv")
        >>> table.write({"step": 0, "loss": 2.5})
        >>> table.write({"step": 1, "loss": 2.0, "sharpness/eigenvalue_1": 9.0})
        >>> print(table.path.read_text())
        step,loss,sharpness/eigenvalue_1
        0,2.5,
        1,2.0,9.0
        <BLANKLINE>
        >>> folder.cleanup()
    """

    def __init__(
        self,
        path: str | PathLike[str],
        mode: Literal["append", "overwrite"] = "append",
    ) -> None:
        self.path = Path(path)
        self._is_fresh = checked_mode(mode) == "overwrite"
        self._header: list[str] | None = None  # as in the file; None before the first

    def write(self, row: Mapping[str, float]) -> None:
        """Add one line, and columns where the row has new names."""
        if self._header is None:
            self._header = self._opened()
        new = [name for name in row if name not in self._header]
        if new:
            self._rewrite([*self._header, *new])
        line = _lines([[_cell(row.get(name)) for name in self._header]])
        # One write of the whole line: a process that is killed leaves all or nothing.
        with self.path.open("ab", buffering=0) as file:
            file.write(line)

    def _opened(self) -> list[str]:
        """The header of what is there, which ends with a whole line from then on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._is_fresh or not self.path.exists() or not self.path.stat().st_size:
            self._replace([])
            return []
        header = _header(self.path)
        if not _ends_whole(self.path):
            self._rewrite(header)
        return header

    def _rewrite(self, header: list[str]) -> None:
        """The same lines under a header that begins with the old one."""
        with self.path.open(encoding="utf-8", newline="") as file:
            old = csv.reader(_whole_lines(file))
            next(old, None)
            lines = ([*line, *[""] * (len(header) - len(line))] for line in old)
            self._replace([header] if header else [], lines)
        self._header = header

    def _replace(self, *tables: Iterable[list[str]]) -> None:
        beside = self.path.with_name(self.path.name + ".part")
        with beside.open("wb") as file:
            for table in tables:
                for line in table:
                    file.write(_lines([line]))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


def read_csv(path: str | PathLike[str]) -> list[dict[str, float]]:
    """The rows of a file that `CSV` wrote; a last line that was cut off is left out."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        return [
            {name: _number(cell) for name, cell in line.items() if cell}
            for line in csv.DictReader(_whole_lines(file))
        ]


def _header(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(_whole_lines(file)), [])
    if header and "step" not in header:
        raise ValueError(
            f"{path} has no column 'step' and was not written by fm.monitor.CSV. "
            "Choose another file, or mode='overwrite'."
        )
    return header


def _whole_lines(file: Iterable[str]) -> Iterable[str]:
    return (line for line in file if line.endswith("\n"))


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _lines(cells: Iterable[list[str]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(cells)
    return text.getvalue().encode()


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value) if isinstance(value, int) else float(value))


def _number(cell: str) -> float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)
