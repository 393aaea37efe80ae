"""Layers whose forward pass mixes the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .rules import BATCH_NORM
from .saved import saved_tensor
from .tape import Tape

__all__ = ["freeze", "mixing_nodes", "norm_nodes"]


def norm_nodes(tape: Tape) -> list[int]:
    """Batch-normalisation nodes in any mode."""
    return [i for i, name in enumerate(tape.names) if name in BATCH_NORM]


def mixing_nodes(
    tape: Tape, batch: int, candidates: list[int] | None = None
) -> list[int]:
    """Batch-normalisation nodes in training mode over more than one sample.

    InstanceNorm runs through the same node with the batch folded into its channels,
    as a batch of one, and does not mix.
    """
    if batch == 1:
        return []
    return [
        i
        for i in (norm_nodes(tape) if candidates is None else candidates)
        if getattr(tape.nodes[i], "_saved_training", True) and tape.shapes(i)[0][0] > 1
    ]


def freeze(tape: Tape, nodes: list[int]) -> list[Any]:
    """Make these nodes treat their batch statistics as constants; returns handles.

    Holds only for gradients of their input: g * weight / sqrt(var + eps).
    """
    return [tape.nodes[i].register_hook(_frozen(tape.nodes[i])) for i in nodes]


def _frozen(node: Any) -> Callable[[Any, Any], Any]:
    weight, rstd = (saved_tensor(node, f"_saved_{w}") for w in ("weight", "result2"))

    def hook(
        grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        g = grad_outputs[0]
        if g is None or grad_inputs[0] is None:
            return None
        # Only now: a sharded weight is there during the pass, and not before.
        scale = rstd if weight is None else rstd * weight
        channels = (1, -1) + (1,) * (g.dim() - 2)
        frozen = (g * scale.view(channels)).to(grad_inputs[0].dtype)
        return (frozen, *grad_inputs[1:])

    return hook
