"""Uses of weights whose gradients the kernels make, with the statistics of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ...ops._arguments import NATIVE
from ...ops.cost.dense import is_moment_faster
from ..graph.node import Node
from ..graph.nodes import ADDMM, CONVOLUTION, EMBEDDING, PRODUCTS, is_scaled
from ..graph.tape import Tape
from ..reading.plan import Slot, Use
from ..rows.layout import RegularLayout
from .delivery import delivery_of
from .moves import is_known

__all__ = ["Part", "part_of"]


class Part(NamedTuple):
    """A use of a weight, of which the kernels know how to make the gradient.

    Attributes:
        node: of the use.
        weight, bias: the parameters; no bias where there is none, or an odd one.
        rows: how many of a sample's a product adds up; none for a table.
        samples: of the batch.
    """

    node: Node
    weight: str
    bias: str | None
    rows: int
    samples: int

    def shares_rows(self, weight: Tensor) -> bool:
        """Whether a second moment of one row a sample pays for the gradient beside it.

        Our product of rows is faster than PyTorch's where that of their squares is, and
        skips the zeros that a ReLU leaves.
        """
        (output, *_) = self.node._input_metadata
        is_dense = output.device.type == "cpu" and output.dtype in NATIVE
        if self.rows != 1 or weight.dim() != 2 or not is_dense:
            return False
        d_out, d_in = weight.shape
        return is_moment_faster(self.samples, d_in, d_out, _native.best_isa)


# By which input a weight comes in, and along which dim of the output samples are then.
_FACTORS = {
    ADDMM: {2: 0, 1: 1},
    "MmBackward0": {1: 0, 0: 1},
    "BmmBackward0": {1: 1, 0: 2},
    CONVOLUTION: {1: 0},
}


def part_of(tape: Tape, use: Use, layouts: Sequence[Any]) -> Part | None:
    """What a use is to the kernels; None if they do not know it."""
    layout, node = layouts[0] if layouts else None, tape.nodes[use.node]
    if not isinstance(layout, RegularLayout) or layout.chosen is not None:
        return None
    if use.name in _TABLES:
        return _table_of(tape, use, layout)
    if use.name not in _FACTORS or is_scaled(node, use.name):
        return None
    slots = {slot.number: slot for slot in use.slots}
    (shape,) = tape.shapes(use.node)
    rows = layout.outer * layout.inner
    if use.name == CONVOLUTION:
        if not layout.is_one_row:
            return None
        rows = torch.Size(shape[2:]).numel()
    for number, dim in _FACTORS[use.name].items():
        if number in slots and layout.dim == dim and _is_moved(tape, slots[number]):
            weight = slots[number].paths[0].parameter
            bias = _bias_of(tape, use, shape) if dim == 0 else None
            return Part(node, weight, bias, rows, layout.batch)
    return None


def _table_of(tape: Tape, use: Use, layout: RegularLayout) -> Part | None:
    """A look-up of rows, whose gradients are added to those of a product."""
    (slot,), (shape,) = use.slots, tape.shapes(use.node)
    node = tape.nodes[use.node]
    if len(slot.shape) != 2 or layout.dim == len(shape) - 1 or len(slot.paths) != 1:
        return None  # samples along the features
    if not _TABLES[use.name](node) or delivery_of(tape, slot, slot.paths[0]):
        return None  # or a part of a parameter
    return Part(node, slot.paths[0].parameter, None, 0, layout.batch)


# Whether a node adds each row of its gradient to one of the table's.
_TABLES: dict[str, Callable[[Node], bool]] = {
    EMBEDDING: lambda n: not (n._saved_scale_grad_by_freq or n._saved_sparse),
    "IndexBackward0": lambda n: len(n._saved_indices) == 1,
    "IndexSelectBackward0": lambda n: n._saved_dim == 0,
}


def _bias_of(tape: Tape, use: Use, shape: Sequence[int]) -> str | None:
    """The parameter that is a use's bias, one number for each output."""
    number = PRODUCTS[use.name].bias
    for slot in use.slots:
        if slot.number != number or torch.Size(slot.shape).numel() != shape[1]:
            continue
        if _is_moved(tape, slot):
            return slot.paths[0].parameter
    return None


def _is_moved(tape: Tape, slot: Slot) -> bool:
    """Whether one parameter comes in, whose elements were at most moved or rounded."""
    if len(slot.paths) != 1 or slot.paths[0].steps is None:
        return False
    return all(is_known(tape.names[node]) for node, _, _ in slot.paths[0].steps)
