"""A watched run on disk: its folder of files, or one file of rows."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from .appended import AppendedLines
from .columns import Columns
from .tally import Tally

__all__ = ["Run", "open_run"]


class Run:
    """What a run has written so far. Make it by `open_run`; `refresh` reads on.

    Attributes:
        path: the folder, or the file of rows.
        about: what `run.json` says; empty for a run without one.
        columns: the rows.
        spikes: the lines of `spikes.jsonl`.
        tally: how often each sample was among the largest.
        edges: log2 of the first and the last edge of the histograms, and the number
            of bins; None without any.
        histograms: `(step, counts)` of each logged step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start()

    def _start(self) -> None:
        is_folder = self.path.is_dir()
        rows = self.path / "rows.jsonl" if is_folder else self.path
        # Of a file of rows the neighbours belong to other runs.
        near = self.path if is_folder else self.path / "none"
        self._rows = AppendedLines(rows)
        self._samples = AppendedLines(near / "samples.jsonl")
        self._spikes = AppendedLines(near / "spikes.jsonl")
        self._histograms = AppendedLines(near / "histograms.jsonl")
        self._about = near / "run.json"
        self.about: dict[str, Any] = {}
        self.columns = Columns()
        self._strange = 0  # lines of rows without a step
        self.spikes: list[dict[str, Any]] = []
        self.tally = Tally()
        self.edges: tuple[float, float, int] | None = None
        self.histograms: list[tuple[float, array[float]]] = []

    @property
    def name(self) -> str:
        """What to call it."""
        return self.path.resolve().name

    @property
    def skipped(self) -> int:
        """Lines that could not be read."""
        return self._strange + sum(file.skipped for file in self._files)

    @property
    def _files(self) -> tuple[AppendedLines, ...]:
        return self._rows, self._samples, self._spikes, self._histograms

    def refresh(self) -> bool:
        """Read what was appended since the last call; whether there was anything.

        A file that is shorter than before was written anew: all is read again.
        """
        if any(file.shrank() for file in self._files):
            self._start()
        rows, spikes = self._rows.read(), self._spikes.read()
        samples, histograms = self._samples.read(), self._histograms.read()
        for row in rows:
            self._strange += not self.columns.add(row)
        for line in samples:
            self.tally.add(line)
        self.spikes += spikes
        for line in histograms:
            self._add_histogram(line)
        about = _json(self._about)
        has_changed = about != self.about
        self.about = about
        return has_changed or bool(rows or spikes or samples or histograms)

    def _add_histogram(self, line: Mapping[str, Any]) -> None:
        """Keep a histogram; those with other edges before it are dropped."""
        edges, counts = line.get("edges_log2"), line.get("counts")
        if not (
            isinstance(edges, list) and len(edges) == 3 and counts and "step" in line
        ):
            return
        found = float(edges[0]), float(edges[1]), int(edges[2])
        if found != self.edges:
            self.edges, self.histograms = found, []
        self.histograms.append((float(line["step"]), array("d", counts)))


def open_run(path: str | PathLike[str]) -> Run:
    """Read a run: a folder that `fm.monitor.watch` writes, or a file of rows.

    Of a folder, `rows.jsonl` is what it needs; the rest may be missing.

    Raises:
        FileNotFoundError: there is no run there, with what was looked for.

    Example:
        >>> import tempfile, fastminima as fm
        >>> folder = tempfile.TemporaryDirectory()
        >>> fm.monitor.JsonLines(folder.name + "/rows.jsonl").write({"step": 0})
        >>> len(open_run(folder.name).columns)
        1
        >>> folder.cleanup()
    """
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(
            f"There is no run at {str(path)!r}. Give the folder that "
            "fm.monitor.watch(to=...) writes, or a file of rows that ends in '.jsonl'."
        )
    if place.is_dir() and not (place / "rows.jsonl").exists():
        found = sorted(p.name for p in place.iterdir())[:8]
        has = f"it has {', '.join(found)}" if found else "it is empty"
        raise FileNotFoundError(
            f"The folder {str(path)!r} has no rows.jsonl, so it is not a run; {has}. "
            "Give the folder that fm.monitor.watch(to=...) writes."
        )
    if place.is_file() and place.suffix != ".jsonl":
        raise FileNotFoundError(
            f"{str(path)!r} is no run: a file of rows ends in '.jsonl'. Give one, or "
            "the folder that fm.monitor.watch(to=...) writes."
        )
    run = Run(place)
    run.refresh()
    if run.skipped and not len(run.columns):
        raise FileNotFoundError(
            f"None of {run.skipped} lines at {str(path)!r} is a row: a row is a JSON "
            'object with a "step". Give what fm.monitor.watch(to=...) writes.'
        )
    return run


def _json(path: Path) -> dict[str, Any]:
    """A file's object; an empty one where it is missing or half written."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
