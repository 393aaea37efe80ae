"""`Monitor`: what was measured in a step, as one row for the loggers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .._processes import find_group
from ..spectrum import Eigenpairs
from ..statistics import GradientStatistics
from . import rows, samples
from .checks import check_options
from .closing import Closing
from .csv_file import CSV
from .factors import Factors, Step, stability_limit
from .layers import By, Grouping, Groups, LayerNumbers
from .loggers import JsonLines, Logger
from .optimizer_norm import OptimizerNorm, Steps
from .origins import Origin, gather_origin, own_origin
from .packing import Packed
from .rows import Row
from .smoothing import SmoothedNoiseScale
from .spikes import Spike, SpikeDetector

__all__ = ["Monitor"]


class Monitor(Closing):
    """Writes one flat row of named numbers a step to one or more loggers.

    Names are grouped by a slash: "gradient/noise_scale", "factors/temperature",
    "sharpness/eigenvalue_1", "layers/encoder.0/share". "gradient/noise_scale_smoothed"
    is the ratio of running averages of tr Sigma and |E g|^2, which is what to look at,
    with its 95 % interval beside it: a single step's ratio is biased and noisy.
    "is_finite" says whether every number measured is. All that a row needs of a device
    is copied at once.

    Args:
        loggers: `JsonLines`, `CSV`, `TensorBoard`, `WandB`, `MLflow`, `Trackio`,
            `LiveFigure`, a `RunFolder`, or a `Logger` of your own; a path that ends in
            ".jsonl" is short for `JsonLines(path)`, one in ".csv" for `CSV(path)`.
        smoothing: weight of the past in the running averages.
        dataset_size: number of training samples, where batches are drawn without
            replacement; it enters the ratio and the temperature.
        by: how parameters are grouped to layers, where the probe has
            `per_parameter=True`: "layer", the module that holds them; "block", the path
            up to its first number; so many steps of the path; "parameter"; or None.
        layers: a regular expression; layers in whose name it is not found have no
            columns.
        layer_intervals: rows have the smoothed noise scale of layers and its interval.
        largest: hand so many samples of each step, those with the largest gradients, to
            loggers that take them.
        histograms: hand histograms of the samples' norms to loggers that take them.
        spikes: finds steps that stand out; a number is short for
            `SpikeDetector(threshold)`.
        max_norm: what the loop gives `clip_grad_norm_`: rows have the factor by which
            it clips, and the ratio and the temperature are those of the clipped step.
        precondition: the model, for the noise scale in the norm of an optimizer that
            is adaptive or takes signs; the probe needs `measure=("norms",
            "second_moments")` and `keep_mean=True`.
        steps: of that optimizer: "preconditioned" or "sign"; None as its name says.
        about: what is known of the run, written before its first row.
        replicas: processes over which gradients are averaged and whose samples are not
            in the statistics: a step has so many times as many samples.

    Raises:
        TypeError, ValueError: for something that is not a logger, or an option outside
            its range.

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
        by: By = "layer",
        layers: str | None = None,
        layer_intervals: bool = False,
        largest: int = 0,
        histograms: bool = False,
        spikes: SpikeDetector | float | None = None,
        max_norm: float | None = None,
        precondition: nn.Module | None = None,
        steps: Steps | None = None,
        about: Callable[[], Mapping[str, Any]] | None = None,
        replicas: int = 1,
    ) -> None:
        check_options(
            largest=largest,
            dataset_size=dataset_size,
            max_norm=max_norm,
            replicas=replicas,
        )
        self._loggers = [_logger(one) for one in loggers]
        self._smoothed = SmoothedNoiseScale(smoothing)
        self._norm = None
        if precondition is not None:
            self._norm = OptimizerNorm(precondition, steps, smoothing)
        is_quiet = precondition is not None
        self._factors = Factors(dataset_size, max_norm, is_quiet=is_quiet)
        self._grouping = Grouping(by, layers)
        self._layers = LayerNumbers(smoothing, is_written=layer_intervals)
        self._largest, self._histograms = largest, histograms
        if spikes is not None and not isinstance(spikes, SpikeDetector):
            spikes = SpikeDetector(spikes)
        self._detector = spikes
        self._about = about
        self._replicas = replicas
        self._rows = 0  # written so far

    def log(
        self,
        step: int,
        stats: GradientStatistics | None,
        *,
        loss: float | Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        batch_size: int | None = None,
        sharpness: Eigenpairs | None = None,
        extra: Mapping[str, float | Tensor] | None = None,
        ids: Sequence[Any] | None = None,
        microbatches: Sequence[int] = (),
        ranks: int = 1,
        gradient_scale: float = 1.0,
        process_group: Any = None,
    ) -> Row | None:
        """Write a row and return it; None, and no row, where nothing was measured.

        Args:
            step: of the training loop, the x axis.
            stats: what the probe gave; None on the steps that it leaves out.
            loss: of this step; or the losses of its samples, whose mean the row has and
                the table of samples the largest ones'.
            optimizer: adds learning rate, batch size, ratio and temperature.
            batch_size: samples behind one step of the optimizer, where that is not
                the count of `stats`: gradient accumulation, data parallelism.
            sharpness: what a `SharpnessProbe` gave.
            extra: more numbers, by name; tensors of one number too.
            ids: what identifies each sample of the batch, for the table of the largest
                and for spikes; their index otherwise. A sample is what `stats` has a
                norm of: of packed rows a document, if the probe was given segments, and
                else a row.
            microbatches: sizes of the batches whose statistics were added up.
            ranks: processes whose samples are in the statistics of each batch, as many
                of each.
            process_group: these processes, or "world", in place of `ranks`: each calls
                `log` with the sizes of its own batches, its own losses and ids, and
                they tell each other: collective calls of a few integers, of the losses
                and, where there are ids, of those in the table as Python objects (1.5
                ms of CPU time with gloo). The row's loss is the mean over all samples;
                without `stats`, where nobody is asked, that of this process.
            gradient_scale: the optimizer's gradient is so many times the mean gradient,
                as where a step of fewer batches is divided as a whole one is: ratio and
                temperature are those of its step, as with clipping.

        Raises:
            TypeError: for a column of `extra` that is not a number.
            ValueError: for a column whose name the row has already; for a process group
                without the sizes of batches; on all ranks, where they have different
                numbers of batches, or only some a loss.
        """
        if stats is None and sharpness is None:
            return None
        if stats is not None:
            batch_size = batch_size or stats.all_count * self._replicas
        if process_group is not None and stats is not None:
            group = find_group(process_group)
            origin, loss = gather_origin(ids, microbatches, stats, loss, group)
        else:
            origin = own_origin(stats, ids, microbatches, ranks)
        losses = loss if isinstance(loss, Tensor) and loss.dim() else None
        groups = self._groups(stats)
        packed = self._asked(stats, loss, losses, sharpness, extra or {}, optimizer)
        numbers = packed.read()
        row: Row = {"step": step}
        if loss is not None:
            row["loss"] = numbers["loss"][0] if "loss" in numbers else float(loss)
        if stats is not None:
            row |= self._gradient(numbers, stats)
            if optimizer is not None:
                found = _step_of(row, numbers, stats, batch_size, gradient_scale)
                row |= self._factors.row(optimizer, found)
        if sharpness is not None:
            row |= rows.sharpness_row(sharpness, numbers)
            limit = None if optimizer is None else stability_limit(optimizer)
            if limit is not None:
                row["sharpness/two_over_lr"] = limit
        if stats is not None and groups is not None and "layers/sq" in numbers:
            row |= self._layers.row(
                *(groups, numbers["layers/sq"], numbers["layers/mean"]),
                stats.all_count,
            )
        row |= rows.extra_row(extra or {}, numbers, row)
        row["is_finite"] = rows.is_finite(row)
        self._write(row, numbers, groups, origin, stats)
        return row

    def _asked(
        self,
        stats: GradientStatistics | None,
        loss: float | Tensor | None,
        losses: Tensor | None,
        sharpness: Eigenpairs | None,
        extra: Mapping[str, float | Tensor],
        optimizer: torch.optim.Optimizer | None,
    ) -> Packed:
        """All that is copied for a row."""
        packed = Packed()
        if isinstance(loss, Tensor):
            packed.add("loss", loss if losses is None else losses.detach().mean())
        if stats is not None:
            rows.ask_for_gradient(packed, stats)
            self._ask_for_parts(packed, stats, losses, optimizer)
        if sharpness is not None:
            rows.ask_for_sharpness(packed, sharpness)
        rows.ask_for_extra(packed, extra)
        return packed

    def _ask_for_parts(
        self,
        packed: Packed,
        stats: GradientStatistics,
        losses: Tensor | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """What is copied of layers and samples."""
        each = stats.sq_norms_by_parameter or {}
        means = stats.mean_grad_sq_norms_by_parameter or {}
        table = torch.stack(list(each.values())) if each else None
        is_asked = self._grouping.by is not None and each.keys() == means.keys()
        if is_asked and table is not None:
            packed.add("layers/sq", table.double().mean(1))
            packed.add("layers/mean", torch.stack([means[name] for name in each]))
        if stats.sq_norms is not None:
            if self._largest:
                samples.ask_for(packed, stats, losses, self._largest, table)
            if self._histograms:
                samples.ask_for_counts(packed, stats)
        if self._norm is not None and optimizer is not None:
            self._norm.ask_for(packed, stats, optimizer)

    def _groups(self, stats: GradientStatistics | None) -> Groups | None:
        if stats is None or not stats.sq_norms_by_parameter:
            return None
        return self._grouping.groups(stats.sq_norms_by_parameter)

    def _gradient(
        self, numbers: Mapping[str, Sequence[float]], stats: GradientStatistics
    ) -> Row:
        row = rows.gradient_row(numbers, stats.count, stats.all_count)
        if "gradient/signal" in row:
            trace, signal = row["gradient/covariance_trace"], row["gradient/signal"]
            row |= self._smoothed.columns("gradient/", trace, signal)
        if self._norm is not None:
            row |= self._norm.row(numbers, stats.all_count)
        return row

    def _write(
        self,
        row: Row,
        numbers: Mapping[str, Sequence[float]],
        groups: Groups | None,
        origin: Origin,
        stats: GradientStatistics | None,
    ) -> None:
        """Give loggers what belongs to the row, then the row.

        So of a process that is killed no row is there without its spikes and samples.
        """
        step, largest = int(row["step"]), []
        if stats is not None and "samples/numbers" in numbers:
            # First: ranks may ask each other, and what writes can fail on one of them.
            count, mean = stats.all_count, row["gradient/mean_grad_sq_norm"]
            largest = samples.table(numbers, count, mean, groups, origin)
        if self._about is not None and not self._rows:
            about = self._about()
            for logger in self._loggers:
                logger.write_run(about)
        self._rows += 1
        counts = [int(count) for count in numbers.get("histogram", ())]
        spikes = [{**one.to_dict(), "samples": largest} for one in self._spikes(row)]
        for logger in self._loggers:
            for spike in spikes:
                logger.write_spike(spike)
            if largest:
                logger.write_samples(step, largest)
            if counts:
                logger.write_histogram(step, samples.HISTOGRAM, samples.EDGES, counts)
            logger.write(row)

    def _spikes(self, row: Row) -> list[Spike]:
        if self._detector is None:
            return []
        square = row.get("gradient/mean_grad_sq_norm")
        norm = None if square is None or square < 0 else square**0.5
        return self._detector.update(int(row["step"]), loss=row.get("loss"), norm=norm)

    def state_dict(self) -> dict[str, Any]:
        """Running averages and windows, for `load_state_dict` of a run that goes on."""
        detector, norm = self._detector, self._norm
        return {
            "smoothed": self._smoothed.state_dict(),
            "preconditioned": None if norm is None else norm.state_dict(),
            "layers": self._layers.state_dict(),
            "spikes": None if detector is None else detector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` of an earlier monitor gave."""
        self._smoothed.load_state_dict(state["smoothed"])
        if self._norm is not None and state["preconditioned"] is not None:
            self._norm.load_state_dict(state["preconditioned"])
        self._layers.load_state_dict(state["layers"])
        if self._detector is not None and state["spikes"] is not None:
            self._detector.load_state_dict(state["spikes"])

    def __repr__(self) -> str:
        names = ", ".join(type(logger).__name__ for logger in self._loggers)
        return f"Monitor({names or 'no logger'})"

    def close(self) -> None:
        """Close the loggers, which finishes a run of W&B that was started here."""
        for logger in self._loggers:
            logger.close()


def _step_of(
    row: Row,
    numbers: Mapping[str, Sequence[float]],
    stats: GradientStatistics,
    batch_size: int | None,
    gradient_scale: float,
) -> Step:
    return Step(
        count=stats.all_count,
        parameter_count=stats.parameter_count,
        covariance_trace=row.get("gradient/covariance_trace"),
        mean_grad_sq_norm=row["gradient/mean_grad_sq_norm"],
        batch_size=batch_size or stats.all_count,
        gradient_scale=gradient_scale,
        preconditioned_trace=numbers.get("preconditioned", [None])[0],
    )


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
        "JSON lines, in '.csv' for a table, or pass fm.monitor.TensorBoard(folder) or "
        "fm.monitor.RunFolder(folder)."
    )
