"""Layers whose forward pass mixes the samples of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from ..errors import CaptureError
from ..graph.node import Node
from ..graph.nodes import BAG, EMBEDDING, MAY_MIX, NORMALISING_LAST
from ..graph.saved import saved_tensor
from ..graph.saved_names import BATCH_NORMS, is_training
from ..graph.tape import Tape
from ..rows.layout import RegularLayout, RowLayout
from .plan import Layouts, Plan, Use
from .refusals import Whereabouts

__all__ = [
    "BATCH_NORMS",
    "counts_in_batch",
    "deciding_numbers",
    "freeze",
    "mixing_nodes",
    "norm_nodes",
    "normalises_over",
    "refuse_mixing_uses",
]


_MAY_MIX = MAY_MIX | BATCH_NORMS.keys()


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


# Of uses that may mix: the number by which one that mixes is told, besides shapes.
_DECIDING = {
    **dict.fromkeys(NORMALISING_LAST, "_saved_normalized_shape"),
    "NativeGroupNormBackward0": "_saved_group",
    **dict.fromkeys((EMBEDDING, BAG), "_saved_scale_grad_by_freq"),
}


def deciding_numbers(tape: Tape, uses: Iterable[Use]) -> list[tuple[int, str]] | None:
    """Nodes and attributes with which `refuse_mixing_uses` says what it said before.

    None where that cannot be said: batch normalisations change their mode.
    """
    found = [use for use in uses if use.name in _MAY_MIX]
    if any(use.name not in _DECIDING for use in found):
        return None
    return [(use.node, _DECIDING[use.name]) for use in found]


def freeze(tape: Tape, nodes: list[int]) -> list[Any]:
    """Make these nodes treat their batch statistics as constants; returns handles.

    Holds only for gradients of their input: g * weight / sqrt(var + eps).
    """
    return [tape.nodes[i].register_hook(_frozen(tape.nodes[i])) for i in nodes]


def _frozen(node: Node) -> Callable[[Any, Any], Any]:
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


def refuse_mixing_uses(
    tape: Tape,
    plan: Plan,
    layouts: Layouts,
    *,
    batchnorm: str,
    where: Whereabouts,
    is_sure: Callable[[int], bool] = lambda i: True,
) -> None:
    """Raise for a use that mixes samples by itself.

    For a normalisation that depends on its layout, which may not be sure yet where it
    was measured in this very step.
    """
    for use in plan.uses:
        if use.name not in _MAY_MIX:
            continue
        layout = layouts[use.node][0]
        if layout is None or layout.batch == 1:
            continue
        if counts_in_batch(tape, use.node):
            does = (
                "divides gradients by how often an index is in the batch "
                "(scale_grad_by_freq=True)"
            )
        elif (
            # Any other choice than "error" says what is meant.
            not (use.name in BATCH_NORMS and batchnorm != "error")
            and normalises_over(tape, use.node, layout)
            and is_sure(use.node)
        ):
            does = "takes its statistics over several samples"
        else:
            continue
        raise CaptureError(
            f"{use.name} at {where.module_at(tape, use.node)} {does}, so the gradient "
            "of one sample depends on the others. Change the layer, or use "
            "MinibatchVariance."
        )
