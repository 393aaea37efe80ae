"""Which step a program has for a use: decided by what kind of node the use is.

A kernel's step is told where autograd keeps what the kernel reads, whose rows are
whose, and to which rows of the table its results go; Python's is a function of the
tensors. To add one: a function of `Making`, a line in `_STEPS`, and for a kernel a
class in `csrc/host/steps.cpp`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops import broadcast, dense, embedding, norm
from ...ops.conv_geometry import ConvGeometry
from ...ops.cost import dense as cost
from ..contributions import Patches, Products, sq_norms_of
from ..graph.nodes import (
    ADDMM,
    CONVOLUTION,
    EMBEDDING,
    KEEPING_ORDER,
    PRODUCTS,
)
from ..graph.tape import signed
from ..rows.layout import RegularLayout
from .making import Making

__all__ = ["add_matrix", "add_step", "convolution_of", "products_of"]


def add_step(making: Making) -> bool:
    """Add a step for a use of a known kind; returns whether it is one."""
    steps = _STEPS if making.is_alone else _STEPS_OF_SHARED
    make, layout = steps.get(making.use.name), making.layout
    if make is None or not isinstance(layout, RegularLayout):
        return False
    return layout.chosen is None and make(making)


def _dense(making: Making) -> bool:
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
    common = (making.use.node, saved, factors)
    if making.is_for_kernels:
        assert making.dtype is not None
        if add_matrix(making.steps, weight.shape, places, layout, making.dtype, common):
            return True
    products = products_of(layout, bias is not None)
    return making.call([saved], (weight, bias), products, factors)


def add_matrix(
    steps: Any,
    shape: Sequence[int],
    places: tuple[int, int],
    layout: RegularLayout,
    dtype: torch.dtype,
    of_node: tuple[int, str, dict[str, int]] = (0, "", {}),
) -> bool:
    """Add a step for a matrix `[d_in, d_out]`; not where PyTorch's ways are faster.

    Args:
        steps: the program.
        shape: of the matrix.
        places: rows of the weight and of the bias; -1 where nobody asks.
        layout: of the output gradient.
        dtype: of the tensors.
        of_node: its number, what it has saved, and what else must hold of it.
    """
    node, saved, required = of_node
    time, (d_in, d_out) = layout.outer * layout.inner, shape
    if cost.is_torch_faster(time, d_in, d_out):
        return False
    if layout.is_one_row:
        steps.add_single_rows(node, saved, places, required)
        return True
    is_gram = cost.choose(time, d_in, d_out) == "gram"
    guard = cost.guard(d_in, d_out, dtype) if is_gram else -1.0
    axis = layout.dim, layout.outer, layout.batch, layout.inner
    steps.add_sequences(node, saved, places, axis, guard, required)
    return True


def products_of(
    layout: RegularLayout, has_bias: bool
) -> Callable[[Tensor, Tensor], Sequence[Tensor | None]]:
    """Norms of a weight and its bias, by the ops."""
    if layout.is_one_row:
        return lambda g, a: dense.row_sq_norms(a, g)

    def sequences(g: Tensor, a: Tensor) -> Sequence[Tensor | None]:
        rows = layout.rows(a, 1), layout.rows(g, 1)
        products = Products(*rows, with_bias=has_bias)
        weight = products.weight_norms  # first: it leaves those of the bias
        return weight, products.bias_norms if has_bias else None

    return sequences


def _convolution(making: Making) -> bool:
    """A convolution over images, one a sample."""
    slots = making.slots(1, 2)
    if slots is None or 1 not in slots:
        return False
    if making.layout.dim != 0 or not making.layout.is_one_row:
        return False
    patches_of, required = convolution_of(making, has_bias=2 in slots)

    def norms(g: Tensor, x: Tensor) -> Sequence[Tensor | None]:
        patches = patches_of(g, x)
        weight = patches.weight_norms  # first: it leaves those of the bias
        return weight, patches.bias_norms if 2 in slots else None

    return making.call(["_saved_input"], (slots[1], slots.get(2)), norms, required)


def convolution_of(
    making: Making, *, has_bias: bool
) -> tuple[Callable[[Tensor, Tensor], Patches], dict[str, Any]]:
    """What a convolution multiplies, of its gradient and input; and what must hold."""
    node = making.tape.nodes[making.use.node]
    (weight,) = (slot for slot in making.use.slots if slot.number == 1)
    words = ("stride", "padding", "dilation", "output_padding")
    numbers = {word: tuple(getattr(node, f"_saved_{word}")) for word in words}
    geometry = ConvGeometry(
        kernel_size=tuple(weight.shape[2:]),
        groups=node._saved_groups,
        transposed=node._saved_transposed,
        **numbers,
    )
    required = {
        f"_saved_{word}": getattr(node, f"_saved_{word}")
        for word in (*words, "groups", "transposed")
    }
    return lambda g, x: Patches(x, g, geometry, with_bias=has_bias), required


def _layer_norm(making: Making) -> bool:
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
    required = {"_saved_normalized_shape": node._saved_normalized_shape}
    if not making.is_for_kernels:
        affine = partial(_affine, making.layout, len(shape))
        pair = slots.get(1), slots.get(2)
        return making.call(saved, pair, affine, required, minds_sign=True)
    places = making.row(slots.get(1)), making.row(slots.get(2))
    making.steps.add_layer_norm(
        *(making.use.node, saved, places, making.axis, len(shape)), required
    )
    return True


def _affine(
    layout: RegularLayout, trailing: int, g: Tensor, x: Tensor, *statistics: Tensor
) -> Sequence[Tensor]:
    """Norms of a layer norm's scale and shift, by the ops."""
    tensors = (g, x, *statistics)
    grads, x, means, rstds = (layout.rows(t, trailing).flatten(2) for t in tensors)
    pair = norm.layer_norm_gradients(grads, x, means[..., 0], rstds[..., 0])
    return [sq_norms_of(samples) for samples in pair]


def _scale(making: Making) -> bool:
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
    if not making.is_for_kernels:
        return making.call([saved], [slot], partial(_scaled, making.layout))
    making.steps.add_scale(making.use.node, saved, making.row(slot), making.axis, {})
    return True


def _scaled(layout: RegularLayout, g: Tensor, other: Tensor) -> Sequence[Tensor | None]:
    """Norms of a scale of the last dim, by the ops."""
    if other.shape != g.shape:
        other = other.expand_as(g)
    rows = layout.rows(g, 1), layout.rows(other, 1)
    return [sq_norms_of(broadcast.product_over_time(*rows))]


def _rms_norm(making: Making) -> bool:
    """Scale after a division by the root mean square, in one kernel."""
    slots = making.slots(1)
    node = making.tape.nodes[making.use.node]
    shape = tuple(node._saved_normalized_shape)
    (output,) = making.tape.shapes(making.use.node)[:1]
    if slots is None or making.layout.dim >= len(output) - len(shape):
        return False
    layout, trailing = making.layout, len(shape)

    def norms(g: Tensor, x: Tensor, rstd: Tensor) -> Sequence[Tensor]:
        rows = (layout.rows(t, trailing).flatten(2) for t in (g, x, rstd))
        grads, x, rstds = rows
        pair = norm.layer_norm_gradients(grads, x, None, rstds[..., 0])
        return [sq_norms_of(pair[0])]

    return making.call(
        ["_saved_input", "_saved_result1"],
        [slots[1]],
        norms,
        {"_saved_normalized_shape": node._saved_normalized_shape},
    )


def _group_norm(making: Making) -> bool:
    """Scale and shift of an image's channels, after a normalisation by their groups."""
    slots = making.slots(1, 2)
    if slots is None or making.layout.dim != 0 or not making.layout.is_one_row:
        return False

    def norms(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Sequence[Tensor]:
        g, x = (t.reshape(t.shape[0], t.shape[1], -1) for t in (g, x))
        pair = norm.channel_norm_gradients(g, x, mean, rstd)
        return [sq_norms_of(samples) for samples in pair]

    saved = ["_saved_input", "_saved_result1", "_saved_result2"]
    pair = slots.get(1), slots.get(2)
    return making.call(saved, pair, norms, minds_sign=True)


def _table(making: Making) -> bool:
    """A table whose rows are looked up."""
    slots = making.slots(0)
    node = making.tape.nodes[making.use.node]
    (output,) = making.tape.shapes(making.use.node)
    if slots is None or making.layout.dim >= len(output) - 1:
        return False
    padding, layout = signed(node._saved_padding_idx), making.layout
    required = {
        "_saved_scale_grad_by_freq": False,
        "_saved_padding_idx": node._saved_padding_idx,
    }
    if not making.is_for_kernels:
        return making.call(
            ["_saved_indices"],
            [slots[0]],
            lambda g, ids: [
                embedding.embedding_sq_norms(
                    layout.rows(ids, 0), layout.rows(g, 1), padding
                )
            ],
            required,
        )
    making.steps.add_table(
        *(making.use.node, "_saved_indices", making.row(slots[0]), making.axis),
        *(padding, required),
    )
    return True


def _shared_table(making: Making) -> bool:
    """A table looked up once for all samples, such as one of positions, and added."""
    slots, layout = making.slots(0, 1), making.layout
    if slots is None or len(slots) > 1 or not making.is_for_kernels:
        return False
    ((number, slot),) = slots.items()
    if not slot.is_alone or len(slot.paths) != 1 or not slot.paths[0].steps:
        return False
    *between, source = (node for node, _, _ in slot.paths[0].steps)
    if making.tape.names[source] != EMBEDDING:
        return False
    if any(making.tape.names[node] not in KEEPING_ORDER for node in between):
        return False
    (output,) = making.tape.shapes(making.use.node)
    shape = [1] * (len(output) - len(slot.shape)) + list(slot.shape)
    spread = [i for i, size in enumerate(output) if size != shape[i]]
    if not layout.is_one_row or spread not in ([], [layout.dim]):
        return False
    if layout.dim >= len(output) - 1 or shape[layout.dim] != 1:
        return False
    node = making.tape.nodes[source]
    of_source = {
        "_saved_scale_grad_by_freq": False,
        "_saved_padding_idx": node._saved_padding_idx,
    }
    making.steps.add_shared_table(
        *(making.use.node, source, "_saved_indices", making.row(slot), making.axis),
        *(signed(node._saved_padding_idx), {"_saved_alpha": 1} if number else {}),
        of_source,
    )
    return True


# What makes the step of a use, by the name of its node; returns whether there is one.
_STEPS: dict[str, Callable[[Making], bool]] = {
    **{name: _dense for name, product in PRODUCTS.items() if product.is_of_matrices},
    CONVOLUTION: _convolution,
    "NativeLayerNormBackward0": _layer_norm,
    "FusedRmsNormBackward0": _rms_norm,
    "NativeGroupNormBackward0": _group_norm,
    "MulBackward0": _scale,
    EMBEDDING: _table,
}
# ... whose parameter comes by more than rearrangements, or is used elsewhere too.
_STEPS_OF_SHARED: dict[str, Callable[[Making], bool]] = {"AddBackward0": _shared_table}
