"""Watching `Accelerator.backward`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..monitor import Logger
from .observer import Observer, Taken
from .patch import around

__all__ = ["refuse_sharded", "watch_accelerator"]

_SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM")


def watch_accelerator(
    accelerator: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    observer: Observer,
) -> list[Callable[[], None]]:
    """Observe the backward passes of an accelerator; returns what undoes it.

    A step ends where `accelerator.accumulate` lets gradients be synchronized. The batch
    is what the model was last called with while gradients were recorded; which takes a
    hook on the model.
    """
    refuse_sharded(accelerator)
    module = accelerator.unwrap_model(model)
    sizes: list[int] = []
    place: int | None = None  # of the batch before, in a step that goes on

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            sizes[:] = [observer.size_of((args, kwargs))]

    def samples() -> int:
        if not sizes:
            raise ValueError(
                "Accelerator.backward was called before the model: the batch size is "
                "not known. Pass the model that you call to watch."
            )
        return sizes[0]

    def begin(parts: int) -> bool:
        """A batch begins, unless the one before has another pass."""
        nonlocal place
        is_last = bool(accelerator.sync_gradients)
        here = None if is_last else accelerator.step
        is_same = here is not None and here == place
        place = here
        if is_same:
            return observer.is_due
        return observer.batch(samples, None, parts, is_last=is_last)

    def backward(original: Callable[..., Any], loss: Tensor, **kwargs: Any) -> Any:
        parts = accelerator.gradient_accumulation_steps
        if accelerator.is_main_process and begin(parts):
            observer.before(module, loss, 1.0, 1 / parts)
        try:
            result = original(loss, **kwargs)
            ranks, trackers = accelerator.num_processes, _Trackers(accelerator)
            observer.after(Taken(None, optimizer, ranks, trackers))
        finally:
            observer.abandon()
        return result

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    return [around(accelerator, "backward", backward), hook.remove]


def refuse_sharded(accelerator: Any) -> None:
    """Raise where no process has the whole parameters.

    Raises:
        ValueError: for such a kind of distribution.
    """
    kind = accelerator.distributed_type.value
    if kind in _SHARDED:
        raise ValueError(
            f"Under {kind} no process holds the whole parameters, which per-sample "
            "gradients need. Use one process or data parallelism (DDP)."
        )


class _Trackers(Logger):
    """The trackers of an accelerator."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def write(self, row: Mapping[str, float]) -> None:
        if not self._accelerator.trackers:
            warnings.warn(
                "The accelerator has no tracker, so no row is written. Pass "
                "to='run.jsonl', or call accelerator.init_trackers first.",
                stacklevel=2,
            )
        numbers = {k: float(v) for k, v in row.items() if k != "step"}
        self._accelerator.log(numbers, step=int(row["step"]))
