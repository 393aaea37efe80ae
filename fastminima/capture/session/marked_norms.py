"""Norms of the uses of a compiled region: which function gives them, decided once.

In fused mode the gradient of a dense weight comes from the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ...ops import broadcast, embedding
from ...ops._arguments import NATIVE, SUFFIX
from ...ops.conv_geometry import ConvGeometry
from ...ops.cost.dense import is_fused_faster
from ...ops.native.dense import part_of_rows
from ..compiled.marks import WITH_FACTORS, Mark
from ..contributions import Patches, Products, sq_norms_of
from ..graph.extension import learned
from ..reading.plan import Use
from ..rows.layout import RegularLayout, RowLayout
from .marked_launches import LaunchedUse
from .steps import add_matrix, products_of

__all__ = ["Way", "way_of"]

# Of the output gradient and of what the node would have saved.
_Run = Callable[..., Sequence[Tensor | None]]


class Way(NamedTuple):
    """How to compute the norms of one use.

    Attributes:
        take: gives norms for each of the names, and the gradient of the weight where
            that is made, of where launches write and the tensors of the use.
        names: of parameters; None where nobody asks.
    """

    take: LaunchedUse
    names: tuple[str | None, ...]


def way_of(mark: Mark, use: Use, layout: RowLayout, *, makes: bool) -> Way | None:
    """The way for a use, all of whose parameters are used only here.

    None where the rule of such a use has to be asked, as where the gradient is more
    than rearranged on its way to the parameter, which would change its norm.

    Args:
        mark: of the use.
        use: the use, in the sizes that come.
        layout: of its output gradient.
        makes: whether gradients of weights are made too, where they can be.
    """
    moves = {move[0] for into in mark.into for move in into.moves}
    is_looked_up = any(into.looked_up is not None for into in mark.into)
    if moves & {"scale", "take", *WITH_FACTORS} or is_looked_up:
        return None
    if not isinstance(layout, RegularLayout) or layout.chosen is not None:
        return None
    names = {slot.number: slot.paths[0].parameter for slot in use.slots}
    if any(len(slot.paths) > 1 for slot in use.slots):
        return None
    if makes and (fused := _fused(mark, use, layout, names)) is not None:
        return fused
    found = _run_of(mark, use, layout, names)
    if found is None:
        return None
    run, wanted = found
    step = partial(_step, mark, use, layout, wanted)
    return Way(LaunchedUse(run, wanted, layout.batch, step=step), wanted)


def _step(
    mark: Mark,
    use: Use,
    layout: RegularLayout,
    wanted: Sequence[str | None],
    dtype: torch.dtype,
) -> Any:
    """A program of one step for such a use on the host; None where there is none."""
    host = learned()
    if host is None or dtype not in NATIVE:
        return None
    steps = host.Program(SUFFIX[dtype], _native.best_isa)
    if use.name == "AddmmBackward0":
        (weight,) = (slot for slot in use.slots if slot.number == 2)
        bias = 1 if len(wanted) > 1 and wanted[1] is not None else -1
        if not add_matrix(steps, weight.shape, (0, bias), layout, dtype):
            return None
    elif use.name == "AddBackward0":
        steps.add_sum(0, 0, _axis(layout))
    elif use.name == "EmbeddingBackward0":
        steps.add_table(0, "", 0, _axis(layout), mark.constants["padding_idx"], {})
    return steps if len(steps) else None


def _run_of(
    mark: Mark, use: Use, layout: RegularLayout, names: Mapping[int, str]
) -> tuple[_Run, tuple[str | None, ...]] | None:
    """What gives the norms, and of which parameters."""
    if use.name == "AddmmBackward0" and 2 in names:
        return products_of(layout, 0 in names), (names[2], names.get(0))
    if use.name == "AddBackward0" and _is_of_last(use, layout, mark):

        def of_sums(g: Tensor) -> list[Tensor]:
            return [sq_norms_of(broadcast.sum_over_time(layout.rows(g, 1)))]

        return of_sums, (names[0],)
    is_table = use.name == "EmbeddingBackward0"
    if is_table and not {"mask", "hidden"} & set(mark.saved):
        padding = mark.constants["padding_idx"]

        def of_rows(g: Tensor, ids: Tensor) -> list[Tensor]:
            rows = layout.rows(ids, 0), layout.rows(g, 1)
            return [embedding.embedding_sq_norms(*rows, padding)]

        return of_rows, (names[0],)
    if use.name == "ConvolutionBackward0" and layout.is_one_row and 1 in names:
        return _convolution(mark, use, 2 in names), (names[1], names.get(2))
    return None


def _fused(
    mark: Mark, use: Use, layout: RegularLayout, names: Mapping[int, str]
) -> Way | None:
    """How a matrix, over several rows a sample, gets its gradient and its norms."""
    if use.name != "AddmmBackward0" or 2 not in names or layout.is_one_row:
        return None
    out_first = mark.constants["is_left"]
    (into,) = (i for i in mark.into if i.number == 2 and i.edge in _edges(use))
    if len(into.moves) != out_first:
        return None
    wanted = names[2], names.get(0)
    has_bias = wanted[1] is not None

    def run(g: Tensor, a: Tensor) -> Sequence[Tensor | None]:
        products = Products(layout.rows(a, 1), layout.rows(g, 1), with_bias=has_bias)
        found = products.fused(out_first=out_first, with_second_moment=False)
        bias = products.bias_norms if has_bias else None
        return found.sq_norms, bias, found.total

    (slot,) = (slot for slot in use.slots if slot.number == 2)
    shape = tuple(slot.shape[::-1] if out_first else slot.shape)
    place = 1 if has_bias else -1

    def step(dtype: torch.dtype) -> Any:
        host, (rows, columns) = learned(), shape
        time = layout.outer * layout.inner
        if host is None or dtype not in NATIVE or layout.dim != 0:
            return None
        if not is_fused_faster(time, columns, rows):
            return None
        part = part_of_rows(rows, columns, dtype.itemsize)
        steps = host.Program(SUFFIX[dtype], _native.best_isa)
        steps.add_fused_sequences(
            *(0, "", (0, place), _axis(layout), out_first, part),
            *([(0, shape, None, None)], {}),
        )
        return steps

    return Way(LaunchedUse(run, wanted, layout.batch, shape, step), wanted)


def _axis(layout: RegularLayout) -> tuple[int, int, int, int]:
    return layout.dim, layout.outer, layout.batch, layout.inner


def _edges(use: Use) -> set[int]:
    return {path.leaf for slot in use.slots for path in slot.paths}


def _is_of_last(use: Use, layout: RegularLayout, mark: Mark) -> bool:
    """Whether a term is summed over all dims but its last, where a parameter is."""
    shape = use.slots[0].shape
    is_last = len(shape) > 1 and all(size == 1 for size in shape[:-1])
    return is_last and layout.dim < len(shape) - 1 and mark.constants["keeps_last"]


def _convolution(mark: Mark, use: Use, has_bias: bool) -> _Run:
    constants = mark.constants
    words = ("stride", "padding", "dilation", "output_padding")
    (weight,) = (slot for slot in use.slots if slot.number == 1)
    geometry = ConvGeometry(
        kernel_size=tuple(weight.shape[2:]),
        groups=constants["groups"],
        transposed=constants["transposed"],
        **{word: tuple(constants[word]) for word in words},
    )

    def norms(g: Tensor, x: Tensor, _: Tensor) -> Sequence[Tensor | None]:
        patches = Patches(x, g, geometry, with_bias=has_bias)
        of_weight = patches.weight_norms  # first: it leaves those of the bias
        return of_weight, patches.bias_norms if has_bias else None

    return norms
