"""The step of a use whose parameters' gradients are made with their norms.

As `steps.py` for the others: what is known of the use is decided once. The gradient is
allocated when the step runs, in the parameter's own shape, and becomes its `.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...ops.cost.dense import is_fused_faster
from ...ops.native.dense import part_of_rows
from ..contributions import Convolution, ConvolutionBias, Dense, DenseBias, Products
from ..contributions.base import Contribution
from ..graph.nodes import ADDMM, CONVOLUTION, PRODUCTS
from ..graph.tape import Tape
from ..reading.plan import Slot
from ..rows.layout import RegularLayout
from .steps import Making, convolution_of

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
    turns = _turns(making.tape, weight)
    (shape,) = making.tape.shapes(making.use.node)
    if turns is None or layout.is_one_row or len(shape) != 2:
        return False
    if not (_is_made(making, weight) and _is_itself(bias, weight.shape[1:])):
        return False
    out_first = turns % 2 == 1
    saved = f"_saved_{product.operands[product.factors[0]]}"
    factors = {"_saved_alpha": 1, "_saved_beta": 1} if making.use.name == ADDMM else {}
    whole = tuple(weight.shape[::-1] if out_first else weight.shape)
    time, (rows, columns) = layout.outer * layout.inner, whole
    if making.is_for_kernels and is_fused_faster(time, columns, rows):
        assert making.dtype is not None
        part = part_of_rows(rows, columns, making.dtype.itemsize)
        shapes = {weight: whole} | ({} if bias is None else {bias: tuple(bias.shape)})
        made = [(making.row(s), x) for s, x in shapes.items() if _is_made(making, s)]
        making.steps.add_fused_sequences(
            *(making.use.node, saved, (making.row(weight), making.row(bias))),
            *(making.axis, out_first, part, made, factors),
        )
        return True

    def parts(g: Tensor, a: Tensor) -> Sequence[Contribution]:
        has_bias = bias is not None
        products = Products(layout.rows(a, 1), layout.rows(g, 1), with_bias=has_bias)
        found = Dense(products, out_first=out_first)
        return [found, DenseBias(products, bias.shape)] if bias else [found]

    return _call(making, [saved], [weight, bias], parts, factors)


def _convolution(making: Making) -> bool:
    """A convolution over images, one a sample."""
    slots = making.slots(1, 2)
    if slots is None or 1 not in slots or not making.layout.is_one_row:
        return False
    weight, bias = slots[1], slots.get(2)
    if _turns(making.tape, weight) != 0 or not _is_made(making, weight):
        return False
    if not _is_itself(bias, bias.shape if bias else ()):
        return False
    patches, required = convolution_of(making, has_bias=bias is not None)

    def parts(g: Tensor, x: Tensor) -> Sequence[Contribution]:
        found = patches(g, x)
        return [Convolution(found), *([ConvolutionBias(found)] if bias else [])]

    return _call(making, ["_saved_input"], [weight, bias], parts, required)


def _call(
    making: Making,
    saved: Sequence[str],
    slots: Sequence[Slot | None],
    parts: Callable[..., Sequence[Contribution]],
    required: dict[str, object],
) -> bool:
    """Let Python take it, by the contributions of a weight and a bias beside it."""
    there = [slot for slot in slots if slot is not None]
    are_made = [_is_made(making, slot) for slot in there]

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

    made = [s for s, is_made in zip(there, are_made, strict=True) if is_made]
    return making.call(saved, there, run, required, minds_sign=True, made=made)


def _is_made(making: Making, slot: Slot) -> bool:
    return slot.paths[0].parameter in making.makes


def _turns(tape: Tape, slot: Slot) -> int | None:
    """How often a matrix is transposed on its way; None if something else happens."""
    names = [tape.names[node] for node, _, _ in slot.paths[0].steps or ()]
    return len(names) if set(names) <= {"TBackward0"} else None


def _is_itself(bias: Slot | None, shape: Sequence[int]) -> bool:
    """Whether a bias is a parameter of that shape, if there is one."""
    if bias is None:
        return True
    return tuple(bias.shape) == tuple(shape) and not bias.paths[0].steps


_STEPS: dict[str, Callable[[Making], bool]] = {
    **{name: _dense for name, product in PRODUCTS.items() if product.is_of_matrices},
    CONVOLUTION: _convolution,
}
