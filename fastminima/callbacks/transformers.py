"""Watching the training steps of the Hugging Face Trainer."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..monitor import Logger
from .accelerate import refuse_sharded
from .observer import Observer, Taken
from .patch import around

__all__ = ["watch_trainer"]

# What may come between a loss and its division.
_SCALING = frozenset(["MulBackward0", "DivBackward0", "ToCopyBackward0"])


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

    items: list[Any] = []  # the tokens of all accumulated batches, in a step

    def backward(original: Callable[..., Any], loss: Tensor, **kwargs: Any) -> Any:
        parts = trainer.current_gradient_accumulation_steps
        # Who makes the loss is taken to divide it where he says so to the Trainer.
        is_said = trainer.compute_loss_func is not None or getattr(
            trainer, "loss_is_scaled_for_ga", None
        )
        is_shared = bool(items) and (is_said or _is_divided(loss, items))
        is_divided = is_shared or is_said or _is_divided(loss, [parts])
        weight = 1 / parts if is_divided else 1.0
        observer.before(trainer.model, loss, weight, weight, is_shared=is_shared)
        result = original(loss, **kwargs)
        log, ranks = _TrainerLog(trainer), trainer.args.world_size
        step = Taken(trainer.state.global_step, trainer.optimizer, ranks, log)
        observer.after(step)
        return result

    def training_step(
        original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        is_probed = trainer.is_world_process_zero() and observer.batch(
            lambda: observer.size_of(inputs),
            trainer.state.global_step,
            trainer.args.gradient_accumulation_steps,
            is_last=bool(trainer.accelerator.sync_gradients),
        )
        if not is_probed:
            return original(model, inputs, *args, **kwargs)
        given = args[0] if args else kwargs.get("num_items_in_batch")
        items[:] = [] if given is None else [given]
        unpatch = around(trainer.accelerator, "backward", backward)
        try:
            result = original(model, inputs, *args, **kwargs)
        except BaseException:
            observer.forget()
            raise
        finally:
            unpatch()
            observer.abandon()
        observer.missed()
        return result

    kept = _kept_in_checkpoints(observer)
    trainer.add_callback(kept)
    return [
        around(trainer, "training_step", training_step),
        lambda: trainer.remove_callback(kept),
    ]


def _kept_in_checkpoints(observer: Observer) -> type:
    """A callback by which a Trainer keeps an observer's state in its checkpoints.

    A Trainer that resumes has the state of the checkpoint when training begins; one
    that starts anew has what was asked of the callback when it was made.
    """
    callbacks = importlib.import_module("transformers.trainer_callback")

    class FastminimaState(callbacks.TrainerCallback, callbacks.ExportableState):
        def state(self) -> dict[str, Any]:
            return {"args": {}, "attributes": {"kept": observer.state_dict()}}

        def on_train_begin(
            self, args: Any, state: Any, control: Any, **kwargs: Any
        ) -> None:
            observer.forget()  # what an earlier training left unfinished
            found = state.stateful_callbacks.get(type(self).__name__)
            if state.global_step and isinstance(found, Mapping):
                observer.load_state_dict(found["attributes"]["kept"])

        def on_train_end(
            self, args: Any, state: Any, control: Any, **kwargs: Any
        ) -> None:
            observer.close()

    return FastminimaState


def _is_divided(loss: Tensor, numbers: Sequence[Any]) -> bool:
    """Whether a loss was divided by one of some numbers.

    By the accumulated batches, as the Trainer does; or by all their tokens. Models
    whose arguments say that they take the number of tokens may not use it, and then
    nobody divides.
    """
    wanted = [float(number) for number in numbers]
    node = loss.grad_fn
    while node is not None and not node._input_metadata[0].shape:
        divisor = getattr(node, "_saved_other", None)
        if node.name() == "DivBackward0" and divisor is not None:
            if divisor.numel() == 1 and float(divisor) in wanted:
                return True
        elif node.name() not in _SCALING:
            return False
        node = node.next_functions[0][0]
    return False


class _TrainerLog(Logger):
    """What a Trainer reports to: its progress bar, log history and integrations."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def write(self, row: Mapping[str, float]) -> None:
        # The Trainer has a loss of its own, over the steps since it last logged.
        named = {"gradient/loss" if k == "loss" else k: v for k, v in row.items()}
        self._trainer.log({k: float(v) for k, v in named.items() if k != "step"})
