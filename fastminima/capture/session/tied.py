"""A table that is also the weight of a head: two uses, computed together.

    logits = linear(x, table)      table.t() -> mm
    x = embedding(ids, table)

The extension keeps the gradient and what was saved of the use that comes first, and
computes |h|^2 + |e|^2 + 2 <h, e> when the other one comes. Where that is not to be, for
norms that nearly cancel and tensors that no kernel reads, both are taken by what they
contribute, as the generic way does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...ops.cost import dense as cost
from ...ops.native.dense import part_of_rows
from ..contributions import Contribution, Dense, Embedding, Products
from ..graph.nodes import ADDMM, EMBEDDING, PRODUCTS
from ..graph.tape import signed
from ..rows.layout import RegularLayout
from .making import Making

__all__ = ["Half", "Part", "add_tied", "tied_halves"]

# From the gradient and what a use has saved: what it adds to its parameter.
Part = Callable[[Tensor, Tensor], Contribution]


@dataclass(frozen=True)
class Half:
    """One of the two uses of a table.

    Attributes:
        making: the use.
        saved: the attribute that is read.
        required: attributes that must have a value.
        part: what it contributes.
        is_head: a product with the transposed table, or a look-up of its rows.
    """

    making: Making
    saved: str
    required: Mapping[str, Any]
    part: Part
    is_head: bool

    @property
    def parameter(self) -> str:
        """The table."""
        return self.making.use.slots[0].paths[0].parameter


def tied_halves(makings: Iterable[Making]) -> dict[int, tuple[Half, Half]]:
    """By the nodes of both uses: the two of each table that has no more uses."""
    found: dict[str, list[Half]] = {}
    uses: dict[str, int] = {}
    for making in makings:
        for name in making.use.parameters:
            uses[name] = uses.get(name, 0) + 1
        half = _head(making) or _table(making)
        if half is not None:
            found.setdefault(half.parameter, []).append(half)
    halves: dict[int, tuple[Half, Half]] = {}
    for name, pair in found.items():
        if len(pair) == uses[name] == 2 and pair[0].is_head != pair[1].is_head:
            halves |= {half.making.use.node: (pair[0], pair[1]) for half in pair}
    return halves


def add_tied(making: Making, pair: tuple[Half, Half], numbers: Sequence[int]) -> None:
    """Add the step of one of two uses; `numbers` are those of both steps."""
    steps, is_second = making.steps, pair[1].making is making
    half = pair[is_second]
    common = making.use.node, half.saved, numbers[not is_second]
    if not is_second:
        steps.add_half(*common, dict(half.required))
        return
    head, table = pair if pair[0].is_head else pair[::-1]
    _, time, d_in, d_out = _sizes(head.making)
    assert head.making.dtype is not None
    is_gram = cost.choose(time, d_in, d_out) == "gram"
    guard = cost.guard(d_in, d_out, head.making.dtype) if is_gram else -1.0
    padding = signed(table.required["_saved_padding_idx"])
    steps.add_tied(
        *(*common, making.row(making.use.slots[0]), pair[0].is_head),
        *(head.making.axis, guard, table.making.axis, padding, dict(half.required)),
        *_gradient(making, d_in, d_out),
    )


def _gradient(making: Making, width: int, rows: int) -> tuple[int, list[tuple]]:
    """How many rows of the table's gradient are made at a time, and where it goes."""
    if not making.is_fused:
        return 0, []
    assert making.dtype is not None
    part = part_of_rows(rows, width, making.dtype.itemsize)
    return part, [(making.row(making.use.slots[0]), (rows, width), None, None)]


def _sizes(making: Making) -> tuple[RegularLayout, int, int, int]:
    """The layout of a head, and its time, inputs and outputs."""
    layout, (slot,) = making.layout, making.use.slots
    d_in, d_out = slot.shape
    return layout, layout.outer * layout.inner, d_in, d_out


def _enters(making: Making, number: int | None, names: list[str]) -> bool:
    """Whether one parameter alone enters by this slot, through nodes of such names."""
    layout = making.layout
    if not isinstance(layout, RegularLayout) or layout.chosen is not None:
        return False
    if len(making.use.slots) != 1 or not making.is_for_kernels:
        return False
    (slot,) = making.use.slots
    if slot.number != number or len(slot.paths) != 1 or slot.paths[0].steps is None:
        return False
    return [making.tape.names[node] for node, _, _ in slot.paths[0].steps] == names


def _head(making: Making) -> Half | None:
    product = PRODUCTS.get(making.use.name)
    if product is None or not product.is_of_matrices or product.factors is None:
        return None
    if not _enters(making, product.weight, ["TBackward0"]):
        return None
    layout, time, d_in, d_out = _sizes(making)
    (output,) = making.tape.shapes(making.use.node)
    if layout.dim != 0 or len(output) != 2 or layout.is_one_row:
        return None
    if making.is_fused and not cost.is_fused_faster(time, d_in, d_out):
        return None
    if not making.is_fused and cost.is_torch_faster(time, d_in, d_out):
        return None

    def part(g: Tensor, a: Tensor) -> Contribution:
        products = Products(layout.rows(a, 1), layout.rows(g, 1))
        return Dense(products, out_first=True)

    saved = f"_saved_{product.operands[product.factors[0]]}"
    factors = {"_saved_alpha": 1, "_saved_beta": 1} if making.use.name == ADDMM else {}
    return Half(making, saved, factors, part, is_head=True)


def _table(making: Making) -> Half | None:
    if making.use.name != EMBEDDING or not _enters(making, 0, []):
        return None
    layout, (slot,) = making.layout, making.use.slots
    node = making.tape.nodes[making.use.node]
    (output,) = making.tape.shapes(making.use.node)
    if layout.dim >= len(output) - 1:
        return None
    number = node._saved_padding_idx
    required = {"_saved_scale_grad_by_freq": False, "_saved_padding_idx": number}
    if making.is_fused:  # the pass itself would make another kind of gradient
        required["_saved_sparse"] = False

    def part(g: Tensor, ids: Tensor) -> Contribution:
        rows = layout.rows(ids, 0), layout.rows(g, 1)
        return Embedding(*rows, signed(number), slot.shape[0])

    return Half(making, "_saved_indices", required, part, is_head=False)
