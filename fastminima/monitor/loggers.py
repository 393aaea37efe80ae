"""Where rows go: the interface, JSON lines, TensorBoard.

Nothing is opened before the first row: in a distributed run every process makes the
loggers and only one writes.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from .._optional import extra, require

__all__ = [
    "JsonLines",
    "Logger",
    "TensorBoard",
    "checked_mode",
    "cut_to_whole_lines",
    "occupied",
]


class Logger:
    """Takes rows; an interface.

    A row maps names to numbers and has a "step". Subclass it to log elsewhere; what
    is not a row (tables of samples, histograms) a logger takes if it has a way to show
    it, and ignores otherwise.
    """

    def write(self, row: Mapping[str, float]) -> None:
        """Write one row, so that it outlives the process where possible."""
        raise NotImplementedError

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Take the samples with the largest gradients of a step, largest first.

        Args:
            step: of the training loop.
            samples: each with "id", "index", "norm", and what else is known of it.
        """

    def write_histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Take a histogram.

        Args:
            step: of the training loop.
            name: of what was counted, as "gradient/sample_norms".
            edges: where the bins begin and end: one more than there are bins, rising.
            counts: of each bin. What lies outside is in the first or the last.
        """

    def write_spike(self, spike: Mapping[str, Any]) -> None:
        """Take a step that stands out, so that it outlives the process.

        Args:
            spike: "step", "what", "value", "usual", "scale", "z", and the "samples"
                with the largest gradients.
        """

    def write_run(self, about: Mapping[str, Any]) -> None:
        """Take what is known of the run as a whole, before its first row."""

    def close(self) -> None:
        """Release what is open; a later row opens it again."""


class JsonLines(Logger):
    """A file with one JSON object a line.

    Every row is in the file when `write` returns, and no file stays open. NaN and
    infinity, which JSON does not have, become null; the row's "is_finite" tells. A last
    line that a crash cut off is taken away before the first row is added.

    Args:
        path: the file; missing folders are made.
        mode: "append" to what is there, or "overwrite" it at the first row.

    Raises:
        ValueError: for another mode.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        mode: Literal["append", "overwrite"] = "append",
    ) -> None:
        self.path = Path(path)
        self._open_as = "a" if checked_mode(mode) == "append" else "w"
        self._is_first = True

    def write(self, row: Mapping[str, float]) -> None:
        """Add one line."""
        finite = {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in row.items()
        }
        line = json.dumps(finite, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._is_first and self._open_as == "a":
            cut_to_whole_lines(self.path)
        with self.path.open(self._open_as, encoding="utf-8") as file:
            file.write(line + "\n")
        self._open_as, self._is_first = "a", False


class TensorBoard(Logger):
    """Event files for TensorBoard.

    Args:
        folder: where they go; each run a folder of its own.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        require("tensorboard", "TensorBoard logging", extra("tensorboard"))
        self.folder = Path(folder)
        self._writer: Any = None

    def write(self, row: Mapping[str, float]) -> None:
        """Add each number as a scalar at the row's step, and flush."""
        writer = self._opened()
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, float(value), int(row["step"]))
        writer.flush()

    def write_histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Add a histogram, without the empty bins at its ends, and flush."""
        edges, counts = occupied(edges, counts)
        if not counts:
            return
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        weighed = list(zip(counts, middles, strict=True))
        writer = self._opened()
        writer.add_histogram_raw(
            name,
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in weighed),
            sum_squares=sum(count * middle**2 for count, middle in weighed),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )
        writer.flush()

    def _opened(self) -> Any:
        if self._writer is None:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
            self._writer = tensorboard.SummaryWriter(str(self.folder))
        return self._writer

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def cut_to_whole_lines(path: Path) -> None:
    """Take away the last line of a file, if it was cut off while it was written."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        file.seek(max(0, path.stat().st_size - 1))
        if file.read() in (b"", b"\n"):
            return
        file.seek(0)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if _is_json(content[whole:]):  # only the end of the line is missing
            file.write(b"\n")
        else:
            file.truncate(whole)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:  # of the text, or of its encoding
        return False
    return True


def occupied(
    edges: Sequence[float], counts: Sequence[int]
) -> tuple[list[float], list[int]]:
    """A histogram from its first bin that is not empty to the last one.

    Raises:
        ValueError: there is not one edge more than there are bins.
    """
    if len(edges) != len(counts) + 1:
        raise ValueError(
            f"A histogram of {len(counts)} bins has {len(counts) + 1} edges, got "
            f"{len(edges)}."
        )
    filled = [at for at, count in enumerate(counts) if count]
    if not filled:
        return [], []
    first, last = filled[0], filled[-1] + 1
    return list(edges[first : last + 1]), list(counts[first:last])


def checked_mode(mode: str) -> str:
    """`mode`, if it is a word that loggers of files know."""
    if mode not in ("append", "overwrite"):
        raise ValueError(f"Unknown mode {mode!r}; choose from 'append', 'overwrite'.")
    return mode
