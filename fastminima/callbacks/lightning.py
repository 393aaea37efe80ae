"""The callback for Lightning's Trainer."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._optional import INTEGRATIONS, require
from ..monitor import Logger
from ..statistics import GradientStatistics
from .observer import BatchSize, Destination, Observer, OnError, Taken

__all__ = ["LightningProbe"]

# The same library under its two names, whose classes differ.
_PACKAGES = ("lightning", "pytorch_lightning")
_MODULES = ("lightning.pytorch", "pytorch_lightning")
_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel")

if TYPE_CHECKING:
    from lightning.pytorch import Callback as _Callback
else:
    _Callback = object  # which library's it is turns out when one is made


class LightningProbe(_Callback):
    """A Lightning callback that logs gradient statistics while the Trainer trains.

    Made for `lightning.pytorch` or `pytorch_lightning`, whichever is imported (for
    both, if both are): the object is a `Callback` of theirs.

    g_n is the gradient of sample n's own loss: loss scaling and the division by
    `accumulate_grad_batches` are undone. There is one row a step of the optimizer, with
    the statistics of the samples of all batches that it accumulates, each of which
    counts alike; in manual optimization there is one for each `manual_backward`,
    numbered by "backward". "step" is the Trainer's `global_step`, "batch" counts
    batches up to the last one of the step. The last step of an epoch may have fewer
    batches, which Lightning divides as those of a whole one: ratio and temperature are
    those of the smaller step that it takes.

    Args:
        to: a folder, for rows by layer, largest samples, histograms and spikes, and for
            `python -m fastminima report`; a path ending in ".jsonl" or ".csv", a logger
            of `fm.monitor`, or a `Monitor`; None for the Trainer's own loggers.
        every: probe one step of the optimizer in so many, the first one included, with
            all batches that it accumulates.
        batch_size: the number of samples of a batch, or a function that says it of a
            batch; None takes the leading size of its first tensor.
        on_error: "raise", or "warn" and go on where the probe cannot read the graph:
            that step has no row.
        options: for `GradientProbe`, such as `batchnorm="rows"`.

    Attributes:
        stats: the last `GradientStatistics`.

    Raises:
        ImportError: Lightning is not installed.
        ValueError: for an unknown word or an `every` below one. During training: for
            a strategy that shards the parameters.
        CaptureError: during training, as `GradientProbe.attach`.

    Example:
        `Trainer(callbacks=[fm.callbacks.LightningProbe(every=10)])`
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> LightningProbe:
        """An instance that is a callback of the Lightning in use."""
        return object.__new__(_made_for(cls, _callbacks()))

    def __init__(
        self,
        to: Destination = None,
        *,
        every: int = 1,
        batch_size: BatchSize = None,
        on_error: OnError = "raise",
        **options: Any,
    ) -> None:
        self._observer = Observer(to, every, batch_size, on_error, options)

    @property
    def stats(self) -> GradientStatistics | None:
        """Statistics of the last step that was probed."""
        return self._observer.stats

    def state_dict(self) -> dict[str, Any]:
        """What the Trainer keeps in a checkpoint: counters and running averages."""
        return self._observer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._observer.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what cannot be probed."""
        strategy = type(trainer.strategy).__name__
        if strategy.startswith(_SHARDED):
            raise ValueError(
                f"{strategy} shards the parameters; per-sample gradients need them "
                "whole. Use DDP or a single device, or remove LightningProbe."
            )
        self._observer.forget()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the size of the batch."""
        if trainer.is_global_zero:
            size, parts = self._observer.size_of, trainer.accumulate_grad_batches
            is_last = (
                (batch_idx + 1) % parts == 0
                or batch_idx + 1 == trainer.num_training_batches
                or trainer.is_last_batch
            )
            self._observer.batch(
                *(lambda: size(batch), trainer.global_step, parts), is_last=is_last
            )

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Attach to a loss that has been scaled and divided already."""
        if self._observer.is_due:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            weight = 1 / trainer.accumulate_grad_batches
            self._observer.before(pl_module, loss, scale * weight, weight)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Collect, and log after the last batch of a step."""
        if self._observer.is_due:
            self._observer.after(_step_of(trainer))

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log a step whose last batch had no loss."""
        if self._observer.is_due:
            self._observer.finish(_step_of(trainer))

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the files."""
        self._observer.close()

    def on_exception(
        self, trainer: Any, pl_module: Any, exception: BaseException
    ) -> None:
        """Remove the hooks of a backward pass that did not come to its end."""
        self._observer.forget()
        self._observer.close()


def _step_of(trainer: Any) -> Taken:
    optimizers = trainer.optimizers
    only = optimizers[0] if len(optimizers) == 1 else None
    to = _TrainerLoggers(trainer)
    return Taken(trainer.global_step, only, trainer.world_size, to)


class _TrainerLoggers(Logger):
    """The loggers that a Trainer has."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def write(self, row: Mapping[str, float]) -> None:
        if not self._trainer.loggers:
            warnings.warn(
                "The Trainer has no logger, so LightningProbe writes nothing. Pass "
                "to='run.jsonl', or give the Trainer a logger.",
                stacklevel=2,
            )
        numbers = {k: float(v) for k, v in row.items() if k != "step"}
        for logger in self._trainer.loggers:
            logger.log_metrics(numbers, step=int(row["step"]))


def _callbacks() -> tuple[type, ...]:
    """`Callback` of each Lightning that is imported, else of the one installed."""
    loaded = [name for name in _MODULES if sys.modules.get(name) is not None]
    if not loaded:
        installed = (p for p in _PACKAGES if importlib.util.find_spec(p) is not None)
        package = next(installed, _PACKAGES[0])
        require(package, "LightningProbe", INTEGRATIONS)
        loaded = [_MODULES[_PACKAGES.index(package)]]
    return tuple(importlib.import_module(name).Callback for name in loaded)


@functools.cache
def _made_for(cls: type[LightningProbe], bases: tuple[type, ...]) -> type:
    """`cls` as a subclass of `bases`, which it may be already."""
    if issubclass(cls, bases):
        return cls
    return type(cls.__name__, (cls, *bases), {"__module__": cls.__module__})
