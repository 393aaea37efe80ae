"""`Monitor`: what was measured in a step, as one row for the loggers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from types import TracebackType

import torch
from torch import Tensor

from ..quantities import three_factors
from ..spectrum import Eigenpairs
from ..statistics import GradientStatistics
from .csv_file import CSV
from .loggers import JsonLines, Logger
from .rows import Row, factors_row, gradient_row, is_finite, sharpness_row
from .smoothing import SmoothedNoiseScale

__all__ = ["Monitor"]


class Monitor:
    """Writes one flat row of named numbers a step to one or more loggers.

    Names are grouped by a slash: "gradient/noise_scale", "factors/temperature",
    "sharpness/eigenvalue_1". "gradient/noise_scale_smoothed" is the ratio of running
    averages of tr Sigma and |E g|^2, which is what to look at: a single step's ratio
    is biased and noisy. "is_finite" says whether every number of the row is.

    Args:
        loggers: `JsonLines`, `CSV`, `TensorBoard`, `WandB`, `MLflow`, `Trackio`,
            `LiveFigure`, or a `Logger` of your own; a path that ends in ".jsonl" is
            short for `JsonLines(path)`, one in ".csv" for `CSV(path)`.
        smoothing: weight of the past in the running averages.
        dataset_size: number of training samples, where batches are drawn without
            replacement; it enters the ratio and the temperature.

    Raises:
        TypeError, ValueError: for something that is not a logger, or a smoothing
            outside [0, 1).

    Example:
        >>> import tempfile, torch, fastminima as fm
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> probe = fm.GradientProbe(model)
        >>> folder = tempfile.TemporaryDirectory()
        >>> with fm.monitor.Monitor(folder.name + "/run.jsonl") as monitor:
        ...     losses = model(torch.randn(8, 3)).square().mean(1)
        ...     stats = probe.backward(losses)
        ...     row = monitor.log(0, stats, loss=losses.mean(), optimizer=optimizer)
        >>> row["gradient/count"], row["factors/batch_size"], row["is_finite"]
        (8, 8, True)
        >>> folder.cleanup()
    """

    def __init__(
        self,
        *loggers: Logger | str | PathLike[str],
        smoothing: float = 0.95,
        dataset_size: int | None = None,
    ) -> None:
        self._loggers = [_logger(one) for one in loggers]
        self._smoothed = SmoothedNoiseScale(smoothing)
        self._dataset_size = dataset_size
        self._has_announced = False

    def log(
        self,
        step: int,
        stats: GradientStatistics | None,
        *,
        loss: float | Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        batch_size: int | None = None,
        sharpness: Eigenpairs | None = None,
        extra: Mapping[str, float] | None = None,
    ) -> Row | None:
        """Write a row and return it; None, and no row, where nothing was measured.

        Args:
            step: of the training loop, the x axis.
            stats: what the probe gave; None on the steps that it leaves out.
            loss: of this step.
            optimizer: adds learning rate, batch size, ratio and temperature.
            batch_size: samples behind one step of the optimizer, where that is not
                the count of `stats`: gradient accumulation, data parallelism.
            sharpness: what a `SharpnessProbe` gave.
            extra: more numbers, by name.
        """
        if stats is None and sharpness is None:
            return None
        row: Row = {"step": step}
        if loss is not None:
            row["loss"] = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if stats is not None:
            row |= self._gradient(stats)
            if optimizer is not None:
                row |= self._factors(optimizer, stats, batch_size or stats.all_count)
        if sharpness is not None:
            row |= sharpness_row(sharpness)
        row |= extra or {}
        row["is_finite"] = is_finite(row)
        for logger in self._loggers:
            logger.write(row)
        return row

    def _gradient(self, stats: GradientStatistics) -> Row:
        row = gradient_row(stats)
        if "gradient/signal" in row:
            row["gradient/noise_scale_smoothed"] = self._smoothed.update(
                row["gradient/covariance_trace"], row["gradient/signal"]
            )
        return row

    def _factors(
        self,
        optimizer: torch.optim.Optimizer,
        stats: GradientStatistics,
        batch_size: int,
    ) -> Row:
        """All three factors, or what is known of them."""
        row = _learning_rates(optimizer) | {"factors/batch_size": batch_size}
        if stats.all_count < 2 or stats.sq_norms is None:
            return row
        try:
            factors = three_factors(optimizer, stats)
        except ValueError as error:
            if not self._has_announced:
                self._has_announced = True
                warnings.warn(
                    f"Rows have no ratio and no temperature: {error}", stacklevel=4
                )
            return row
        return factors_row(
            replace(factors, batch_size=batch_size, dataset_size=self._dataset_size)
        )

    def __repr__(self) -> str:
        names = ", ".join(type(logger).__name__ for logger in self._loggers)
        return f"Monitor({names or 'no logger'})"

    def close(self) -> None:
        """Close the loggers, which finishes a run of W&B that was started here."""
        for logger in self._loggers:
            logger.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _logger(one: Logger | str | PathLike[str]) -> Logger:
    if isinstance(one, Logger):
        return one
    if not isinstance(one, (str, PathLike)):
        raise TypeError(
            f"Expected a logger or a path, got {one!r}. Loggers are JsonLines, CSV, "
            "TensorBoard, WandB, MLflow, Trackio, LiveFigure, and subclasses of "
            "fm.monitor.Logger."
        )
    for ending, kind in ((".jsonl", JsonLines), (".csv", CSV)):
        if str(one).endswith(ending):
            return kind(one)
    raise ValueError(
        f"The path {str(one)!r} does not say what to write: end it in '.jsonl' for "
        "JSON lines, in '.csv' for a table, or pass fm.monitor.TensorBoard(folder)."
    )


def _learning_rates(optimizer: torch.optim.Optimizer) -> Row:
    """One number if all groups agree, else one for each."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if len(set(rates)) == 1:
        return {"factors/learning_rate": rates[0]}
    return {f"factors/learning_rate_{i}": rate for i, rate in enumerate(rates)}
