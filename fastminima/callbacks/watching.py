"""`watch`: gradient statistics of a Trainer or an Accelerator, by one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..monitor.closing import Closing
from ..statistics import GradientStatistics
from .accelerate import watch_accelerator
from .observer import BatchSize, Destination, Observer, OnError
from .transformers import watch_trainer

__all__ = ["Watch", "watch"]


class Watch(Closing):
    """A Trainer or Accelerator being watched, until `close()`; a context manager."""

    def __init__(self, observer: Observer, undo: Sequence[Callable[[], None]]) -> None:
        self._observer = observer
        self._undo = list(undo)

    @property
    def stats(self) -> GradientStatistics | None:
        """Statistics of the last step that was probed."""
        return self._observer.stats

    def state_dict(self) -> dict[str, Any]:
        """Counters and running averages, for a run that goes on.

        A Trainer keeps them in its checkpoints by itself; an Accelerator does once it
        is told to: `accelerator.register_for_checkpointing(watch)`.
        """
        return self._observer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what an earlier watch's `state_dict` gave."""
        self._observer.load_state_dict(state_dict)

    def close(self) -> None:
        """Leave the object and the model as they were, and close the files."""
        while self._undo:
            self._undo.pop()()
        self._observer.close()


def watch(
    target: Any,
    model: nn.Module | None = None,
    *,
    to: Destination = None,
    every: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    batch_size: BatchSize = None,
    on_error: OnError = "raise",
    **options: Any,
) -> Watch:
    """Log gradient statistics of a Hugging Face `Trainer` or accelerate `Accelerator`.

    There is one row a step of the optimizer, with the statistics of the samples of all
    batches that it accumulates; "step" counts them, "batch" the batches up to its last
    one. (Without accumulation each backward pass has a row.) g_n is the gradient of
    sample n's own loss: loss scaling and the division by the accumulation steps are
    undone. Where a Trainer divides by the number of tokens of all accumulated batches,
    g_n is sample n's part of the step's gradient, times the samples of the step; one
    with more tokens has a larger g_n.

    All samples of a step count alike. Their mean is the step's gradient where its
    batches are equally large, or the loss is divided by tokens; where one is smaller,
    the libraries, which take a mean of means, give its samples more weight. A last step
    of fewer batches is divided as a whole one by accelerate: ratio and temperature are
    those of the smaller step that it takes.

    Args:
        target: `transformers.Trainer`, or `accelerate.Accelerator`.
        model: of an accelerator: the model, prepared or not. A Trainer has its own.
        to: a folder, for rows by layer, largest samples, histograms and spikes, and for
            `python -m fastminima report`; a path ending in ".jsonl" or ".csv", a logger
            of `fm.monitor`, or a `Monitor`; None for what the target itself logs to.
        every: probe one step of the optimizer in so many, the first one included, with
            all batches that it accumulates.
        optimizer: of an accelerator: adds learning rate, ratio and temperature.
        batch_size: the number of samples of a batch, or a function that says it: of a
            Trainer's inputs, of the arguments that an accelerator's model is called
            with. None takes the leading size of the first tensor there.
        on_error: "raise", or "warn" and go on where the probe cannot read the graph:
            that step has no row.
        options: for `GradientProbe`, such as `batchnorm="rows"`.

    Raises:
        TypeError: for another target, or a model that is missing or too many.
        ValueError: for an unknown word, an `every` below one, sharded parameters.

    Example:
        `watch(trainer, every=10, to="runs/a")`, or
        `watch(accelerator, model, every=10, to="run.jsonl")`
    """
    is_trainer = hasattr(target, "training_step") and hasattr(target, "accelerator")
    is_accelerator = hasattr(target, "backward") and hasattr(target, "unwrap_model")
    if is_trainer:
        if model is not None or optimizer is not None:
            raise TypeError(
                "A Trainer has its own model and optimizer; leave them out."
            )
        observer = Observer(to, every, batch_size, on_error, options)
        return Watch(observer, watch_trainer(target, observer))
    if is_accelerator:
        if model is None:
            raise TypeError("An Accelerator has many models; pass the one to watch.")
        observer = Observer(to, every, _of_call(batch_size), on_error, options)
        undo = watch_accelerator(target, model, optimizer, observer)
        return Watch(observer, undo)
    raise TypeError(
        f"Cannot watch {type(target).__name__}: expected a transformers Trainer or an "
        "accelerate Accelerator. For Lightning, use fm.callbacks.LightningProbe."
    )


def _of_call(batch_size: BatchSize) -> BatchSize:
    """A function of a model's arguments as one of the call as a whole."""
    if not callable(batch_size):
        return batch_size
    of_arguments = batch_size
    return lambda call: of_arguments(*call[0], **call[1])
