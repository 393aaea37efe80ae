"""Rows as runs of a tracking library: Weights & Biases, Trackio, MLflow.

A run is started by the first row. What is logged to a run that somebody else started
stays beside what is there, and the run is left open.
"""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .._optional import extra, require
from .loggers import Logger, occupied

__all__ = ["MLflow", "Trackio", "WandB"]

_MLFLOW_BATCH = 1000  # metrics that its servers take in one request


class _Tracker(Logger):
    """A run of a library whose `init` gives one that has `log` and `finish`."""

    def __init__(self, library: Any, run: Any, options: Mapping[str, Any]) -> None:
        given = sorted(name for name, value in options.items() if value is not None)
        if run is not None and given:
            raise ValueError(
                f"A run that is already there takes no options, got {given}. Give them "
                f"to {library.__name__}.init, or leave `run` out."
            )
        self._library = library
        self._options = dict(options)
        self._run = run
        self._is_mine = run is None

    def _started(self) -> Any:
        if self._run is None:
            self._run = self._library.init(**self._options)
        return self._run

    def close(self) -> None:
        """Finish the run if it was started here."""
        if self._is_mine and self._run is not None:
            self._run.finish()
            self._run = None


class WandB(_Tracker):
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
        library = require("wandb", "Logging to Weights & Biases", extra("wandb"))
        super().__init__(library, run, {"project": project, **options})
        self._has_axis = False

    def write(self, row: Mapping[str, float]) -> None:
        """Log one row; the first one starts the run."""
        self._started().log(dict(row))

    def write_histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Log a histogram, without the empty bins at its ends (at most 512 others)."""
        edges, counts = occupied(edges, counts)
        if counts:
            histogram = self._library.Histogram(np_histogram=(counts, edges))
            self._started().log({"step": step, name: histogram})

    def _started(self) -> Any:
        run = super()._started()
        if not self._has_axis:
            run.define_metric("step", hidden=True)
            # Other names in somebody else's run may be theirs.
            ours = ("gradient/*", "factors/*", "sharpness/*", "layers/*")
            for names in ("*",) if self._is_mine else ours:
                run.define_metric(names, step_metric="step")
            self._has_axis = True
        return run

    def close(self) -> None:
        """Finish the run if it was started here."""
        super().close()
        self._has_axis = self._run is not None


class Trackio(_Tracker):
    """A run of Trackio, which keeps it in a database on this machine.

    Look at it with `trackio show --project NAME`; the database is below `TRACKIO_DIR`.
    A thread writes rows about twice a second; a training process that is killed may
    lose those of its last second. Trackio finishes a run that is open in the process
    when it starts another.

    Args:
        project: its project.
        run: a run that is already there (`trackio.init(...)`), in place of one of its
            own.
        options: for `trackio.init`, such as `name`, `config`, `space_id`.

    Raises:
        ImportError: trackio is not installed.
        ValueError: for options beside a run, or neither a run nor a project.
    """

    def __init__(
        self, project: str | None = None, *, run: Any = None, **options: Any
    ) -> None:
        library = require("trackio", "Logging to Trackio", extra("trackio"))
        if project is None and run is None:
            raise ValueError(
                "A run of Trackio needs a project: Trackio('my-project'), or "
                "Trackio(run=run) for a run that is already there."
            )
        super().__init__(library, run, {"project": project, **options})

    def write(self, row: Mapping[str, float]) -> None:
        """Log one row at its step; the first one starts the run."""
        numbers = {name: value for name, value in row.items() if name != "step"}
        self._started().log(numbers, step=int(row["step"]))

    def write_histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[int]
    ) -> None:
        """Log a histogram, without the empty bins at its ends."""
        edges, counts = occupied(edges, counts)
        if counts:
            histogram = self._library.Histogram(np_histogram=(counts, edges))
            self._started().log({name: histogram}, step=step)


class MLflow(Logger):
    """A run of MLflow.

    It goes through MLflow's client: the active run of the process is not touched. A row
    is with the tracking server when `write` returns. Characters that MLflow does not
    take in the name of a metric become underscores. There are no histograms.

    The extra `mlflow` brings mlflow-skinny, which writes to a server; for a database on
    this machine (`sqlite:///mlflow.db`) install MLflow itself.

    Args:
        experiment: its name; made where there is none.
        run_id: of a run that is already there, in place of one of its own.
        tracking_uri: of the server or the folder; None for what MLflow is set to.
        options: for `MlflowClient.create_run`, such as `run_name` and `tags`.

    Raises:
        ImportError: MLflow is not installed.
        ValueError: for an experiment or options beside a run.
    """

    def __init__(
        self,
        experiment: str | None = None,
        *,
        run_id: str | None = None,
        tracking_uri: str | None = None,
        **options: Any,
    ) -> None:
        self._mlflow = require("mlflow", "Logging to MLflow", extra("mlflow"))
        given = sorted(options) + ([] if experiment is None else ["experiment"])
        if run_id is not None and given:
            raise ValueError(
                f"The run {run_id!r} is already there and takes no options, got "
                f"{given}. Leave them or `run_id` out."
            )
        self._experiment = "Default" if experiment is None else experiment
        self._options = options
        self._uri = tracking_uri
        self._run_id = run_id
        self._is_mine = run_id is None
        self._client: Any = None

    def write(self, row: Mapping[str, float]) -> None:
        """Log one row at its step; the first one starts the run."""
        client, now = self._started(), int(1000 * time.time())
        metric = self._mlflow.entities.Metric
        metrics = [
            metric(_mlflow_name(name), float(value), now, int(row["step"]))
            for name, value in row.items()
            if name != "step"
        ]
        for at in range(0, len(metrics), _MLFLOW_BATCH):
            client.log_batch(self._run_id, metrics[at : at + _MLFLOW_BATCH])

    def _started(self) -> Any:
        if self._client is None:
            self._client = self._mlflow.MlflowClient(self._uri)
        if self._run_id is None:
            found = self._client.get_experiment_by_name(self._experiment)
            experiment = (
                self._client.create_experiment(self._experiment)
                if found is None
                else found.experiment_id
            )
            run = self._client.create_run(experiment, **self._options)
            self._run_id = run.info.run_id
        return self._client

    def close(self) -> None:
        """Finish the run if it was started here."""
        if self._is_mine and self._run_id is not None:
            self._client.set_terminated(self._run_id)
            self._run_id = None


def _mlflow_name(name: str) -> str:
    """Letters, digits and `_-. :/`, and no path that leads elsewhere."""
    return posixpath.normpath(re.sub(r"[^\w\-. :/]", "_", name)).lstrip("/")
