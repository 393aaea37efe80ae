"""Where the batch axis of a scalar loss first appears on the way down."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import CaptureError
from ..graph.nodes import JOINING, REDUCING
from ..graph.tape import Tape, signed
from .samples import Samples

__all__ = ["batch_edges", "nodes_above", "unshown_message", "weigh_edges"]

Edges = dict[int, list[int]]  # node without the axis -> its inputs that have it


def batch_edges(tape: Tape, samples: Samples, rejected: Container[int] = ()) -> Edges:
    """Edges of the graph from tensors without the samples' dims to tensors with them.

    Outputs of `rejected` nodes are passed by: they were shown to have another axis of
    that size, or the samples in another order.

    Raises:
        CaptureError: when a parameter is reached before the axis, or when a tensor has
            the right size there for a reason that cannot be told.
    """
    edges: Edges = {}
    met: list[tuple[int, ...]] = []
    stack, entered = [0], {0}
    while stack:
        i = stack.pop()
        met += [shape for shape in tape.shapes(i) if shape]
        for number, edge in enumerate(tape.children[i]):
            if edge is None:
                continue
            child, _ = edge
            if child not in rejected and _starts(tape, child, samples):
                edges.setdefault(i, []).append(number)
                continue
            if child in tape.parameter_at:
                if rejected:
                    raise CaptureError(unshown_message(samples))
                raise CaptureError(_message(tape.parameter_at[child], samples, met))
            if child not in entered:
                entered.add(child)
                stack.append(child)
    return edges


def nodes_above(tape: Tape, edges: Edges) -> set[int]:
    """Nodes between the loss and those edges: no weight of a sample comes there."""
    stack, entered = [0], {0}
    while stack:
        i = stack.pop()
        for number, edge in enumerate(tape.children[i]):
            if edge is None or number in edges.get(i, ()) or edge[0] in entered:
                continue
            entered.add(edge[0])
            stack.append(edge[0])
    return entered


def _starts(tape: Tape, i: int, samples: Samples) -> bool:
    """Whether the batch axis of the samples is in the output of node i.

    The size alone does not say so: where the tensor, or one of its shape that it was
    made of, came from a reduction of that dim, it is another axis of that size.
    """
    if not any(map(samples.is_in, tape.shapes(i))) or tape.is_surely_parameter[i]:
        return False
    shape = tape.shapes(i)[0]
    below: int | None = i
    while below is not None:
        name = tape.names[below]
        if name in REDUCING:
            return samples.dims.isdisjoint(_reduced(tape, below))
        if name in JOINING:
            _refuse_joined(tape, below, samples)
        edges = (edge for edge in tape.children[below] if edge is not None)
        alike = (j for j, output in edges if tape.shapes(j)[output] == shape)
        below = next((j for j in alike if not tape.is_surely_parameter[j]), None)
    return True


def _refuse_joined(tape: Tape, i: int, samples: Samples) -> None:
    """Raise where the dim was made by joining as many tensors as there are samples."""
    shape = tape.shapes(i)[0]
    dim = signed(tape.nodes[i]._saved_dim) % len(shape)
    if dim not in samples.dims:
        return
    pieces = sum(edge is not None for edge in tape.children[i])
    if tape.names[i] == "StackBackward0" or pieces == shape[dim]:
        raise CaptureError(
            f"Dimension {dim} of a tensor of shape {shape} below the loss was made by "
            f"joining {pieces} tensors: whether these are the {samples.count} samples "
            "(or layers, or heads) cannot be told. Pass the vector of per-sample "
            "losses."
        )


def _reduced(tape: Tape, i: int) -> set[int]:
    """Dims of the input that a reduction takes away or leaves with size one."""
    dims = getattr(tape.nodes[i], "_saved_dim", None)
    edge = tape.children[i][0]
    rank = len(tape.shapes(edge[0])[edge[1]]) if edge else len(tape.shapes(i)[0]) + 1
    if dims is None or dims == ():
        return set(range(rank))
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return {signed(dim) % rank for dim in listed}


def weigh_edges(
    tape: Tape,
    edges: Mapping[int, Sequence[int]],
    weights: Tensor,
    samples: Samples,
) -> list[Any]:
    """Weight the samples in the gradients that pass those edges; returns handles."""
    return [
        tape.nodes[i].register_hook(_weigher(tape, i, numbers, weights, samples))
        for i, numbers in edges.items()
    ]


def _weigher(
    tape: Tape,
    i: int,
    numbers: Sequence[int],
    weights: Tensor,
    samples: Samples,
) -> Callable[[Any, Any], Any]:
    shapes = {}
    for number in numbers:
        edge = tape.children[i][number]
        assert edge is not None
        shapes[number] = tape.shapes(edge[0])[edge[1]]

    def hook(
        grad_inputs: tuple[Tensor | None, ...], grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        weighed = list(grad_inputs)
        for number, shape in shapes.items():
            g = weighed[number]
            if g is None:
                continue
            if tuple(g.shape) != shape:
                g = g.sum_to_size(shape)
            of_g = weights.to(device=g.device, dtype=g.dtype)
            weighed[number] = g * samples.column(of_g, shape)
        return tuple(weighed)

    return hook


def _message(parameter: str, samples: Samples, met: Sequence[tuple[int, ...]]) -> str:
    shapes = ", ".join(str(s) for s in list(dict.fromkeys(met))[:6]) or "scalars only"
    return (
        f"No {samples.described} on the way from the loss to {parameter!r}; tensors "
        f"met: {shapes}. Check batch_size, name the axis with batch_dim, keep "
        "penalties on parameters out of this loss, or pass the vector of per-sample "
        "losses."
    )


def unshown_message(samples: Samples) -> str:
    """Of a scalar loss whose samples cannot be found."""
    return (
        f"A scalar loss of {samples.count} samples, and no tensor below it whose "
        f"{samples.described} follows the samples where data meets the first "
        "parameters: rows were reordered, selected or transposed on the way, or there "
        "is another dimension of that size. Whose loss is whose cannot be told then. "
        "Pass the vector of per-sample losses (reduction='none'), or name the "
        "dimension with batch_dim."
    )
