"""What all callbacks share: a probe, a monitor, and when to use them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..capture import CaptureError, GradientProbe
from ..monitor import Logger, Monitor
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
    """Probes the backward passes of every k-th training batch and writes their rows.

    Args:
        to: a monitor, a logger or a path ending in ".jsonl".
        every: one training batch in so many is probed, the first one included.
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
        if isinstance(to, Monitor):
            self._monitor = to
        else:
            self._monitor = Monitor(self._relay if to is None else to)
        self.stats: GradientStatistics | None = None
        self.is_due = False  # whether the present batch is probed
        self._every = int(every)
        self._batch_size = batch_size
        self._is_strict = on_error == "raise"
        self._options = dict(options)
        self._batches = 0
        self._samples = 0
        self._passes = 0  # backward passes of the present batch
        self._probe: GradientProbe[GradientStatistics | None] | None = None
        self._tracked: tuple[int, ...] = ()
        self._waiting: tuple[float, Tensor] | None = None

    def size_of(self, batch: Any) -> int:
        """The number of samples of a batch."""
        if callable(self._batch_size):
            return self._batch_size(batch)
        return leading_size(batch) if self._batch_size is None else self._batch_size

    def batch(self, samples: Callable[[], int]) -> bool:
        """A training batch of so many samples begins; says whether it is probed."""
        self.abandon()
        self.is_due = self._batches % self._every == 0
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
        self.stats = stats
        self._relay.target = to
        self._monitor.log(
            step,
            stats,
            loss=loss.double() / given,
            optimizer=optimizer,
            batch_size=stats.all_count * parts,
            extra={"batch": self._batches - 1, "backward": self._passes - 1},
        )

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
            self._tracked = tracked
        return self._probe

    def _fail(self, error: CaptureError) -> None:
        if self._is_strict:
            raise error
        warnings.warn(f"This step has no gradient statistics: {error}", stacklevel=4)
