"""Layers whose forward pass mixes the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..graph.nodes import BAG, EMBEDDING, NORMALISING_LAST
from ..graph.saved import saved_tensor
from ..graph.saved_names import BATCH_NORMS, is_training
from ..graph.tape import Tape
from ..rows.layout import RegularLayout, RowLayout

__all__ = [
    "BATCH_NORMS",
    "counts_in_batch",
    "freeze",
    "mixing_nodes",
    "norm_nodes",
    "normalises_over",
]


def norm_nodes(tape: Tape) -> list[int]:
    """Batch-normalisation nodes in any mode."""
    return [i for i, name in enumerate(tape.names) if name in BATCH_NORMS]


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
        if is_training(tape.nodes[i]) and tape.shapes(i)[0][0] > 1
    ]


def counts_in_batch(tape: Tape, i: int) -> bool:
    """Whether a table divides gradients by how often an index is in the batch."""
    if tape.names[i] not in (EMBEDDING, BAG):
        return False
    return tape.nodes[i]._saved_scale_grad_by_freq


def normalises_over(tape: Tape, i: int, layout: RowLayout | None) -> bool:
    """Whether a normalisation takes its statistics over several samples.

    The rows of its output gradient do not show it: they say what comes after the node,
    not what it does itself.
    """
    if not isinstance(layout, RegularLayout) or layout.batch == 1:
        return False
    name, node = tape.names[i], tape.nodes[i]
    shape = tape.shapes(i)[0]
    if name in NORMALISING_LAST:
        return layout.dim >= len(shape) - len(node._saved_normalized_shape)
    if name == "NativeGroupNormBackward0":
        group = shape[1] // node._saved_group
        return layout.dim > 1 or (layout.dim == 1 and layout.inner % group != 0)
    if name in BATCH_NORMS and is_training(node):
        return layout.dim != 1
    return False


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
