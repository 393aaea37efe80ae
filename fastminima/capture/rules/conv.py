"""Convolutions of any number of dims, and biases beside them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...ops import broadcast
from ...ops.conv_geometry import ConvGeometry
from ..contributions import (
    Convolution,
    ConvolutionBias,
    Frames,
    Materialized,
    Patches,
)
from ..graph.node import Node
from ..reading.plan import Slot
from ..rows.layout import RegularLayout, RowLayout
from .base import Contributions, numbers

__all__ = ["convolution"]


def convolution(
    node: Node, g: Tensor, layout: RowLayout, slots: Sequence[Slot]
) -> Contributions:
    """`conv(x, weight) + bias`, the samples images, or several images each."""
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
    if 1 in numbers(slots):
        if frames == 1:
            x, g = layout.pick(x), layout.pick(g)
            patches = Patches(x, g, geometry, with_bias=2 in numbers(slots))
            found[1] = Convolution(patches)
        elif g.dim() < 5:
            found[1] = _frames(x, g, geometry, layout)
    if 2 in numbers(slots):
        weight = found.get(1)
        if isinstance(weight, Convolution):
            found[2] = ConvolutionBias(weight.patches)
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
    return Frames(Convolution(Patches(inputs, grads, deeper)))
