"""Where rows go: JSON lines, TensorBoard, Weights & Biases.

Nothing is opened before the first row: in a distributed run every process makes the
loggers and only one writes.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from .._optional import INTEGRATIONS, require

__all__ = ["JsonLines", "Logger", "TensorBoard", "WandB"]


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
    infinity, which JSON does not have, become null; the row's "is_finite" tells.

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
        if mode not in ("append", "overwrite"):
            raise ValueError(
                f"Unknown mode {mode!r}; choose from 'append', 'overwrite'."
            )
        self.path = Path(path)
        self._open_as = "a" if mode == "append" else "w"

    def write(self, row: Mapping[str, float]) -> None:
        """Add one line."""
        finite = {
            name: None if isinstance(x, float) and not math.isfinite(x) else x
            for name, x in row.items()
        }
        line = json.dumps(finite, allow_nan=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open(self._open_as, encoding="utf-8") as file:
            file.write(line + "\n")
        self._open_as = "a"


class TensorBoard(Logger):
    """Event files for TensorBoard.

    Args:
        folder: where they go; each run a folder of its own.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        require("tensorboard", "TensorBoard logging", INTEGRATIONS)
        self.folder = Path(folder)
        self._writer: Any = None

    def write(self, row: Mapping[str, float]) -> None:
        """Add each number as a scalar at the row's step, and flush."""
        if self._writer is None:
            tensorboard = importlib.import_module("torch.utils.tensorboard")
            self._writer = tensorboard.SummaryWriter(str(self.folder))
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, float(value), int(row["step"]))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(Logger):
    """A run of Weights & Biases.

    Rows carry their step as a column, which is made the x axis: several rows may share
    a step, and other code may log to the same run. A process of wandb's writes them
    when it sees fit; a training process that is killed may lose its last rows.

    Args:
        project: its project; None leaves the choice to wandb.
        run: a run that is already there, in place of one of its own.
        options: for `wandb.init`, such as `mode="offline"`, `name` and `dir`.

    Raises:
        ImportError: wandb is not installed.
        ValueError: for options beside a run.
    """

    def __init__(
        self, project: str | None = None, *, run: Any = None, **options: Any
    ) -> None:
        self._wandb = require("wandb", "Logging to Weights & Biases", INTEGRATIONS)
        if run is not None and (options or project is not None):
            given = sorted(options) + ([] if project is None else ["project"])
            raise ValueError(
                f"A run that is already there takes no options, got {given}. Give them "
                "to wandb.init, or leave `run` out."
            )
        self._options = {"project": project, **options}
        self._run = run
        self._is_mine = run is None
        self._has_axis = False

    def write(self, row: Mapping[str, float]) -> None:
        """Log one row; the first one starts the run."""
        if self._run is None:
            self._run = self._wandb.init(**self._options)
        if not self._has_axis:
            self._run.define_metric("step", hidden=True)
            # Other names in somebody else's run may be theirs.
            ours = ("gradient/*", "factors/*", "sharpness/*")
            for names in ("*",) if self._is_mine else ours:
                self._run.define_metric(names, step_metric="step")
            self._has_axis = True
        self._run.log(dict(row))

    def close(self) -> None:
        """Finish the run if it was started here."""
        if self._is_mine and self._run is not None:
            self._run.finish()
            self._run = None
            self._has_axis = False
