"""Rows of data that all samples share, until zeros give each of them to one.

So does a mask that picks the nodes of each graph, or a matrix that adds them up. Where
the zeros come from outside the graph, the next step's may be others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence

from ..graph.nodes import JOINING, PRODUCTS
from ..graph.tape import Tape, signed
from .decode import Measurement
from .layout import RegularLayout

__all__ = ["is_data", "shared_dims", "shares_rows"]


def is_data(
    tape: Tape, edge: tuple[int, int] | None, preparing: Container[int]
) -> bool:
    """Whether rows of samples come along an edge, and not a parameter."""
    return edge is not None and edge[0] not in preparing and not tape.is_leaf(edge[0])


def shared_dims(tape: Tape, i: int, batch: int) -> list[tuple[tuple[int, int], int]]:
    """Dims of a node's output along which it has the same rows of an input, with it.

    Rows of data that all samples share there are given to one of them by zeros, of a
    mask or a matrix from outside the graph.
    """
    name, edges = tape.names[i], tape.children[i]
    shape = tape.shapes(i)[0]
    product = PRODUCTS.get(name)
    if product is not None and product.factors and not product.is_of_vectors:
        left, right = (edges[number] for number in product.factors)
        if left is None or right is not None or shape[-1] % batch:
            return []
        return [(left, len(shape) - 1)]
    inputs = [edge for edge in edges if edge is not None and not tape.is_leaf(edge[0])]
    if name in JOINING:
        dim = signed(tape.nodes[i]._saved_dim) % len(shape)
        return [(edge, dim) for edge, uses in Counter(inputs).items() if uses > 1]
    return [
        (edge, dim)
        for edge in inputs
        if not tape.is_surely_parameter[edge[0]]
        for dim in _spread_dims(tape.shapes(edge[0])[edge[1]], shape, name)
        if shape[dim] % batch == 0
    ]


def _spread_dims(
    own: tuple[int, ...], shape: tuple[int, ...], name: str
) -> Sequence[int]:
    """Dims along which an input is the same all over an output, by its sizes."""
    if len(own) > len(shape):
        return ()
    own = (1,) * (len(shape) - len(own)) + own
    dims = [dim for dim, size in enumerate(own) if size < shape[dim]]
    repeats = name == "RepeatBackward0"
    fits = all(
        size == full or size == 1 or (repeats and size and full % size == 0)
        for size, full in zip(own, shape, strict=True)
    )
    return dims if fits else ()


def shares_rows(
    tape: Tape,
    measured: Mapping[int, list[Measurement | None]],
    batch: int,
    preparing: Container[int],
    i: int,
) -> bool:
    """Whether rows of data may be given to samples by something that is not watched."""
    found = None if i in preparing else measured.get(i, [None])[0]
    if found is None:
        return False
    dims = {
        dim
        for edge, dim in shared_dims(tape, i, batch)
        if is_data(tape, edge, preparing)
    }
    return bool(dims) and any(
        isinstance(layout, RegularLayout) and layout.dim in dims
        for layout in found.layouts(batch)
    )
