"""What is known of a run as a whole: what is trained, how, and where."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from .._parameters import tracked_parameters
from .factors import unwrapped
from .layers import By, layer_of, without_wrappers

__all__ = ["SCHEMA", "about_run"]

SCHEMA = 1  # of the files in a run's folder


def about_run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    by: By,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Model, optimizer, settings, versions and machine, as JSON can have them."""
    tracked = tracked_parameters(model)
    return {
        "fastminima": importlib.metadata.version("fastminima"),
        "schema": SCHEMA,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in tracked.values()),
        "layers": _layers(tracked, by),
        "optimizer": None if optimizer is None else _optimizer(unwrapped(optimizer)),
        **settings,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(next(iter(tracked.values())).device),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def _layers(tracked: Mapping[str, nn.Parameter], by: By) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, p in zip(without_wrappers(list(tracked)), tracked.values(), strict=True):
        layer = layer_of(name, "layer" if by is None else by)
        one = found.setdefault(layer, {"name": layer, "parameters": 0, "tensors": []})
        one["parameters"] += p.numel()
        one["tensors"].append(name)
    return list(found.values())


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its name, and the options of its first group that are plain values."""
    options = {
        name: value
        for name, value in optimizer.param_groups[0].items()
        if name != "params" and _is_plain(value)
    }
    return {"name": type(optimizer).__name__, "options": options}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
