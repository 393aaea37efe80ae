"""Watching the training steps of the Hugging Face Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..monitor import Logger
from .accelerate import refuse_sharded, scale_of
from .observer import Observer
from .patch import around

__all__ = ["watch_trainer"]


def watch_trainer(trainer: Any, observer: Observer) -> list[Callable[[], None]]:
    """Observe the training steps of a Trainer; returns what undoes it.

    A `TrainerCallback` has no event between forward and backward, so `training_step`
    is wrapped on the object, which says what the batch is; for as long as it runs,
    so is `accelerator.backward`, which says what the loss is. A Trainer may replace
    its accelerator between steps.
    """
    refuse_sharded(trainer.accelerator)
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"This Trainer runs DataParallel on {trainer.args.n_gpu} GPUs, which "
            "copies the parameters. Start one process a GPU (torchrun), or show it one."
        )

    def backward(original: Callable[..., Any], loss: Tensor, **kwargs: Any) -> Any:
        # The loss was divided by the accumulated batches, or by all their tokens.
        parts = trainer.current_gradient_accumulation_steps
        observer.before(trainer.model, loss, 1 / parts, scale_of(trainer.accelerator))
        result = original(loss, **kwargs)
        observer.after(
            trainer.state.global_step,
            trainer.optimizer,
            parts * trainer.args.world_size,
            _TrainerLog(trainer),
        )
        return result

    def training_step(
        original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        is_probed = trainer.is_world_process_zero() and observer.batch(
            lambda: observer.size_of(inputs)
        )
        if not is_probed:
            return original(model, inputs, *args, **kwargs)
        unpatch = around(trainer.accelerator, "backward", backward)
        try:
            result = original(model, inputs, *args, **kwargs)
        finally:
            unpatch()
            observer.abandon()
        observer.missed()
        return result

    return [around(trainer, "training_step", training_step)]


class _TrainerLog(Logger):
    """What a Trainer reports to: its progress bar, log history and integrations."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def write(self, row: Mapping[str, float]) -> None:
        self._trainer.log({k: float(v) for k, v in row.items() if k != "step"})
