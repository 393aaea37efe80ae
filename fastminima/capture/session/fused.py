"""Weight gradients by our own kernels: for which uses, and how they reach `.grad`.

In fused mode the backward pass leaves out the products that make these gradients, and
the kernel that computes the statistics of a use makes its gradient from the same tiles.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..graph.node import Node, edge_of
from ..graph.nodes import ADDMM, CONVOLUTION, EMBEDDING, PRODUCTS, is_scaled
from ..graph.passes import is_distributed
from ..graph.tape import Tape
from ..reading.plan import Slot, Use
from ..reading.reader import Reading
from ..rows.layout import RegularLayout
from .delivery import delivery_of
from .moves import is_known

__all__ = ["Fusion", "find_fusion"]


class Fusion:
    """What a pass leaves out: the gradients of `names`, made where the uses are seen.

    Attributes:
        names: parameters whose gradients the session makes.
        inputs: for `backward(inputs=...)`: all other leaves, and the edges into the
            uses, so that the pass visits them.
        made: the gradients, from the time their last use is seen until they are
            delivered, which `add` fills.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], others: list[Any], uses: Sequence[Node]
    ) -> None:
        self._parameters = parameters
        self.names = frozenset(parameters)
        self.inputs = [*others, *(edge_of(node, 0) for node in uses)]
        self.made: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        if is_distributed() or any(map(_has_step, parameters.values())):
            # The graph does not keep this alive, nor this the graph.
            deliver = weakref.WeakMethod(self.deliver)
            for node in uses:
                self._handles.append(node.register_hook(_after_use(deliver)))

    def add(self, name: str, grad: Tensor) -> None:
        """Keep a gradient, in its parameter's dtype: all of them wait at once."""
        self.made[name] = grad.to(self._parameters[name].dtype)

    def deliver(self) -> None:
        """Accumulate the gradients as a backward pass does, with every hook."""
        if not self.made:
            return
        parameters = [self._parameters[name] for name in self.made]
        grads = list(self.made.values())
        self.made.clear()
        with torch.enable_grad():
            source = _Source.apply(grads, *parameters)
        assert isinstance(source, Tensor)
        source.backward()

    def close(self) -> None:
        """Let go of the graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.made.clear()


class _Source(torch.autograd.Function):
    """Where gradients come from: inside a pass, and held by nobody else.

    So they become `.grad` themselves; those from outside would be copied.
    """

    @staticmethod
    def forward(ctx: Any, grads: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None, *ctx.grads)
        ctx.grads.clear()
        return grads


def _after_use(deliver: weakref.WeakMethod[Callable[[], None]]) -> Callable[..., None]:
    """Deliver inside the pass, where a parameter's last use has run.

    Not before: what is called with the gradient may change the parameter, as an
    optimizer does, and the use reads it.
    """

    def hook(*_: Any) -> None:
        run = deliver()
        if run is not None:
            run()

    return hook


def _has_step(parameter: Tensor) -> bool:
    """Whether something is called as soon as a gradient is there, as by optimizers."""
    return bool(parameter._post_accumulate_grad_hooks)


def find_fusion(reading: Reading, parameters: Mapping[str, Tensor]) -> Fusion | None:
    """The parameters of this graph that can be fused; None where there are none.

    Weights of dense layers over several rows a sample and of convolutions, the biases
    beside them, and tables that are such weights too: all of whose uses are known.
    With one row a sample there is nothing to share: norms are products of row norms.
    """
    tape, recipe = reading.tape, reading.recipe
    if recipe.regions:  # they run by a backward pass of their own
        return None
    uses = [
        part
        for use in recipe.plan.uses
        if (part := _part_of(tape, use, recipe.layouts[use.node])) is not None
    ]

    def whole(name: str, found: Sequence[str]) -> bool:
        is_whole = found.count(name) == recipe.plan.sources[name]
        return is_whole and _may_be_left_out(parameters[name])

    weights = [part.weight for part in uses]
    rows = Counter[str]()
    for part in uses:
        rows[part.weight] += part.rows
    names = {name for name in rows if rows[name] > 1 and whole(name, weights)}
    biases = [part.bias for part in uses if part.bias and part.weight in names]
    names |= {name for name in biases if whole(name, biases)}
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
    nodes = [part.node for part in uses if part.weight in names]
    fused = {name: parameters[name] for name in sorted(names)}
    return Fusion(fused, others, nodes)


class _Part(NamedTuple):
    """A use of a weight, of which the kernels know how to make the gradient.

    Attributes:
        node: of the use.
        weight, bias: the parameters; no bias where there is none, or an odd one.
        rows: how many of a sample's a product adds up; none for a table.
    """

    node: Node
    weight: str
    bias: str | None
    rows: int


# By which input a weight comes in, and along which dim of the output samples are then.
_FACTORS = {
    ADDMM: {2: 0, 1: 1},
    "MmBackward0": {1: 0, 0: 1},
    "BmmBackward0": {1: 1, 0: 2},
    CONVOLUTION: {1: 0},
}


def _part_of(tape: Tape, use: Use, layouts: Sequence[Any]) -> _Part | None:
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
            return _Part(node, weight, bias, rows)
    return None


def _table_of(tape: Tape, use: Use, layout: RegularLayout) -> _Part | None:
    """A look-up of rows, whose gradients are added to those of a product."""
    (slot,), (shape,) = use.slots, tape.shapes(use.node)
    node = tape.nodes[use.node]
    if len(slot.shape) != 2 or layout.dim == len(shape) - 1 or len(slot.paths) != 1:
        return None  # samples along the features
    if not _TABLES[use.name](node) or delivery_of(tape, slot, slot.paths[0]):
        return None  # or a part of a parameter
    return _Part(node, slot.paths[0].parameter, None, 0)


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


def _may_be_left_out(parameter: Tensor) -> bool:
    """Whether nobody notices that the pass itself has no gradient of a parameter.

    Hooks on the parameter may count the gradients that one pass brings them, as those
    of `torch.autograd.graph.register_multi_grad_hook` do.
    """
    is_plain = parameter.layout == torch.strided and not parameter._backward_hooks
    return is_plain and parameter.requires_grad
