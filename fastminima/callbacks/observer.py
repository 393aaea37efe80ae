"""What all callbacks share: a probe, a monitor, and when to use them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from ..capture import CaptureError, GradientProbe
from ..capture.options import check_adds_up
from ..monitor import Logger, Monitor, RunFolder, SpikeDetector
from ..monitor.about import about_run
from ..monitor.run import is_folder
from ..statistics import GradientStatistics
from .batches import leading_size
from .passes import Passes, Waiting

__all__ = ["BatchSize", "Destination", "Observer", "OnError", "Taken"]

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


class Taken(NamedTuple):
    """A step of the optimizer that is about to be taken.

    Attributes:
        number: steps done so far; None where they are counted here.
        optimizer: what takes it; None where that is not known.
        ranks: processes that have as many samples each.
        to: where its row goes if no other place was asked for.
    """

    number: int | None
    optimizer: torch.optim.Optimizer | None
    ranks: int
    to: Logger


class Observer:
    """Probes the backward passes of every k-th training step and writes its row.

    Where a step takes several batches, a row has the statistics of all their samples,
    each of which counts alike. A step of which a pass could not be read, or did not
    come to its end, has no row: one of some of its samples would pass for the step's.

    Args:
        to: a monitor, a logger, a path ending in ".jsonl" or ".csv", or a folder: then
            rows are by layer, with tables of samples, histograms and spikes.
        every: one step of the optimizer in so many is probed, the first one included,
            with all batches that it accumulates.
        batch_size: samples of a batch, or a function that says it of a batch.
        on_error: what to do about a `CaptureError`: "raise", or "warn" and go on
            without the row of that step.
        options: for `GradientProbe`.

    Raises:
        ValueError: for an unknown word, an `every` below one, `accumulate`, or a
            process group.
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
        if "accumulate" in options:
            raise ValueError(
                "How many batches a step accumulates is known from the library that "
                "trains; leave accumulate out."
            )
        if options.get("process_group") is not None:
            raise ValueError(
                "The first process alone measures here, so it would wait for the "
                "others. Leave process_group out: rows are of its own samples. For "
                "those of all processes use fm.monitor.watch in a loop of your own."
            )
        self._relay, self._is_given = _Relay(), isinstance(to, Monitor)
        self._options = dict(options)
        self._monitor = self._monitor_of(to)
        self.stats: GradientStatistics | None = None
        self.is_due = False  # whether the present batch is probed
        self._every = int(every)
        self._batch_size = batch_size
        self._is_strict = on_error == "raise"
        self._batches = self._steps = 0
        self._step: int | None = None  # of the batch before
        self._is_last = True  # whether that one was the last of its step
        self._is_several = False  # whether the step may take several batches
        self._samples = 0
        self._passes = 0  # backward passes of the present batch
        self._has_twins = False  # whether a batch was seen to have several
        self._probe: GradientProbe[GradientStatistics | None] | None = None
        self._made_for: tuple[int, ...] = ()
        self._waiting: Waiting | None = None
        keep_mean = bool(self._options.get("keep_mean"))
        self._whole = Passes(keep_mean=keep_mean)  # those of the present step
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

    def batch(
        self,
        samples: Callable[[], int],
        step: int | None,
        parts: int = 1,
        *,
        is_last: bool = True,
    ) -> bool:
        """A training batch of so many samples begins; says whether it is probed.

        Args:
            samples: says how many.
            step: optimizer steps done so far; None where they are counted here.
            parts: batches that make up one step of the optimizer, or fewer at the end
                of an epoch. With one, each backward pass has a row of its own.
            is_last: whether the step ends with this batch.
        """
        self.abandon()
        if self._is_last if step is None else step != self._step:
            self.forget()
            self.is_due = self._steps % self._every == 0
            self._steps += 1
            self._step = step
        self._is_several = parts > 1
        self._is_last = is_last or not self._is_several
        self._batches += 1
        self._passes = 0
        if self.is_due:
            self._samples = samples()
        return self.is_due

    def before(
        self,
        model: nn.Module,
        loss: Tensor,
        given: float,
        weight: float = 1.0,
        *,
        is_shared: bool = False,
    ) -> None:
        """A backward pass over `loss` is about to run, in a batch that is probed.

        Args:
            model: whose parameters are tracked.
            loss: a scalar.
            given: what the batch's loss has been multiplied with to make `loss`: a
                GradScaler's scale, one over the accumulated batches. (What it will be
                multiplied with before it is differentiated, the probe sees.)
            weight: of the batch's loss in the loss of the step: one over the
                accumulated batches, as a rule.
            is_shared: the loss was divided by a number of the whole step, such as its
                tokens, so that samples of a smaller batch have no larger part in it.

        Raises:
            CaptureError: as `GradientProbe.attach`; for a second pass in a batch where
                a step takes several.
        """
        self.abandon()
        self._passes += 1
        if not self._is_several:
            self.forget()  # an earlier pass of the batch that did not come to its end
        try:
            self._refuse_twins()
            samples = self._samples
            named = dict(model.named_parameters())
            scale = self._whole.begin(named, samples, given, is_shared=is_shared)
            probe = self._probe_of(model, named.values())
            probe.attach(loss, samples, scale=scale)
        except CaptureError as error:
            self._fail(error)
        else:
            self._waiting = Waiting(loss.detach(), scale, weight)

    def after(self, step: Taken) -> None:
        """That backward pass has run: write the row of the step if it was the last."""
        if self._waiting is None:
            return
        assert self._probe is not None
        waiting = self._waiting
        try:
            stats = self._probe.collect()
        except CaptureError as error:
            self._fail(error)
            return
        finally:
            self.abandon()
        assert stats is not None
        self._whole.add(waiting, stats)
        if self._is_last:
            self.finish(step)

    def finish(self, step: Taken) -> None:
        """The step has had its passes: write its row, unless it is written already."""
        if not len(self._whole):
            return
        stats, parts = self._whole.end()
        if stats is None:
            warnings.warn(
                "This step has no gradient statistics: one of its backward passes did "
                "not come to its end.",
                stacklevel=4,
            )
            return
        self.stats, self._optimizer = stats, step.optimizer
        self._relay.target = step.to
        parts.log(
            self._monitor,
            self._steps - 1 if step.number is None else step.number,
            stats,
            optimizer=step.optimizer,
            batch_size=stats.all_count * step.ranks,
            extra={"batch": self._batches - 1, "backward": self._passes - 1},
        )

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs: counters and running averages.

        In the middle of a step that one counts as not begun: its last batches, which
        are all that the gradient of the run that goes on has, are then a step.
        """
        return {
            "batches": self._batches,
            "steps": self._steps - (not self._is_last),
            "monitor": self._monitor.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where an earlier observer was when it gave its `state_dict`."""
        self._batches, self._steps = state["batches"], state["steps"]
        self._step, self._is_last = None, True
        self.forget()
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

    def forget(self) -> None:
        """Leave out what there is of the present step."""
        self.abandon()
        self._whole.end()

    def close(self) -> None:
        """Leave no hook behind, and close the files; a later row opens them again.

        A monitor that was given is its owner's to close.
        """
        self.abandon()
        if not self._is_given:
            self._monitor.close()

    def _probe_of(
        self, model: nn.Module, parameters: Iterable[Tensor]
    ) -> GradientProbe[GradientStatistics | None]:
        """The probe, anew where other parameters are trained than before."""
        tracked = [id(p) for p in parameters if p.requires_grad]
        made_for = *tracked, self._is_several
        if self._probe is None or made_for != self._made_for:
            options = dict(self._options)
            if self._is_several:  # statistics are added up
                check_adds_up(options.get("measure", ()))
                options["keep_mean"] = True
            self._probe = GradientProbe(model, **options)
            self._made_for, self._model = made_for, model
        return self._probe

    def _refuse_twins(self) -> None:
        """Raise CaptureError for several passes a batch, whose samples are the same."""
        if not self._is_several:
            return
        self._has_twins |= self._passes > 1
        if self._has_twins:
            raise CaptureError(
                "There are several backward passes in a batch, and a step accumulates "
                "several batches: the gradient of a sample is a sum over passes, which "
                "their statistics do not tell. Add the losses up before one backward "
                "pass, or train without accumulation; there each pass has a row."
            )

    def _fail(self, error: CaptureError) -> None:
        if self._is_strict:
            raise error
        self.forget()
        if self._is_several:
            self.is_due = False  # for the rest of the step
        warnings.warn(f"This step has no gradient statistics: {error}", stacklevel=4)
