"""Dense layers with one row a sample, where norms are all that is asked for.

They are what perceptrons consist of, whose steps are so short that the general way, by
contributions, costs more than the norms themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ...ops import dense
from ..graph.nodes import PRODUCTS, REARRANGING
from ..graph.saved import saved_tensor
from ..graph.tape import Tape
from ..reading.plan import Path, Use
from ..rows.layout import RegularLayout

if TYPE_CHECKING:
    from ..reading.memory import Found

__all__ = ["RowUse", "find_row_uses"]


class RowUse(NamedTuple):
    """One use: the parameters behind it, and the name of its saved inputs."""

    weight: str
    bias: str | None
    inputs: str

    def norms(self, node: torch.autograd.graph.Node, g: Tensor) -> dict[str, Tensor]:
        """Squared norms of each sample's gradients, `[batch]` for each parameter."""
        weight, bias = dense.row_sq_norms(saved_tensor(node, self.inputs), g)
        if self.bias is None:
            return {self.weight: weight}
        return {self.weight: weight, self.bias: bias}


def find_row_uses(tape: Tape, found: Found) -> dict[int, RowUse]:
    """The uses of a graph, by node, whose norms are those of single rows."""
    if found.regions:
        return {}
    uses = zip(found.plan.uses, found.layouts, strict=True)
    rows = {use.node: _row_use(tape, found, use, layouts) for use, layouts in uses}
    return {node: row for node, row in rows.items() if row is not None}


def _row_use(tape: Tape, found: Found, use: Use, layouts: list) -> RowUse | None:
    product = PRODUCTS.get(use.name)
    if product is None or not product.is_of_matrices or not _is_row(layouts[0]):
        return None
    assert product.factors is not None
    weight, bias = product.weight, product.bias
    inputs = f"_saved_{product.operands[product.factors[0]]}"
    slots = {slot.number: slot for slot in use.slots}
    if weight not in slots or not slots.keys() <= {weight, bias}:
        return None
    if not all(_comes_alone(tape, found, slot.paths) for slot in use.slots):
        return None
    names = {number: slot.paths[0].parameter for number, slot in slots.items()}
    if bias in slots and slots[bias].shape != slots[weight].shape[1:]:
        return None  # one that is broadcast
    return RowUse(names[weight], None if bias is None else names.get(bias), inputs)


def _is_row(layout: object) -> bool:
    return (
        isinstance(layout, RegularLayout)
        and layout.dim == 0
        and layout.is_one_row
        and layout.chosen is None
    )


def _comes_alone(tape: Tape, found: Found, paths: tuple[Path, ...]) -> bool:
    """Whether a slot takes one parameter, rearranged at most, used only here."""
    if len(paths) != 1 or paths[0].steps is None:
        return False
    return found.plan.sources[paths[0].parameter] == 1 and all(
        tape.names[node] in REARRANGING for node, _, _ in paths[0].steps
    )
