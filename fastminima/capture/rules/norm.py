"""Scale and shift after a normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops import norm
from ..contributions import (
    Materialized,
)
from ..graph.node import Node
from ..graph.saved_names import batch_statistics
from ..reading.plan import Slot
from ..rows.layout import RegularLayout, RowLayout
from .base import Contributions
from .pieces import in_row_pieces

__all__ = ["batch_norm", "group_norm", "layer_norm", "rms_norm"]


def layer_norm(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`(x - mean) * rstd * weight + bias` over the last dims."""
    return _normalised(node, g, layout, slots, node._saved_result1, node._saved_result2)


def rms_norm(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """The kernel that GPUs have; elsewhere a product with the weight is the use."""
    rstd = node._saved_result1
    return _normalised(node, g, layout, slots, torch.zeros_like(rstd), rstd)


def group_norm(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`(x - mean) * rstd * weight + bias`, by groups of an image's channels."""
    mean, rstd = node._saved_result1, node._saved_result2
    return _channels(g, node._saved_input, mean, rstd, layout, slots)


def batch_norm(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`(x - mean) * rstd * weight + bias`, by channels over a batch, or remembered."""
    mean, rstd = batch_statistics(node)
    return _channels(g, node._saved_input, mean[None], rstd[None], layout, slots)


def _normalised(
    node: Node,
    g: Tensor,
    layout: RowLayout,
    slots: Sequence[Slot],
    mean: Tensor,
    rstd: Tensor,
) -> Contributions:
    """Scale and shift after a normalisation over the last dims."""
    trailing = len(node._saved_normalized_shape)
    if isinstance(layout, RegularLayout):
        is_covered = layout.dim < g.dim() - trailing
    else:
        is_covered = trailing == 1
    if not is_covered:
        return {}

    saved = (node._saved_input, mean, rstd)

    def gradients(some: RowLayout) -> tuple[Tensor, Tensor]:
        rows = (some.rows(t, trailing).flatten(2) for t in (g, *saved))
        grads, x, means, rstds = rows
        return norm.layer_norm_gradients(grads, x, means[..., 0], rstds[..., 0])

    return _affine(in_row_pieces(layout, gradients, g, saved[0]), slots)


def _channels(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    layout: RowLayout,
    slots: Sequence[Slot],
) -> Contributions:
    # Irregular labels are those of rows of the last dim, not of whole images.
    if not isinstance(layout, RegularLayout) or layout.dim != 0:
        return {}
    g, x = (t.reshape(t.shape[0], t.shape[1], -1) for t in (g, x))
    if layout.is_one_row:
        g, x = layout.pick(g), layout.pick(x)
        if len(mean) == layout.batch:  # of each image; else of the whole population
            mean, rstd = layout.pick(mean), layout.pick(rstd)
        return _affine(norm.channel_norm_gradients(g, x, mean, rstd), slots)
    pair = norm.channel_norm_gradients(g, x, mean, rstd)
    weight, bias = (layout.rows(t, 1).sum(1) for t in pair)
    return _affine((weight, bias), slots)


def _affine(pair: Sequence[Tensor], slots: Sequence[Slot]) -> Contributions:
    found: Contributions = {}
    for slot in slots:
        if slot.number in (1, 2):
            samples = pair[slot.number - 1]
            found[slot.number] = Materialized(
                samples.reshape(len(samples), *slot.shape)
            )
    return found
