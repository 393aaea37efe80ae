"""Rows of data that all samples share until zeros give each of them to one sample.

    mask[B, N, 1] * nodes[1, N, d] -> [B, N, d]      row (n, m) is sample n's ...
    pick[B, N] @ nodes[N, d]       -> [B, d]         ... where the mask is not zero

The nodes of several graphs in one matrix are such rows. The mask comes from outside the
autograd graph, so the next step's may be another one without a sign of it: nothing that
was measured below such a node is kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..graph.nodes import JOINING, PRODUCTS
from ..graph.tape import Tape, signed
from .evidence import Evidence
from .layout import RegularLayout

__all__ = ["shared_dims", "shares_rows"]


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


def shares_rows(evidence: Evidence, i: int) -> bool:
    """Whether rows of data may be given to samples by something that is not watched."""
    if i in evidence.preparing or evidence.first(i) is None:
        return False
    shared = shared_dims(evidence.tape, i, evidence.samples.count)
    dims = {dim for edge, dim in shared if evidence.is_data(edge)}
    return bool(dims) and any(
        isinstance(layout, RegularLayout) and layout.dim in dims
        for layout in evidence.layouts(i)
    )
