"""What `watch` asks of curvature: its steps go on, of the loss and ranks that train."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..curvature import NotFiniteError
from ..curvature._ranks import ranks_of
from ..curvature._shards import shards_of
from ..spectrum import Eigenpairs

__all__ = ["replicas_of", "unless_infinite", "warn_of_another_loss"]

_ALIKE = 2.0  # dropout and augmentations in `loss` make less of a difference


def unless_infinite(
    measure: Callable[..., Eigenpairs], *args: Any, **options: Any
) -> Eigenpairs | None:
    """The eigenpairs; None where loss or products are not finite.

    As where half precision overflows, which a GradScaler is there to meet.
    """
    try:
        return measure(*args, **options)
    except NotFiniteError:
        return None


def warn_of_another_loss(losses: Tensor, evaluated: Tensor) -> None:
    """Warn where curvature is taken of another loss than the one that is trained.

    Args:
        losses: of the samples of a step, or their mean.
        evaluated: what `loss(model, batch)` gave for it.
    """
    trained, found = float(losses.detach().mean()), float(evaluated)
    ratio = found / trained if trained else math.nan
    if not math.isfinite(ratio) or 1 / _ALIKE <= ratio <= _ALIKE:
        return
    count = len(losses) if losses.dim() else 0
    summed = count > 1 and abs(ratio / count - 1) < 0.1
    why = (
        f"{count} times as much, the number of samples: it adds up where it must take "
        f"the mean, and so is the sharpness {count} times too large"
        if summed
        else "so the sharpness is not that of what is trained, and does not belong "
        "beside 2 / eta"
    )
    warnings.warn(
        f"loss(model, batch) is {found:.4g}, and the mean of the losses given to "
        f"backward {trained:.4g}: {why}. Return the mean over the batch of the loss "
        "that is trained.",
        stacklevel=5,
    )


def replicas_of(model: nn.Module, process_group: Any) -> int:
    """Processes that a step's gradient is averaged over and statistics are not."""
    if process_group is not None:
        return 1
    ranks = ranks_of(model, None, shards_of(model))
    return 1 if ranks is None else ranks.size
