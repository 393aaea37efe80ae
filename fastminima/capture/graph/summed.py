"""Scalar losses that add up their samples' and are taken for their mean."""

from __future__ import annotations

import warnings

from torch import Tensor

__all__ = ["warn_if_summed"]

_NONE, _SUM = 0, 2  # as loss functions of PyTorch save their reduction


def warn_if_summed(loss: Tensor) -> None:
    """Warn where a loss function, asked for the sum, made this scalar.

    What else a scalar may be made by (sums of weighted losses, or over something that
    is no sample) cannot be told from its graph.
    """
    node = loss.grad_fn
    reduction = getattr(node, "_saved_reduction", None)
    if reduction is None and node is not None and node.name() == "SumBackward0":
        node = node.next_functions[0][0]
        is_vector = getattr(node, "_saved_reduction", None) == _NONE
        reduction = _SUM if is_vector else None
    if node is None or reduction != _SUM:
        return
    warnings.warn(
        f"The loss is the sum over its samples ({node.name()}), and is taken for their "
        "mean: statistics are those of losses that are as many times larger as there "
        'are samples. Pass reduction="sum", or the vector of per-sample losses.',
        stacklevel=4,
    )
