"""What is done with the gradients of a known graph: decided once, run in every step.

The generic way asks each use anew for its rule, its contributions, their way to the
parameters. Where the recipe of a graph already says the layout, the kernel and where
the result goes, all of that is one *step*: called with the node and its gradient, it
returns what is collected. A use without a step goes the generic way, which gives the
same bits and serves everything.

    addmm(bias [20], x [N, 10], weight.t()), one row a sample
    -> SingleRows("weight", "bias", "_saved_mat1"):  |g_n|^2 |x_n|^2  and  |g_n|^2

To add one: a class with what `Step` asks for, and a line in `_STEPS` that names
what makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from ...ops import dense
from ..contributions import Products
from ..graph.node import Node
from ..graph.nodes import PRODUCTS, REARRANGING, is_scaled
from ..graph.saved import saved_tensor
from ..graph.tape import Tape
from ..reading.plan import Slot, Use
from ..reading.reader import Reading
from ..rows.layout import RegularLayout, RowLayout

__all__ = ["Program", "Sequences", "SingleRows", "Step", "program_of"]


@runtime_checkable
class Step(Protocol):
    """What is done with the output gradient of one use, when norms are all that counts.

    It holds names and numbers, and no node: it outlives the graph.
    """

    @property
    def parameters(self) -> Collection[str]:
        """The parameters whose norms it gives."""
        ...

    def fits(self, node: Node) -> bool:
        """Whether the use of this graph is what the step was made for.

        Of what a program may change from step to step while the graph stays the same.
        """
        ...

    def norms(self, node: Node, g: Tensor) -> Mapping[str, Tensor]:
        """Squared norms of each sample's gradients, `[batch]` for each parameter."""
        ...


@dataclass(frozen=True)
class Program:
    """The steps of a recipe, by the node of their use."""

    steps: Mapping[int, Step] = field(default_factory=dict)


_NOTHING = Program()


def program_of(reading: Reading, *, wants_norms_only: bool) -> Program:
    """The program of a recipe, made when it is first asked for.

    Empty where rows are routed anew in each step, where regions run, and where more
    than norms is wanted.
    """
    recipe = reading.recipe
    if not wants_norms_only or recipe.routes is not None or recipe.regions:
        return _NOTHING
    program = recipe.programs.get("norms")
    if program is None:
        program = recipe.programs["norms"] = _make(reading)
    return program


def _make(reading: Reading) -> Program:
    steps: dict[int, Step] = {}
    for use in reading.recipe.plan.uses:
        layouts = reading.recipe.layouts[use.node]
        make = _STEPS.get(use.name)
        step = None if make is None else make(reading.tape, use, layouts[0])
        if step is not None:
            steps[use.node] = step
    return Program(steps)


@dataclass(frozen=True)
class _Layer:
    """A dense layer that is used once, its parameters rearranged at most.

    Attributes:
        name: of the node.
        weight, bias: the parameters; no bias where there is none.
        inputs: the attribute that keeps the rows.
    """

    name: str
    weight: str
    bias: str | None
    inputs: str

    @property
    def parameters(self) -> Collection[str]:
        """The parameters of the layer."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def fits(self, node: Node) -> bool:
        """Whether nothing is multiplied with a number."""
        return not is_scaled(node, self.name)

    def _named(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        if self.bias is None or bias is None:
            return {self.weight: weight}
        return {self.weight: weight, self.bias: bias}


@dataclass(frozen=True)
class SingleRows(_Layer):
    """With one row a sample: norms are products of those of rows."""

    def norms(self, node: Node, g: Tensor) -> dict[str, Tensor]:
        """Squared norms of each sample's gradients, `[batch]` for each parameter."""
        return self._named(*dense.row_sq_norms(saved_tensor(node, self.inputs), g))


@dataclass(frozen=True)
class Sequences(_Layer):
    """With as many rows for each sample, `[batch * time]` or `[time * batch]`."""

    layout: RegularLayout

    def norms(self, node: Node, g: Tensor) -> dict[str, Tensor]:
        """Squared norms of each sample's gradients, `[batch]` for each parameter."""
        rows = self.layout.rows(saved_tensor(node, self.inputs), 1)
        has_bias = self.bias is not None
        products = Products(rows, self.layout.rows(g, 1), with_bias=has_bias)
        weight = products.weight_norms  # first: it leaves those of the bias
        return self._named(weight, products.bias_norms if has_bias else None)


def _dense(tape: Tape, use: Use, layout: RowLayout | None) -> Step | None:
    """The step of a dense layer; None where it is used in another way."""
    product = PRODUCTS[use.name]
    if product.factors is None or not isinstance(layout, RegularLayout):
        return None
    if layout.dim != 0 or layout.chosen is not None:
        return None
    slots = {slot.number: slot for slot in use.slots}
    if product.weight not in slots or not all(
        number in (product.weight, product.bias) and _comes_alone(tape, slot)
        for number, slot in slots.items()
    ):
        return None
    weight = slots[product.weight]
    bias = None if product.bias is None else slots.get(product.bias)
    if bias is not None and bias.shape != weight.shape[1:]:
        return None  # one that is broadcast
    layer = (
        use.name,
        weight.parameters[0],
        None if bias is None else bias.parameters[0],
        f"_saved_{product.operands[product.factors[0]]}",
    )
    return SingleRows(*layer) if layout.is_one_row else Sequences(*layer, layout)


def _comes_alone(tape: Tape, slot: Slot) -> bool:
    """Whether a slot takes one parameter, rearranged at most, used only here."""
    if not slot.is_alone or len(slot.paths) != 1 or slot.paths[0].steps is None:
        return False
    return all(tape.names[node] in REARRANGING for node, _, _ in slot.paths[0].steps)


# What makes the step of a use, by the name of its node.
_STEPS: dict[str, Callable[[Tape, Use, RowLayout | None], Step | None]] = {
    name: _dense for name, product in PRODUCTS.items() if product.is_of_matrices
}
