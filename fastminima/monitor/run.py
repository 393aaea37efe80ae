"""`RunFolder`: everything that is known of a run, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

from .loggers import Logger, cut_to_whole_lines

__all__ = ["RunFolder", "is_folder"]


class RunFolder(Logger):
    """A folder with the rows of a run, its largest samples, spikes and histograms.

    run.json says what was trained, with what, where; rows.jsonl, samples.jsonl,
    histograms.jsonl and spikes.jsonl have a JSON object a line. Each line is written by
    one call of the system, so a process that is killed loses nothing that was logged;
    a spike is on the disk when it returns, so a machine that stops does not lose it
    either. Numbers that JSON does not have, NaN and
    infinity, become null. What is there is appended to; a last line that a crash cut
    off is taken away first.

    Args:
        folder: where; made if it is missing.

    Raises:
        ValueError: there is a file of that name.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.is_file():
            raise ValueError(
                f"{str(folder)!r} is a file, and a run is a folder. Choose another "
                "name, or one that ends in '.jsonl' or '.csv' for a file of rows."
            )
        self._files: dict[str, BinaryIO] = {}

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row to rows.jsonl."""
        if "rows" not in self._files and row.get("step") == 0:
            self._warn_of_another()
        self._add("rows", row)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Add the largest samples of a step to samples.jsonl."""
        self._add("samples", {"step": step, "samples": samples})

    def write_histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Add a histogram, whose bins are evenly wide in the logarithm."""
        ends = [math.log2(edges[0]), math.log2(edges[-1]), len(counts)]
        line = {"step": step, "name": name, "edges_log2": ends, "counts": list(counts)}
        self._add("histograms", line)

    def write_spike(self, spike: Mapping[str, Any]) -> None:
        """Add a spike to spikes.jsonl, and see that it is on the disk."""
        is_new = "spikes" not in self._files
        os.fsync(self._add("spikes", spike))
        if is_new and hasattr(os, "O_DIRECTORY"):  # its name too; not on Windows
            folder = os.open(self.folder, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def write_run(self, about: Mapping[str, Any]) -> None:
        """Write run.json; of a run that goes on, when it started stays."""
        path = self.folder / "run.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        found = dict(about)
        if path.exists():
            with contextlib.suppress(json.JSONDecodeError):  # what is there is replaced
                earlier = json.loads(path.read_text(encoding="utf-8"))
                found["started"] = earlier.get("started", found.get("started"))
        new = path.with_suffix(".json.new")
        new.write_text(json.dumps(_finite(found), indent=1) + "\n", encoding="utf-8")
        new.replace(path)

    def close(self) -> None:
        """Close the files; a later row opens them again."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _warn_of_another(self) -> None:
        """Say that a run that begins goes into the folder of an earlier one."""
        path = self.folder / "rows.jsonl"
        if path.exists() and path.stat().st_size:
            warnings.warn(
                f"{self.folder} has the rows of an earlier run, and this one begins at "
                "step 0: its rows are added to them, and the page shows both, one "
                "after the other. Choose another folder, or delete that one.",
                stacklevel=7,
            )

    def _add(self, name: str, line: Mapping[str, Any]) -> int:
        """Add a line to a file; returns the file's descriptor."""
        try:
            text = json.dumps(line, allow_nan=False, default=str)
        except ValueError:  # rarely: looking at each number takes as long again
            text = json.dumps(_finite(line), allow_nan=False, default=str)
        if name not in self._files:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._files[name] = _opened(self.folder / f"{name}.jsonl")
        file = self._files[name]
        file.write(text.encode() + b"\n")
        return file.fileno()


def is_folder(to: Any) -> bool:
    """Whether rows are to go to a folder: a path without the ending of a file."""
    is_path = isinstance(to, (str, PathLike))
    return is_path and not os.fspath(to).endswith((".jsonl", ".csv"))


def _opened(path: Path) -> BinaryIO:
    """A file to append lines to, without one that was cut off."""
    cut_to_whole_lines(path)
    return path.open("ab", buffering=0)


def _finite(value: Any) -> Any:
    """The same with null for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value
