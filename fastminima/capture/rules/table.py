"""How each kind of node gives the per-sample gradients of the parameters it uses.

A rule is called in the node's prehook, when its saved tensors and output gradients are
at hand. It returns one contribution for each slot it knows; slots it leaves out go to
the universal rule, which knows every node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import mul
from typing import Any

import torch
from torch import Size, Tensor

from ...ops import broadcast, norm
from ...ops.conv_geometry import ConvGeometry
from ..contributions import (
    Column,
    Contribution,
    Convolution,
    ConvolutionBias,
    Dense,
    DenseBias,
    Embedding,
    Frames,
    Materialized,
    Stacked,
)
from ..graph.saved_names import BATCH_NORMS, batch_statistics
from ..graph.tape import signed
from ..reading.plan import Slot
from ..rows.layout import RegularLayout, RowLayout
from .layers import LAYERS
from .pieces import from_rows, in_row_pieces
from .routed import GATHERED
from .spread import spread_gradient as _elementwise

__all__ = ["BATCH_NORM", "RULES", "Rule", "contributions_of"]

Contributions = dict[int, Contribution]
Rule = Callable[[Any, Tensor, RowLayout, Sequence[Slot]], Contributions]
BATCH_NORM = frozenset(BATCH_NORMS)


def contributions_of(
    name: str,
    node: Any,
    grads: Sequence[Tensor | None],
    layouts: Sequence[RowLayout | None],
    slots: Sequence[Slot],
) -> Contributions:
    """Contributions for the slots that a rule covers; none when there is no rule."""
    rule = RULES.get(name)
    if rule is None or grads[0] is None or layouts[0] is None:
        return {}
    return rule(node, grads[0], layouts[0], slots)


def _numbers(slots: Sequence[Slot]) -> set[int]:
    return {slot.number for slot in slots}


def _swapped(layout: RowLayout) -> RowLayout | None:
    """The layout of the transpose of a matrix whose columns belong to samples."""
    if isinstance(layout, RegularLayout) and layout.dim == 1:
        return layout.along(0)
    return None


def _has_rows(layout: RowLayout) -> bool:
    return not isinstance(layout, RegularLayout) or layout.dim == 0


def _product(
    first: Tensor | None, second: Tensor | None, g: Tensor, layout: RowLayout
) -> Contribution | None:
    """The right factor's gradient given the left, or the left's given the right."""
    if first is not None:
        if not _has_rows(layout):
            return None
        if isinstance(layout, RegularLayout) and layout.is_one_row:
            return Dense(layout.pick(first), layout.pick(g), out_first=False)
        return from_rows(layout, partial(_dense, first, g), first, g)
    columns = _swapped(layout)
    if columns is None or second is None:
        return None
    return Dense(columns.rows(second.t(), 1), columns.rows(g.t(), 1), out_first=True)


def _dense(a: Tensor, g: Tensor, layout: RowLayout) -> Dense:
    return Dense(layout.rows(a, 1), layout.rows(g, 1), out_first=False)


def _bias_samples(g: Tensor, layout: RowLayout) -> tuple[Tensor]:
    return (broadcast.sum_over_time(layout.rows(g, 1)),)


def _mm(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    found: Contributions = {}
    for slot in slots:
        factors = (node._saved_self, None) if slot.number else (None, node._saved_mat2)
        part = _product(*factors, g, layout)
        if part is not None:
            found[slot.number] = part
    return found


def _addmm(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    if node._saved_alpha != 1 or node._saved_beta != 1:
        return {}
    found: Contributions = {}
    bias = None
    for slot in slots:
        part = None
        if slot.number == 2:
            part = _product(node._saved_mat1, None, g, layout)
        elif slot.number == 1:
            part = _product(None, node._saved_mat2, g, layout)
        elif slot.shape[-1:] == g.shape[1:] and Size(slot.shape).numel() == g.shape[1]:
            bias = slot
        if part is not None:
            found[slot.number] = part
    if bias is not None and _has_rows(layout):
        weight = found.get(2)
        if isinstance(weight, Dense):
            weight.with_bias = True
            found[0] = DenseBias(weight, bias.shape)
        else:
            (summed,) = in_row_pieces(layout, partial(_bias_samples, g), g)
            found[0] = Materialized(summed.reshape(len(summed), *bias.shape))
    return found


def _mv(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    if 1 not in _numbers(slots) or not _has_rows(layout):
        return {}
    matrix = Dense(
        layout.rows(node._saved_self, 1), layout.rows(g[:, None], 1), out_first=False
    )
    return {1: Column(matrix)}


def _bmm(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """Only when samples are rows of each product, not products of the batch."""
    if not isinstance(layout, RegularLayout) or layout.dim != 1:
        return {}
    rows = layout.along(0)
    if 1 not in _numbers(slots):
        return {}
    return {
        1: Stacked(
            [
                Dense(rows.rows(a, 1), rows.rows(b, 1), out_first=False)
                for a, b in zip(node._saved_self, g, strict=True)
            ]
        )
    }


def _convolution(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    if not isinstance(layout, RegularLayout) or layout.dim != 0:
        return {}
    x, weight = node._saved_input, node._saved_weight
    geometry = ConvGeometry(
        kernel_size=tuple(weight.shape[2:]),
        stride=tuple(node._saved_stride),
        padding=tuple(node._saved_padding),
        dilation=tuple(node._saved_dilation),
        groups=node._saved_groups,
        transposed=node._saved_transposed,
        output_padding=tuple(node._saved_output_padding),
    )
    frames = layout.outer * layout.inner
    found: Contributions = {}
    if 1 in _numbers(slots):
        if frames == 1:
            x, g = layout.pick(x), layout.pick(g)
            found[1] = Convolution(x, g, geometry, with_bias=2 in _numbers(slots))
        elif g.dim() < 5:
            found[1] = _frames(x, g, geometry, layout)
    if 2 in _numbers(slots):
        weight_part = found.get(1)
        if isinstance(weight_part, Convolution):
            found[2] = ConvolutionBias(weight_part)
        else:
            summed = broadcast.sum_over_space(g.flatten(2))
            found[2] = Materialized(layout.rows(summed, 1).sum(1))
    return found


def _frames(
    x: Tensor, g: Tensor, geometry: ConvGeometry, layout: RegularLayout
) -> Frames:
    """Several images a sample: a convolution of one axis more."""
    deeper = ConvGeometry(
        kernel_size=(1, *geometry.kernel_size),
        stride=(1, *geometry.stride),
        padding=(0, *geometry.padding),
        dilation=(1, *geometry.dilation),
        groups=geometry.groups,
        transposed=geometry.transposed,
        output_padding=(0, *geometry.output_padding),
    )
    inputs, grads = (layout.isolate(t).movedim(1, 2) for t in (x, g))
    return Frames(Convolution(inputs, grads, deeper, with_bias=False))


def _layer_norm(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    return _normalised(node, g, layout, slots, node._saved_result1, node._saved_result2)


def _rms_norm(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """The kernel that GPUs have; elsewhere a product with the weight is the use."""
    rstd = node._saved_result1
    return _normalised(node, g, layout, slots, torch.zeros_like(rstd), rstd)


def _normalised(
    node: Any,
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


def _affine(pair: Sequence[Tensor], slots: Sequence[Slot]) -> Contributions:
    found: Contributions = {}
    for slot in slots:
        if slot.number in (1, 2):
            samples = pair[slot.number - 1]
            found[slot.number] = Materialized(
                samples.reshape(len(samples), *slot.shape)
            )
    return found


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


def _group_norm(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    mean, rstd = node._saved_result1, node._saved_result2
    return _channels(g, node._saved_input, mean, rstd, layout, slots)


def _batch_norm(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    mean, rstd = batch_statistics(node)
    return _channels(g, node._saved_input, mean[None], rstd[None], layout, slots)


def _embedding(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    if node._saved_scale_grad_by_freq:
        return {}
    if isinstance(layout, RegularLayout) and layout.dim == g.dim() - 1:
        return {}
    ids, padding = node._saved_indices, signed(node._saved_padding_idx)

    def table(some: RowLayout) -> Embedding:
        rows = some.rows(ids, 0), some.rows(g, 1)
        return Embedding(*rows, padding, slots[0].shape[0])

    return {0: from_rows(layout, table, g)}


def _add(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    found: Contributions = {}
    for slot in slots:
        if slot.number == 0 or node._saved_alpha == 1:
            part = _elementwise(layout, slot, None, g)
            if part is not None:
                found[slot.number] = part
    return found


def _mul(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    found: Contributions = {}
    if len(slots) > 1:
        return found
    other = node._saved_other if slots[0].number == 0 else node._saved_self
    part = _elementwise(layout, slots[0], mul, g, other)
    return found if part is None else {slots[0].number: part}


def _where(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """Parameters chosen at some places, such as a bias under a mask."""
    found: Contributions = {}
    for slot in slots:
        is_chosen = node._saved_condition
        if slot.number == 1:
            is_chosen = ~is_chosen
        part = _elementwise(layout, slot, _chosen, g, is_chosen)
        if part is not None:
            found[slot.number] = part
    return found


def _chosen(g: Tensor, is_chosen: Tensor) -> Tensor:
    return g.where(is_chosen, 0)


def _spread(
    node: Any, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """Expand and repeat over the batch alone: the output gradient is the answer."""
    if not isinstance(layout, RegularLayout):
        return {}
    slot = slots[0]
    missing = g.dim() - len(slot.shape)
    shape = (1,) * missing + slot.shape
    if layout.outer > 1 and shape[layout.dim] != 1:
        return {}  # repeats interleave the samples, each a row of the parameter
    samples = layout.isolate(g)
    dims = [
        i + 1
        for i, (size, full) in enumerate(zip(shape, samples.shape[1:], strict=True))
        if size == 1 and full != 1
    ]
    if dims:
        samples = samples.sum(dims, keepdim=True)
    if tuple(samples.shape[1:]) != shape:
        return {}
    return {0: Materialized(samples.reshape(len(samples), *slot.shape))}


RULES: dict[str, Rule] = {
    "AddmmBackward0": _addmm,
    "MmBackward0": _mm,
    "MvBackward0": _mv,
    "BmmBackward0": _bmm,
    "ConvolutionBackward0": _convolution,
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "NativeGroupNormBackward0": _group_norm,
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    "EmbeddingBackward0": _embedding,
    "AddBackward0": _add,
    "MulBackward0": _mul,
    "WhereBackward0": _where,
    "ExpandBackward0": _spread,
    "RepeatBackward0": _spread,
    **LAYERS,
    **GATHERED,
}
