"""A figure in a notebook that follows the run."""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .._optional import extra, require
from .figure import plot
from .loggers import Logger
from .panels import panels_of

__all__ = ["LiveFigure"]

_SHARE = 20  # drawing takes at most one part in so many of the time


class LiveFigure(Logger):
    """The figure of `fm.monitor.plot` below the cell that trains, drawn as rows come.

    It is drawn at the first row that has something to draw, then at most every
    `seconds`, for at most a twentieth of the time, and once more when it is closed. It
    keeps one place in the cell's output. Rows stay in memory.

    Args:
        seconds: between two drawings, at least.
        columns: as for `plot`.

    Raises:
        ImportError: IPython or matplotlib is not installed.
        ValueError: `seconds` is negative.

    Example:
        In a notebook::

            with fm.monitor.Monitor(fm.monitor.LiveFigure(), "run.jsonl") as monitor:
                for step, (x, y) in enumerate(batches):
                    ...
                    monitor.log(step, stats, loss=losses.mean(), optimizer=optimizer)
    """

    def __init__(
        self, seconds: float = 2.0, *, columns: Sequence[str] | None = None
    ) -> None:
        if not seconds >= 0:
            raise ValueError(f"seconds must not be negative, got {seconds}.")
        self._display = require(
            "IPython.display", "fm.monitor.LiveFigure", extra("notebook")
        )
        require("matplotlib", "fm.monitor.LiveFigure", extra("notebook"))
        self._seconds = seconds
        self._columns = columns
        self._rows: list[dict[str, float]] = []
        self._handle: Any = None
        self._drawn = 0  # rows in the figure that is shown
        self._next = 0.0  # when it may be drawn again

    def write(self, row: Mapping[str, float]) -> None:
        """Keep the row, and draw all if it is time to."""
        self._rows.append(dict(row))
        if time.monotonic() >= self._next:
            self._draw()

    def close(self) -> None:
        """Draw what came since; a later row goes on in the same figure."""
        if self._drawn < len(self._rows):
            self._draw()

    def _draw(self) -> None:
        started = time.monotonic()
        image = self._image()
        if image is None:
            return
        if self._handle is None:
            self._handle = self._display.display(image, display_id=True)
        else:
            self._handle.update(image)
        self._drawn = len(self._rows)
        now = time.monotonic()
        self._next = now + max(self._seconds, (_SHARE - 1) * (now - started))

    def _image(self) -> Any:
        """The figure as an image; None as long as there is nothing to draw."""
        names = {name for row in self._rows for name in row}
        columns = self._columns
        if columns is not None:  # one that comes later is drawn then
            columns = [name for name in columns if name in names]
        if not panels_of(self._rows, columns):
            return None
        png = io.BytesIO()
        plot(self._rows, columns=columns).savefig(png, format="png", dpi=90)
        return self._display.Image(data=png.getvalue())
