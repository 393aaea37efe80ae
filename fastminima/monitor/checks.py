"""Options that make no sense, refused before a run rather than in its first step."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["check_counts", "check_names", "check_options", "check_training"]


def check_counts(**counts: int | None) -> None:
    """Raise ValueError for what is neither a positive integer nor None."""
    for name, count in counts.items():
        if count is not None and not _is_whole(count, 1):
            raise ValueError(f"{name} must be a positive integer, got {count!r}.")


def check_options(
    *,
    largest: int,
    dataset_size: int | None,
    max_norm: float | None,
    replicas: int,
) -> None:
    """Raise ValueError for an option of `Monitor` outside its range."""
    check_counts(dataset_size=dataset_size, replicas=replicas)
    if not _is_whole(largest, 0):
        raise ValueError(f"largest must be an integer of at least 0, got {largest!r}.")
    if max_norm is None:
        return
    is_number = isinstance(max_norm, (int, float)) and not isinstance(max_norm, bool)
    if not (is_number and max_norm > 0 and not math.isnan(max_norm)):
        raise ValueError(
            f"max_norm must be a positive number, what the loop gives clip_grad_norm_, "
            f"got {max_norm!r}."
        )


def check_training(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    loss: Any,
    max_norm: float | None,
    replicas: int,
) -> None:
    """Refuse, or warn of, what does not belong to the training of a model.

    Raises:
        TypeError: for what cannot be a closure `loss(model, batch)`.
        ValueError: where the gradient that is clipped is not the one looked at.
    """
    _check_loss(loss)
    _check_optimizer(model, optimizer)
    _check_clipping(max_norm, replicas)


def _check_loss(loss: Any) -> None:
    """Raise TypeError for what cannot be a closure `loss(model, batch)`."""
    wanted = "loss must be a function loss(model, batch) that returns the mean loss"
    if isinstance(loss, (str, os.PathLike)):
        raise TypeError(f"{wanted}, got {loss!r}. Where rows go is to={str(loss)!r}.")
    if isinstance(loss, nn.modules.loss._Loss):
        raise TypeError(
            f"{wanted}, got {loss!r}, which takes outputs and targets. As in: "
            "loss=lambda model, batch: criterion(model(batch[0]), batch[1])."
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"{wanted}, got {loss!r}.")


def check_names(given: Iterable[str], *takers: Callable[..., Any]) -> None:
    """Raise TypeError for an option that none of some functions has."""
    known = [name for one in takers for name in inspect.signature(one).parameters]
    for name in given:
        if name not in known:
            (near,) = difflib.get_close_matches(name, known, 1, 0.0)
            raise TypeError(f"There is no option {name!r}. Did you mean {near!r}?")


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Warn of an optimizer that has no parameter of the model."""
    if optimizer is None:
        return
    theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
    tracked = [p for p in model.parameters() if p.requires_grad]
    if tracked and not any(id(p) in theirs for p in tracked):
        warnings.warn(
            f"The {type(optimizer).__name__} has no parameter of this "
            f"{type(model).__name__}: learning rate, ratio and temperature would be "
            "those of another training. Pass the optimizer that trains the model.",
            stacklevel=4,
        )


def _check_clipping(max_norm: float | None, replicas: int) -> None:
    """Raise ValueError where the gradient that is clipped is not the one looked at."""
    if max_norm is not None and replicas > 1:
        raise ValueError(
            f"clip_grad_norm_ clips the mean gradient of {replicas} processes, and "
            "without a process group a row has that of one. Pass "
            "process_group='world', or leave max_norm out."
        )


def _is_whole(number: Any, least: int) -> bool:
    is_integer = isinstance(number, int) and not isinstance(number, bool)
    return is_integer and number >= least
