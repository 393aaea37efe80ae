"""`watch`: everything that is logged of a training loop, by one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .._processes import find_group
from ..capture import GradientProbe
from ..capture.accumulation import Accumulation
from ..capture.options import check_adds_up
from ..spectrum import Eigenpairs, SharpnessProbe
from ..statistics import GradientStatistics
from .about import about_run
from .checks import check_counts, check_names, check_training
from .closing import Closing
from .curving import replicas_of, unless_infinite, warn_of_another_loss
from .layers import By
from .loggers import Logger
from .parts import StepParts
from .recorder import Monitor
from .rows import Row
from .run import RunFolder, is_folder
from .spikes import SpikeDetector

__all__ = ["Watch", "watch"]

To = Logger | str | PathLike[str]


class Watch(Closing):
    """A training loop that is being watched, until `close()`; a context manager.

    Made by `watch`, which says what the options mean.

    Attributes:
        stats: the last `GradientStatistics`, of a whole step.
        row: the last row.
    """

    def __init__(
        self,
        model: nn.Module,
        monitor: Monitor,
        probe: GradientProbe,
        optimizer: torch.optim.Optimizer | None,
        sharpness: SharpnessProbe | None,
        *,
        accumulation: Accumulation,
        every: int,
        sharpness_every: int,
        accumulate: int,
        has_loss: bool,
        folder: RunFolder | None,
        process_group: Any,
    ) -> None:
        self._process_group = process_group
        self.stats: GradientStatistics | None = None
        self.row: Row | None = None
        self._monitor, self._probe, self._optimizer = monitor, probe, optimizer
        self._sharpness, self._has_loss = sharpness, has_loss
        self._has_compared = False  # the loss of curvature with the one trained
        self._every, self._sharpness_every = every, sharpness_every
        self._accumulate, self._folder = accumulate, folder
        self._accumulation = accumulation
        # Looked up once, as by the probe: a walk over the modules takes a while.
        is_followed = accumulate > 1
        self._parameters = dict(model.named_parameters()) if is_followed else {}
        self._parts = StepParts()

    @property
    def step(self) -> int:
        """Steps of the optimizer so far."""
        return self._accumulation.steps

    def __repr__(self) -> str:
        every = "" if self._every == 1 else f", every={self._every}"
        return f"Watch({self._monitor!r}, {self._probe!r}{every}; {self.step} steps)"

    def backward(
        self,
        losses: Tensor,
        batch: Any = None,
        ids: Sequence[Any] | Tensor | None = None,
        *,
        batch_size: int | None = None,
        segment_ids: Tensor | None = None,
        scale: float = 1.0,
        extra: Mapping[str, float | Tensor] | None = None,
    ) -> Row | None:
        """Run a backward pass, in place of `losses.mean().backward()`.

        Returns the row that was written; None on steps that are left out, and for all
        but the last batch of a step that accumulates.

        Args:
            losses: the vector `[batch]` of per-sample losses; or their mean, a scalar.
            batch: what `loss(model, batch)` takes, where sharpness is asked for.
            ids: what identifies each sample, for the tables of samples: a string, a
                number, a tuple. There is one for each of `losses`: of packed rows for
                each document with `segment_ids`, for each row without.
            batch_size: the number of samples behind a scalar loss.
            segment_ids: where documents are packed into rows, as for `GradientProbe`;
                the samples are then the documents.
            scale: what the losses have been multiplied with, such as
                `scaler.get_scale()`.
            extra: more columns of the row; tensors of one number are welcome.

        Raises:
            CaptureError, ValueError: as `GradientProbe.backward`, and where curvature
                is asked for, as `SharpnessProbe`; for ids of another number of samples.
            TypeError: for a column of `extra` that is not a number, and for losses that
                are no tensor.
        """
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses must be a tensor, got {losses!r}.")
        count = len(losses) if losses.dim() else batch_size
        if ids is not None and len(ids) != count:
            raise ValueError(f"There are {len(ids)} ids for {count} samples.")
        is_due = self._begin()
        step, is_last = self.step, self._accumulation.passes == self._accumulate
        given, whole = losses, scale
        if self._accumulate > 1:
            given, whole = losses / self._accumulate, scale / self._accumulate
        try:
            stats, pairs = self._pass(
                *(given, whole, batch_size, segment_ids),
                is_due=is_due,
                curves=is_last and self._wants_sharpness(),
                batch=batch,
            )
        except BaseException:
            self._accumulation.withdraw()
            raise
        if stats is not None or pairs is not None:
            size = count if stats is None else count or stats.all_count
            self._parts.add(losses.detach() / scale, size, 1 / self._accumulate, ids)
        total = self._accumulation.add(stats)
        return self._log(step, total, pairs, extra) if is_last else None

    def end_step(self, extra: Mapping[str, float | Tensor] | None = None) -> Row | None:
        """Write the row of a step of fewer passes than `accumulate`.

        As at the end of an epoch; before the optimizer's step. Its passes have been
        divided as those of a whole step, so the optimizer takes a smaller one: ratio
        and temperature are those of it.
        """
        step = self.step
        return self._log(step, self._accumulation.end(), None, extra)

    def _begin(self) -> bool:
        """Count the pass that is about to run; says whether it is looked at."""
        before = self.step
        rests = self._accumulation.rests(self._parameters)
        if self.step != before:  # that step was over, and nobody said so
            self._parts.clear()
        return not rests

    def _wants_sharpness(self) -> bool:
        return self._sharpness is not None and self.step % self._sharpness_every == 0

    def _pass(
        self,
        losses: Tensor,
        scale: float,
        batch_size: int | None,
        segment_ids: Tensor | None,
        *,
        is_due: bool,
        curves: bool,
        batch: Any,
    ) -> tuple[GradientStatistics | None, Eigenpairs | None]:
        """The backward pass with what is measured in it."""
        sharpness = self._sharpness if curves else None
        options: dict[str, Any] = {"scale": scale, "segment_ids": segment_ids}
        asked = options if is_due else None
        if sharpness is None or not sharpness.is_finite(losses):
            return self._plain(losses, batch_size, asked), None
        if self._has_loss and batch is not None:
            stats = self._plain(losses, batch_size, asked)
            pairs = unless_infinite(sharpness, batch)
            if not self._has_compared and sharpness.evaluated is not None:
                self._has_compared = True
                warn_of_another_loss(losses / scale, sharpness.evaluated)
            return stats, pairs
        if not is_due:
            return None, unless_infinite(sharpness.backward, losses, scale=scale)
        self._probe.attach(losses, batch_size, **options)
        try:
            pairs = unless_infinite(sharpness.backward, losses, scale=scale)
            return self._probe.collect(), pairs
        finally:
            self._probe.detach()

    def _plain(
        self, losses: Tensor, batch_size: int | None, options: Mapping[str, Any] | None
    ) -> GradientStatistics | None:
        """The backward pass alone; probed where there are options for the probe."""
        if options is not None:
            return self._probe.backward(losses, batch_size, **options)
        (losses.mean() if losses.dim() else losses).backward()
        return None

    def _log(
        self,
        step: int,
        stats: GradientStatistics | None,
        pairs: Eigenpairs | None,
        extra: Mapping[str, float | Tensor] | None,
    ) -> Row | None:
        """The passes of a step have run: its row, if it has one."""
        parts, self._parts = self._parts, StepParts()
        if not len(parts):
            return None
        if stats is not None:
            self.stats = stats
        self.row = parts.log(
            self._monitor,
            step,
            stats,
            optimizer=self._optimizer,
            sharpness=pairs,
            extra=extra,
            process_group=self._process_group,
        )
        return self.row

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs: step, running averages, windows."""
        return {"step": self.step, "monitor": self._monitor.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where an earlier watch was when it gave its `state_dict`."""
        self._accumulation.restart(state["step"])
        self._monitor.load_state_dict(state["monitor"])
        self._parts.clear()

    def close(self) -> None:
        """Close the files; says once where the run is."""
        self._probe.detach()
        self._monitor.close()
        folder, self._folder = self._folder, None
        if folder is not None and self.row is not None:
            print(
                f"{self.step} steps are in {folder.folder}; look at them with: "
                f"python -m fastminima report {folder.folder}"
            )


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    to: To | Sequence[To] | None = None,
    every: int = 1,
    sharpness: int | None = None,
    *,
    by: By = "layer",
    layers: str | None = None,
    layer_intervals: bool = False,
    largest: int = 8,
    histograms: bool = True,
    spikes: SpikeDetector | float | None = 6.0,
    smoothing: float = 0.95,
    dataset_size: int | None = None,
    accumulate: int = 1,
    max_norm: float | None = None,
    precondition: bool | Literal["sign"] = False,
    eigenvalues: int = 1,
    **options: Any,
) -> Watch:
    """Watch a training loop: rows by layer, samples, spikes, sharpness, in one folder.

    Call `w.backward(losses)` where the loop has `losses.mean().backward()`, and
    `w.close()` at the end. A step is one of the optimizer's: with `accumulate=k` it is
    k calls of `backward`, each of which backpropagates a k-th of its mean, and the row
    has the statistics of all their samples, each of which counts alike: where calls
    have different numbers of samples, the step's gradient, a mean of means, gives more
    weight to those of the smaller ones.

    Args:
        model: the module that is trained.
        optimizer: adds the three factors, and what curvature is compared with.
        loss: `loss(model, batch)`, the mean loss that curvature is taken of; without it
            (or without `batch`) the graph of the step is differentiated further.
        to: a folder, a path that ends in ".jsonl" or ".csv", a logger of `fm.monitor`,
            or several of these; None to keep nothing but the last row. Of several
            processes the first one writes.
        every: look at one step in so many, the first one included. The others are plain
            backward passes.
        sharpness: measure the largest eigenvalues of the Hessian every so many steps.
        by: how parameters are grouped to layers, as for `Monitor`.
        layers: a regular expression, as for `Monitor`.
        layer_intervals: as for `Monitor`.
        largest: samples in the tables, as for `Monitor`.
        histograms: whether to write them.
        spikes: as for `Monitor`; None to look for none.
        smoothing: weight of the past in running averages.
        dataset_size: as for `Monitor`.
        max_norm: what the loop gives `clip_grad_norm_`, as for `Monitor`.
        accumulate: backward passes that make up one step of the optimizer. It keeps the
            mean gradient so far, so as much memory as two gradients.
        precondition: also the noise scale in the norm of an adaptive optimizer, and the
            temperature in the coordinates in which it is SGD; of optimizers with a
            momentum that are named Lion or Sign..., that of steps by signs; "sign" for
            that of any other that keeps a momentum. It measures second moments.
        eigenvalues: how many.
        options: for `GradientProbe`, such as `batchnorm="rows"` or `mode="fused"`.

    Raises:
        ValueError: for options outside their range; for `max_norm` where several
            processes train and no process group joins their statistics.

    Example:
        >>> import tempfile, torch, fastminima as fm
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> folder = tempfile.TemporaryDirectory()
        >>> w = fm.monitor.watch(model, optimizer, to=folder.name + "/run")
        >>> for step in range(3):
        ...     optimizer.zero_grad()
        ...     row = w.backward(model(torch.randn(8, 3)).square().mean(1))
        ...     optimizer.step()
        >>> row["step"], row["gradient/count"], "layers/(own)/share" in row
        (2, 8, True)
        >>> w.close()  # doctest: +ELLIPSIS
        3 steps are in ...run; look at them with: python -m fastminima report ...run
        >>> folder.cleanup()
    """
    check_counts(every=every, accumulate=accumulate, sharpness=sharpness)
    check_counts(eigenvalues=eigenvalues)
    check_names(options, GradientProbe, watch)
    group = options.get("process_group")
    replicas, is_first = replicas_of(model, group), _is_first(group)
    check_training(model, optimizer, loss, max_norm, replicas)
    asked: dict[str, Any] = {"per_parameter": by is not None}
    if precondition:
        asked |= {"measure": ("norms", "second_moments"), "keep_mean": True}
    asked |= options
    accumulation = Accumulation(
        accumulate, every, keep_mean=asked.get("keep_mean", False), owner="w"
    )
    if accumulate > 1:
        check_adds_up(asked.get("measure", ()))
        asked["keep_mean"] = True
    probe = GradientProbe(model, **asked)
    loggers = _loggers(to)
    settings = {"every": every, "sharpness": sharpness, "dataset_size": dataset_size}
    monitor = Monitor(
        *(loggers if is_first else ()),
        by=by,
        layers=layers,
        layer_intervals=layer_intervals,
        largest=largest,
        histograms=histograms,
        spikes=spikes,
        smoothing=smoothing,
        max_norm=max_norm,
        dataset_size=dataset_size,
        precondition=model if precondition else None,
        steps=precondition if isinstance(precondition, str) else None,
        about=lambda: about_run(model, optimizer, by, settings),
        replicas=replicas,
    )
    curvature = None
    if sharpness is not None:
        curvature = SharpnessProbe(model, loss, eigenvalues)
    folders = [one for one in loggers if isinstance(one, RunFolder)]
    return Watch(
        *(model, monitor, probe, optimizer, curvature),
        accumulation=accumulation,
        every=every,
        sharpness_every=sharpness or 1,
        accumulate=accumulate,
        has_loss=loss is not None,
        folder=folders[0] if folders and is_first else None,
        process_group=group,
    )


def _loggers(to: To | Sequence[To] | None) -> list[Any]:
    """Loggers and paths as `Monitor` takes them; other paths are folders."""
    is_one = isinstance(to, (Logger, str, PathLike))
    several: Sequence[Any] = [to] if is_one else to or []
    return [RunFolder(one) if is_folder(one) else one for one in several]


def _is_first(process_group: Any) -> bool:
    """Whether this process is the one that writes, of a group or of all."""
    if not (dist.is_available() and dist.is_initialized()):
        return True
    group = None if process_group is None else find_group(process_group)
    return dist.get_rank(group) == 0
