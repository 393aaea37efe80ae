"""Nodes through which the rows of the first dim stay what they are."""

from __future__ import annotations

from collections.abc import Iterable

from ..graph.saved import saved_tensor
from ..graph.tape import Tape, signed

__all__ = ["VIEWS", "keeps_rows", "number_of"]


def _named(*words: str) -> frozenset[str]:
    return frozenset(f"{word}Backward{i}" for word in words for i in (0, 1))


# Element by element: inputs as long as the output have the same rows.
_ELEMENTWISE = _named(
    *("Add", "Sub", "Rsub", "Mul", "Div", "Where", "MaskedFill", "Pow", "Neg", "Abs"),
    *("Exp", "Log", "Sqrt", "Rsqrt", "Reciprocal", "Sin", "Cos", "Square", "Clamp"),
    *("ClampMin", "ClampMax", "Relu", "LeakyRelu", "Elu", "Gelu", "Silu", "Mish"),
    *("Sigmoid", "LogSigmoid", "Tanh", "Softplus", "Hardtanh", "Hardswish"),
    *("Threshold", "NativeDropout", "ToCopy", "Clone", "Alias"),
)
# Row-major: the first dim is what it was if its size is.
VIEWS = _named("View", "UnsafeView", "ReshapeAlias")
# Along one dim or several, `_saved_dim`.
_ALONG = _named(
    *("Split", "SplitWithSizes", "UnsafeSplit", "Slice", "Select", "Unbind", "Cat"),
    *("Stack", "Unsqueeze", "Squeeze", "Sum", "Mean", "Logsumexp", "Amax", "Cumsum"),
    *("Softmax", "LogSoftmax", "Gather", "Topk", "Sort", "IndexSelect", "Scatter"),
    *("ScatterAdd", "IndexAdd"),
) | {"SqueezeBackward2"}
# The inputs whose first dim is that of the output.
_PRODUCTS = {
    "MmBackward0": (0,),
    "AddmmBackward0": (1,),
    "GroupedMmBackward0": (0,),
    "BmmBackward0": (0, 1),
    "BaddbmmBackward0": (0, 1, 2),
    "IndexAddBackward0": (0,),
    "IndexPutBackward0": (0,),
    "IndexPutImplBackward0": (0,),
}


def keeps_rows(tape: Tape, i: int, number: int) -> bool:
    """Whether row r of what enters node `i` by that input only meets row r of it."""
    name, edge = tape.names[i], tape.children[i][number]
    if edge is None:
        return False
    out, entering = tape.shapes(i)[0], tape.shapes(edge[0])[edge[1]]
    if not out or not entering or out[0] != entering[0]:
        return False
    if name in _PRODUCTS and number in _PRODUCTS[name]:
        return len(out) == len(entering)
    if name in _ELEMENTWISE:
        return len(out) == len(entering)
    if name in VIEWS:
        return True
    if name in _ALONG:
        return 0 not in _dims(tape, i, max(len(out), len(entering)))
    if name in ("NativeLayerNormBackward0", "FusedRmsNormBackward0"):
        return len(tape.nodes[i]._saved_normalized_shape) < len(out)
    return name == "IndexBackward0" and _is_within_rows(tape, i)


def number_of(tape: Tape, i: int, dim: int) -> int:
    """A saved dim of node `i` counted from the first."""
    return signed(dim) % max(1, len(tape.shapes(i)[0]))


def _dims(tape: Tape, i: int, rank: int) -> Iterable[int]:
    dims = getattr(tape.nodes[i], "_saved_dim", None)
    if dims is None:
        return range(rank)
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    return [signed(dim) % rank for dim in listed] or range(rank)


def _is_within_rows(tape: Tape, i: int) -> bool:
    """Whether an index leaves the first dim alone, and in its place."""
    indices = list(saved_tensor(tape.nodes[i], "_saved_indices"))
    indexed = [n for n, index in enumerate(indices) if index is not None]
    is_together = indexed[-1] - indexed[0] == len(indexed) - 1
    return indices[0] is None and is_together
