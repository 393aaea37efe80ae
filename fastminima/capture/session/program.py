"""What is done with the gradients of a known graph: decided once, run in every step.

The generic way asks each use anew for its rule, its contributions, their way to the
parameters. Where the recipe of a graph already says the layout, the kernel and where
the result goes, all of that is one *step* of a program, which the extension runs: a hook
in C++ reads the gradient and what the node has saved, checks that they are what the step
was made for, and calls the kernel, which writes into a row of the pass' table.

    addmm(bias [20], x [N, 10], weight.t()), one row a sample
    -> single rows of "_saved_mat1":  |g_n|^2 |x_n|^2  and  |g_n|^2, to two rows

A use without a step, a step that does not fit (another dtype, strides that no kernel
reads, a checkpoint) goes the generic way, which gives the same bits and serves everything.

To add one: a function here that says when a use is of its kind, a line in `_STEPS`, and
a class in `csrc/host/steps.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ... import _native
from ...ops._arguments import SUFFIX
from ...ops.cost import dense as cost
from ..graph.nodes import ADDMM, EMBEDDING, PRODUCTS, REARRANGING
from ..graph.passes import owners
from ..graph.tape import Tape, signed
from ..reading.plan import Slot, Use
from ..reading.reader import Reading
from ..rows.layout import RegularLayout

__all__ = ["Program", "program_of"]


@dataclass(frozen=True)
class Program:
    """The steps of a recipe. It holds names and numbers, and no node.

    Attributes:
        steps: as the extension has them.
        uses: what each of them is for, in the same order.
        rows: of the table, for each parameter that the graph reaches.
        dtype: of the table, and of all that the steps read.
    """

    steps: Any
    uses: tuple[Use, ...]
    rows: Mapping[str, int]
    dtype: torch.dtype

    @cached_property
    def use_at(self) -> dict[int, Use]:
        """The use of each node that has a step."""
        return {use.node: use for use in self.uses}

    def start(self, session: Any, table: Tensor, *, waits: bool) -> Any:
        """A pass of the extension's, which calls `session` where it needs Python.

        Args:
            session: it is referenced weakly.
            table: `[rows, batch]`.
            waits: whether other passes may come by before the one that is observed.
        """
        host = _native.host()
        made = host.Pass(self.steps, session, table, waits, _native.threads())
        assert made.is_ready
        return made

    def nodes(self, hooked: bytes) -> frozenset[int]:
        """The nodes of the steps that have a 1."""
        if 0 not in hooked:
            return self._all_nodes
        uses = zip(self.uses, hooked, strict=True)
        return frozenset(use.node for use, is_hooked in uses if is_hooked)

    def parameters(self, taken: bytes) -> Collection[str]:
        """The parameters of the steps that have a 1."""
        if 0 not in taken:
            return self._all_parameters
        uses = zip(self.uses, taken, strict=True)
        return [n for use, is_taken in uses if is_taken for n in use.parameters]

    @cached_property
    def _all_nodes(self) -> frozenset[int]:
        return frozenset(self.use_at)

    @cached_property
    def _all_parameters(self) -> Collection[str]:
        return [name for use in self.uses for name in use.parameters]


def program_of(reading: Reading, order: Iterable[str]) -> Program | None:
    """The program of a recipe, made when it is first asked for.

    None where no use has a step, where rows are routed anew in each step, and where
    regions run. `order` names all tracked parameters.
    """
    recipe = reading.recipe
    if recipe.routes is not None or recipe.regions or not recipe.lasts:
        return None
    if "norms" not in recipe.programs:
        recipe.programs["norms"] = _make(reading, order)
    return recipe.programs["norms"]


def _make(reading: Reading, order: Iterable[str]) -> Program | None:
    host = _learned()
    if host is None:
        return None
    recipe, tape = reading.recipe, reading.tape
    reached = recipe.plan.sources
    rows = {name: i for i, name in enumerate(n for n in order if n in reached)}
    dtype = _dtype_of(tape, recipe.plan.uses)
    if dtype not in SUFFIX or dtype.itemsize < 4:
        return None
    steps = host.Program(SUFFIX[dtype], _native.available_isas()[0])
    uses = []
    for use in recipe.plan.uses:
        make = _STEPS.get(use.name)
        layout = recipe.layouts[use.node][0]
        if make is None or not isinstance(layout, RegularLayout):
            continue
        if layout.chosen is not None or not _is_on_cpu(tape, use, dtype):
            continue
        if make(_Making(steps, tape, use, layout, rows, dtype)):
            uses.append(use)
    return Program(steps, tuple(uses), rows, dtype) if uses else None


def _learned() -> Any:
    """What runs steps, once it knows what tensors and passes are; None without."""
    host = _native.host()
    if host is None:
        return None
    knows = host.learn(
        *(torch.Tensor, torch.nn.Parameter, owners()),
        torch._C._current_autograd_node,
    )
    return host if knows else None


def _dtype_of(tape: Tape, uses: Iterable[Use]) -> torch.dtype:
    """That of most output gradients."""
    dtypes = [tape.nodes[use.node]._input_metadata[0].dtype for use in uses]
    return max(set(dtypes), key=dtypes.count) if dtypes else torch.float32


def _is_on_cpu(tape: Tape, use: Use, dtype: torch.dtype) -> bool:
    (output, *_) = tape.nodes[use.node]._input_metadata
    return output.device.type == "cpu" and output.dtype == dtype


@dataclass(frozen=True)
class _Making:
    """One use, of which a step may be made."""

    steps: Any
    tape: Tape
    use: Use
    layout: RegularLayout
    rows: Mapping[str, int]
    dtype: torch.dtype

    @property
    def axis(self) -> tuple[int, int, int, int]:
        """Where the samples are."""
        layout = self.layout
        return layout.dim, layout.outer, layout.batch, layout.inner

    def slots(self, *numbers: int | None) -> dict[int, Slot] | None:
        """The slots by number; None where others take parameters, or not as they are.

        Rearranged they may be: norms do not change with the order of elements.
        """
        slots = {slot.number: slot for slot in self.use.slots}
        if not slots or not slots.keys() <= set(numbers):
            return None
        alone = (_comes_alone(self.tape, slot) for slot in slots.values())
        return slots if all(alone) else None

    def row(self, slot: Slot | None) -> int:
        """Where the norms of the slot's parameter go; -1 where it has none."""
        return -1 if slot is None else self.rows[slot.paths[0].parameter]


def _dense(making: _Making) -> bool:
    """A layer whose weight is a matrix."""
    product = PRODUCTS[making.use.name]
    slots = making.slots(product.weight, product.bias)
    if product.factors is None or slots is None or product.weight not in slots:
        return False
    weight = slots[product.weight]
    bias = None if product.bias is None else slots.get(product.bias)
    if bias is not None and bias.shape != weight.shape[1:]:
        return False  # one that is broadcast
    layout, (shape,) = making.layout, making.tape.shapes(making.use.node)
    if layout.dim != 0 or len(shape) != 2:
        return False
    places = making.row(weight), making.row(bias)
    saved = f"_saved_{product.operands[product.factors[0]]}"
    factors = {"_saved_alpha": 1, "_saved_beta": 1} if making.use.name == ADDMM else {}
    common = (making.use.node, saved, places)
    if layout.is_one_row:
        making.steps.add_single_rows(*common, factors)
        return True
    time, (d_in, d_out) = layout.outer * layout.inner, weight.shape
    if cost.is_torch_faster(time, d_in, d_out):
        return False
    is_gram = cost.choose(time, d_in, d_out) == "gram"
    guard = cost.guard(d_in, d_out, making.dtype) if is_gram else -1.0
    making.steps.add_sequences(*common, making.axis, guard, factors)
    return True


def _layer_norm(making: _Making) -> bool:
    """Scale and shift after a normalisation over the last dims."""
    slots = making.slots(1, 2)
    node = making.tape.nodes[making.use.node]
    shape = tuple(node._saved_normalized_shape)
    (output,) = making.tape.shapes(making.use.node)[:1]
    if slots is None or making.layout.dim >= len(output) - len(shape):
        return False
    if any(slot.shape != shape for slot in slots.values()):
        return False
    saved = ["_saved_input", "_saved_result1", "_saved_result2"]
    places = making.row(slots.get(1)), making.row(slots.get(2))
    making.steps.add_layer_norm(
        *(making.use.node, saved, places, making.axis, len(shape)),
        {"_saved_normalized_shape": node._saved_normalized_shape},
    )
    return True


def _scale(making: _Making) -> bool:
    """A scale of the last dim, as after a root mean square norm."""
    slots = making.slots(0, 1)
    if slots is None or len(slots) > 1:
        return False
    ((number, slot),) = slots.items()
    (output,) = making.tape.shapes(making.use.node)
    shape = (1,) * (len(output) - len(slot.shape)) + tuple(slot.shape)
    is_last = all(size == 1 for size in shape[:-1]) and shape[-1:] == output[-1:]
    if not is_last or making.layout.dim >= len(output) - 1:
        return False
    saved = "_saved_other" if number == 0 else "_saved_self"
    making.steps.add_scale(making.use.node, saved, making.row(slot), making.axis, {})
    return True


def _table(making: _Making) -> bool:
    """A table whose rows are looked up."""
    slots = making.slots(0)
    node = making.tape.nodes[making.use.node]
    (output,) = making.tape.shapes(making.use.node)
    if slots is None or making.layout.dim >= len(output) - 1:
        return False
    padding = node._saved_padding_idx
    making.steps.add_table(
        *(making.use.node, "_saved_indices", making.row(slots[0]), making.axis),
        signed(padding),
        {"_saved_scale_grad_by_freq": False, "_saved_padding_idx": padding},
    )
    return True


def _comes_alone(tape: Tape, slot: Slot) -> bool:
    """Whether a slot takes one parameter, rearranged at most, used only here."""
    if not slot.is_alone or len(slot.paths) != 1 or slot.paths[0].steps is None:
        return False
    return all(tape.names[node] in REARRANGING for node, _, _ in slot.paths[0].steps)


# What makes the step of a use, by the name of its node; returns whether there is one.
_STEPS: dict[str, Callable[[_Making], bool]] = {
    **{name: _dense for name, product in PRODUCTS.items() if product.is_of_matrices},
    "NativeLayerNormBackward0": _layer_norm,
    "MulBackward0": _scale,
    EMBEDDING: _table,
}
