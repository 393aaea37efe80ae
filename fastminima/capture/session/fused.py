"""Weight gradients by our own kernels: for which uses, and how they reach `.grad`.

In fused mode the backward pass leaves out the products that make these gradients, and
the kernel that computes the statistics of a use makes its gradient from the same tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..graph.node import edge_of
from ..graph.nodes import CONVOLUTION, PRODUCTS, ROUNDING, TRANSPOSING, is_scaled
from ..graph.tape import Tape
from ..reading.plan import Path, Use
from ..reading.reader import Reading
from ..rows.layout import RegularLayout

__all__ = ["Fusion", "find_fusion"]


class Fusion:
    """What a pass leaves out: the gradients of `names`, made where the uses are seen.

    Attributes:
        names: parameters whose gradients the session makes.
        inputs: for `backward(inputs=...)`: all other leaves, and the edges into the
            uses, so that the pass visits them.
        made: the gradients, from the time their use is seen until `deliver`, which
            `add` fills.
    """

    def __init__(self, parameters: Mapping[str, Tensor], inputs: list[Any]) -> None:
        self._parameters = parameters
        self.names = frozenset(parameters)
        self.inputs = inputs
        self.made: dict[str, Tensor] = {}

    def add(self, name: str, grad: Tensor) -> None:
        """Keep a gradient, in its parameter's dtype: all of them wait at once."""
        self.made[name] = grad.to(self._parameters[name].dtype)

    def deliver(self) -> None:
        """Accumulate the gradients as a backward pass does, with every hook."""
        handles = []
        grads = []
        parameters = [self._parameters[name] for name in self.made]
        try:
            for parameter in parameters:
                grad = self.made.pop(next(iter(self.made)))
                if parameter.grad is None and not parameter._backward_hooks:
                    # Handed over inside the pass, where nobody else holds it, it
                    # becomes `.grad` itself; a gradient from outside would be copied.
                    handles.append(parameter.register_hook(_hand_over([grad])))
                    grad = parameter.new_zeros(()).expand_as(parameter)
                grads.append(grad)
            if parameters:
                torch.autograd.backward(parameters, grads)
        finally:
            for handle in handles:
                handle.remove()


def find_fusion(reading: Reading, parameters: Mapping[str, Tensor]) -> Fusion | None:
    """The parameters of this graph that can be fused; None where there are none.

    Those of dense layers over several rows a sample and of convolutions, used once.
    With one row a sample there is nothing to share: norms are products of row norms.
    """
    tape, recipe = reading.tape, reading.recipe
    if recipe.regions:  # they run by a backward pass of their own
        return None
    names: set[str] = set()
    edges: list[GradientEdge] = []
    for use in recipe.plan.uses:
        layouts = recipe.layouts[use.node]
        if not _has_rows(tape, use, layouts[0] if layouts else None):
            continue
        slots = _whole_slots(tape, use)
        fused = {
            number: name
            for number, name in slots.items()
            if recipe.plan.sources[name] == 1
            and parameters[name].layout == torch.strided
            and parameters[name].requires_grad
        }
        if PRODUCTS[use.name].weight in fused:
            names.update(fused.values())
            edges.append(edge_of(tape.nodes[use.node], 0))
    if not names:
        return None
    left_out = {tape.leaves[name] for name in names}
    others = [
        leaf
        for i in range(len(tape.nodes))
        if tape.is_leaf(i)
        and i not in left_out
        and (leaf := tape.nodes[i].variable).requires_grad  # not frozen since
    ]
    fused = {name: parameters[name] for name in sorted(names)}
    return Fusion(fused, [*others, *edges])


def _has_rows(tape: Tape, use: Use, layout: Any) -> bool:
    """Whether a use is one that the kernels know, with several rows a sample."""
    if use.name not in PRODUCTS or not isinstance(layout, RegularLayout):
        return False
    if PRODUCTS[use.name].weight is None:
        return False
    if layout.dim != 0 or layout.chosen is not None:
        return False
    node = tape.nodes[use.node]
    if is_scaled(node, use.name):
        return False
    (shape,) = tape.shapes(use.node)
    if use.name == CONVOLUTION:
        return layout.is_one_row and torch.Size(shape[2:]).numel() > 1
    return layout.outer * layout.inner > 1


def _whole_slots(tape: Tape, use: Use) -> dict[int, str]:
    """The parameters that are a use's weight and bias, where they come as they are."""
    weight, bias = PRODUCTS[use.name].weight, PRODUCTS[use.name].bias
    (shape,) = tape.shapes(use.node)
    whole: dict[int, str] = {}
    for slot in use.slots:
        if slot.number not in (weight, bias) or len(slot.paths) != 1:
            continue
        is_broadcast = (
            slot.number == bias and torch.Size(slot.shape).numel() != shape[1]
        )
        may_turn = slot.number == weight and use.name != CONVOLUTION
        if not is_broadcast and _is_plain(tape, slot.paths[0], may_turn=may_turn):
            whole[slot.number] = slot.paths[0].parameter
    return whole


def _is_plain(tape: Tape, path: Path, *, may_turn: bool) -> bool:
    """Whether a gradient is rounded at most on its way, and matrices transposed once.

    Other steps are taken by the nodes themselves, which return nothing to a parameter
    whose gradient was not asked for.
    """
    if path.steps is None:
        return False
    moves = [tape.names[node] for node, _, _ in path.steps]
    moves = [name for name in moves if name != ROUNDING]
    return not moves or (may_turn and len(moves) == 1 and moves[0] in TRANSPOSING)


def _hand_over(held: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda _: held.pop()
