"""The step of a use whose parameters' gradients are made with their norms.

As `steps.py` for the others: what is known of the use is decided once. The gradient is
allocated when the step runs, in the parameter's own shape, and becomes its `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...ops.cost.dense import is_fused_faster
from ...ops.native.dense import part_of_rows
from ..contributions import Convolution, ConvolutionBias, Dense, DenseBias, Products
from ..contributions.base import Contribution
from ..graph.nodes import ADDMM, CONVOLUTION, PRODUCTS, ROUNDING
from ..reading.plan import Slot
from ..rows.layout import RegularLayout
from .making import Making
from .steps import convolution_of

__all__ = ["add_fused"]


def add_fused(making: Making) -> bool:
    """Add a step that makes gradients, for a use of a known kind; whether it is one."""
    make, layout = _STEPS.get(making.use.name), making.layout
    if make is None or not isinstance(layout, RegularLayout) or not making.is_alone:
        return False
    return layout.chosen is None and layout.dim == 0 and make(making)


def _dense(making: Making) -> bool:
    """A layer whose weight is a matrix, over several rows a sample."""
    product = PRODUCTS[making.use.name]
    slots = making.slots(product.weight, product.bias)
    if product.factors is None or slots is None or product.weight not in slots:
        return False
    weight, layout = slots[product.weight], making.layout
    bias = None if product.bias is None else slots.get(product.bias)
    turns = _turns(making, weight)
    (shape,) = making.tape.shapes(making.use.node)
    if turns is None or layout.is_one_row or len(shape) != 2:
        return False
    if not (_is_made(making, weight) and _is_beside(making, bias, weight.shape[1:])):
        return False
    out_first = turns % 2 == 1
    saved = f"_saved_{product.operands[product.factors[0]]}"
    factors = {"_saved_alpha": 1, "_saved_beta": 1} if making.use.name == ADDMM else {}
    shapes = [tuple(weight.shape[::-1] if out_first else weight.shape)]
    shapes += [] if bias is None else [tuple(bias.shape)]
    time, (rows, columns) = layout.outer * layout.inner, shapes[0]
    there = [weight] if bias is None else [weight, bias]
    made = {
        slot.paths[0].parameter: shape
        for slot, shape in zip(there, shapes, strict=True)
        if _is_made(making, slot)
    }
    if _is_for_kernels(making, made) and is_fused_faster(time, columns, rows):
        part = part_of_rows(rows, columns, making.parameters[next(iter(made))].itemsize)
        gradients = [(making.rows[name], x, None, None) for name, x in made.items()]
        making.steps.add_fused_sequences(
            *(making.use.node, saved, (making.row(weight), making.row(bias))),
            *(making.axis, out_first, part, gradients, factors),
        )
        return True

    def parts(g: Tensor, a: Tensor) -> Sequence[Contribution]:
        has_bias = bias is not None
        products = Products(layout.rows(a, 1), layout.rows(g, 1), with_bias=has_bias)
        found = Dense(products, out_first=out_first)
        return [found, DenseBias(products, shapes[1])] if has_bias else [found]

    return _call(making, [saved], there, made, parts, factors)


def _convolution(making: Making) -> bool:
    """A convolution over images, one a sample."""
    slots = making.slots(1, 2)
    if slots is None or 1 not in slots or not making.layout.is_one_row:
        return False
    weight, bias = slots[1], slots.get(2)
    if _turns(making, weight) != 0 or not _is_made(making, weight):
        return False
    if not _is_beside(making, bias, bias.shape if bias else ()):
        return False
    patches, required = convolution_of(making, has_bias=bias is not None)
    there = [weight] if bias is None else [weight, bias]
    made = {
        slot.paths[0].parameter: tuple(slot.shape)
        for slot in there
        if _is_made(making, slot)
    }

    def parts(g: Tensor, x: Tensor) -> Sequence[Contribution]:
        found = patches(g, x)
        weight, bias = Convolution(found), ConvolutionBias(found)
        return [weight, bias][: len(there)]

    return _call(making, ["_saved_input"], there, made, parts, required)


def _call(
    making: Making,
    saved: Sequence[str],
    slots: Sequence[Slot],
    made: Mapping[str, Sequence[int]],
    parts: Callable[..., Sequence[Contribution]],
    required: dict[str, Any],
) -> bool:
    """Let Python take it, by the contributions of a weight and a bias beside it."""
    are_made = [_is_made(making, slot) for slot in slots]

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        norms, gradients = [], []
        for part, is_made in zip(parts(*tensors), are_made, strict=True):
            if is_made:
                found = part.fused(with_second_moment=False)
                norms.append(found.sq_norms)
                gradients.append(found.total)
            else:
                norms.append(part.sq_norms())
        return [*norms, *gradients]

    return making.call(saved, slots, run, required, minds_sign=True, made=made)


def _is_made(making: Making, slot: Slot) -> bool:
    return slot.paths[0].parameter in making.makes


def _is_for_kernels(making: Making, made: Iterable[str]) -> bool:
    """Whether kernels on the host read and write all tensors as they are."""
    dtypes = {making.parameters[name].dtype for name in made}
    return making.is_for_kernels and dtypes == {making.dtype}


def _turns(making: Making, slot: Slot) -> int | None:
    """How often a parameter is transposed on its way, where else it is only rounded."""
    (path,) = slot.paths
    names = [making.tape.names[node] for node, _, _ in path.steps or ()]
    (output, *_) = making.tape.nodes[making.use.node]._input_metadata
    is_there = making.parameters[path.parameter].device == output.device
    if not is_there or not set(names) <= {"TBackward0", ROUNDING}:
        return None
    return names.count("TBackward0")


def _is_beside(making: Making, bias: Slot | None, shape: Sequence[int]) -> bool:
    """Whether a bias is a parameter of that shape, if there is one."""
    if bias is None:
        return True
    return tuple(bias.shape) == tuple(shape) and _turns(making, bias) == 0


_STEPS: dict[str, Callable[[Making], bool]] = {
    **{name: _dense for name, product in PRODUCTS.items() if product.is_of_matrices},
    CONVOLUTION: _convolution,
}
