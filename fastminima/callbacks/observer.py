"""What all callbacks share: a probe, a monitor, and when to use them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..capture import CaptureError, GradientProbe
from ..monitor import Logger, Monitor, RunFolder, SpikeDetector
from ..monitor.about import about_run
from ..monitor.run import is_folder
from ..statistics import GradientStatistics
from .batches import leading_size

__all__ = ["BatchSize", "Destination", "Observer", "OnError"]

Destination = Monitor | Logger | str | PathLike[str] | None
"""Where rows go: a monitor, a logger or the path of a file."""
BatchSize = int | Callable[[Any], int] | None
"""Samples of a batch, or a function that says it of a batch; None to look."""
OnError = Literal["raise", "warn"]
"""What a callback does about a `CaptureError`."""


class _Relay(Logger):
    """Hands rows to whatever the library logs to in this run."""

    target: Logger | None = None

    def write(self, row: Mapping[str, float]) -> None:
        if self.target is not None:
            self.target.write(row)


class Observer:
    """Probes the backward passes of every k-th training step and writes their rows.

    Args:
        to: a monitor, a logger, a path ending in ".jsonl" or ".csv", or a folder: then
            rows are by layer, with tables of samples, histograms and spikes.
        every: one step of the optimizer in so many is probed, the first one included,
            with all batches that it accumulates.
        batch_size: samples of a batch, or a function that says it of a batch.
        on_error: what to do about a `CaptureError`: "raise", or "warn" and go on
            without that row.
        options: for `GradientProbe`.

    Raises:
        ValueError: for an unknown word or an `every` below one.
    """

    def __init__(
        self,
        to: Destination,
        every: int,
        batch_size: BatchSize,
        on_error: OnError,
        options: Mapping[str, Any],
    ) -> None:
        if isinstance(every, bool) or int(every) != every or every < 1:
            raise ValueError(f"every must be a positive integer, got {every!r}.")
        if on_error not in get_args(OnError):
            raise ValueError(
                f"Unknown on_error {on_error!r}; choose from 'raise', 'warn'."
            )
        self._relay = _Relay()
        self._options = dict(options)
        self._monitor = self._monitor_of(to)
        self.stats: GradientStatistics | None = None
        self.is_due = False  # whether the present batch is probed
        self._every = int(every)
        self._batch_size = batch_size
        self._is_strict = on_error == "raise"
        self._batches = self._steps = 0
        self._step: int | None = None  # of the batch before
        self._samples = 0
        self._passes = 0  # backward passes of the present batch
        self._probe: GradientProbe[GradientStatistics | None] | None = None
        self._tracked: tuple[int, ...] = ()
        self._waiting: tuple[float, Tensor] | None = None
        self._model: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None

    def _monitor_of(self, to: Destination) -> Monitor:
        """The monitor that rows go to; a run's folder gets all there is."""
        if isinstance(to, Monitor):
            return to
        if not is_folder(to):
            return Monitor(self._relay if to is None else to)
        self._options.setdefault("per_parameter", True)
        return Monitor(
            RunFolder(cast(str, to)),
            largest=8,
            histograms=True,
            spikes=SpikeDetector(),
            about=self._about,
        )

    def _about(self) -> dict[str, Any]:
        assert self._model is not None
        settings = {"every": self._every}
        return about_run(self._model, self._optimizer, "layer", settings)

    def size_of(self, batch: Any) -> int:
        """The number of samples of a batch."""
        if callable(self._batch_size):
            return self._batch_size(batch)
        return leading_size(batch) if self._batch_size is None else self._batch_size

    def batch(self, samples: Callable[[], int], step: int) -> bool:
        """A training batch of so many samples begins; says whether it is probed.

        Args:
            samples: says how many.
            step: optimizer steps done so far.
        """
        self.abandon()
        if step != self._step:  # another one than the batch before is part of
            self.is_due = self._steps % self._every == 0
            self._steps += 1
            self._step = step
        self._batches += 1
        self._passes = 0
        if self.is_due:
            self._samples = samples()
        return self.is_due

    def before(self, model: nn.Module, loss: Tensor, given: float) -> None:
        """A backward pass over `loss` is about to run, in a batch that is probed.

        Args:
            model: whose parameters are tracked.
            loss: a scalar.
            given: what the batch's loss has been multiplied with to make `loss`: a
                GradScaler's scale, one over the accumulated batches. (What it will be
                multiplied with before it is differentiated, the probe sees.)

        Raises:
            CaptureError: as `GradientProbe.attach`.
        """
        self.abandon()
        self._passes += 1
        try:
            self._probe_of(model).attach(loss, self._samples, scale=given)
        except CaptureError as error:
            self._fail(error)
        else:
            self._waiting = given, loss.detach()

    def after(
        self,
        step: int,
        optimizer: torch.optim.Optimizer | None = None,
        parts: int = 1,
        to: Logger | None = None,
    ) -> None:
        """That backward pass has run: write its row.

        Args:
            step: optimizer steps done so far.
            optimizer: what takes the step.
            parts: batches that make up one step of the optimizer.
            to: where rows go if no other place was asked for.
        """
        if self._waiting is None:
            return
        assert self._probe is not None
        given, loss = self._waiting
        try:
            stats = self._probe.collect()
        except CaptureError as error:
            self._fail(error)
            return
        finally:
            self.abandon()
        if stats is None:
            return
        self.stats, self._optimizer = stats, optimizer
        self._relay.target = to
        self._monitor.log(
            step,
            stats,
            loss=loss.double() / given,
            optimizer=optimizer,
            batch_size=stats.all_count * parts,
            extra={"batch": self._batches - 1, "backward": self._passes - 1},
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs: counters and running averages."""
        return {
            "batches": self._batches,
            "steps": self._steps,
            "monitor": self._monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where an earlier observer was when it gave its `state_dict`."""
        self._batches, self._steps = state["batches"], state["steps"]
        self._step = None
        self._monitor.load_state_dict(state["monitor"])

    def missed(self) -> None:
        """A batch that is probed is over: complain if no backward pass was seen.

        Raises:
            CaptureError: none was.
        """
        if not self._passes:
            self._fail(
                CaptureError(
                    "No backward pass was seen in this batch: its gradients were not "
                    "made by the call that is watched."
                )
            )

    def abandon(self) -> None:
        """Leave no hook behind, whatever happened."""
        self._waiting = None
        if self._probe is not None:
            self._probe.detach()

    def _probe_of(self, model: nn.Module) -> GradientProbe[GradientStatistics | None]:
        """The probe, anew where other parameters are trained than before."""
        tracked = tuple(id(p) for p in model.parameters() if p.requires_grad)
        if self._probe is None or tracked != self._tracked:
            self._probe = GradientProbe(model, **self._options)
            self._tracked, self._model = tracked, model
        return self._probe

    def _fail(self, error: CaptureError) -> None:
        if self._is_strict:
            raise error
        warnings.warn(f"This step has no gradient statistics: {error}", stacklevel=4)
