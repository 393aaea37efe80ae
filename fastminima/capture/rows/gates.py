"""Closed gates, and what is behind them.

A term that is multiplied by zero (ReZero, a contrastive loss before its warm-up, a
layer whose weights start at zero) gets no gradient, so nothing shows whose its rows
are, or that they mix samples; once the gate opens they do. The measuring passes train
nothing: in them a gate is opened, by a gradient put where none came through.

Nothing is known of the node but that a gradient reached it and (next to) none left by
one of its inputs. What is put there instead comes, row by row, from the gradient that
reached it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..graph.tape import Tape

__all__ = ["Gates"]

# No power of two: two ways through a gate must not cancel.
_OPENED = 0.75
# What leaves a node by an input is this much smaller than what came: all but closed.
# (LayerScale starts at 1e-6, and mixing behind it would drown in rounding.)
_AJAR = 1e-3
# Nodes that multiply by a number, a parameter or a mask. Elsewhere a gradient may well
# be that much smaller, as behind a softmax over thousands.
_SCALING = frozenset(
    [
        *("MulBackward0", "DivBackward0", "AddBackward0", "SubBackward0"),
        *("LerpBackward0", "LerpBackward1", "AddcmulBackward0", "AddcdivBackward0"),
    ]
)
_MOST = 16  # gates behind gates
_GLANCE = 4096  # elements looked at first, on a CPU


class Gates:
    """The closed gates of one graph, or of graphs that are the same in each pass.

    Attributes:
        opened: (node, input number) of those that are opened.
        names: of their nodes, for messages.
        sealed: nodes behind which one cannot look.
        is_looking: whether this pass notes what is closed, for `settle`.
    """

    def __init__(self, *, may_open: bool = True) -> None:
        self._may_open = may_open
        self.opened: set[tuple[int, int]] = set()
        self.names: set[str] = set()
        self.sealed: set[int] = set()
        self.is_looking = False
        self._met: dict[tuple[int, int], tuple[Tensor | bool, str]] = {}
        self._rounds = 0

    def hooks(self, tape: Tape) -> list[Any]:
        """Hooks for one pass over the graph; returns their handles."""
        nodes: dict[int, set[int]] = {}
        for i, number in sorted(self.opened):
            nodes.setdefault(i, set()).add(number)
        if self.is_looking and self._may_open:
            for i in range(len(tape.nodes)):
                if _data_inputs(tape, i):
                    nodes.setdefault(i, set())
        return [
            tape.nodes[i].register_hook(self._hook(tape, i, opened))
            for i, opened in nodes.items()
        ]

    def settle(self) -> bool:
        """Whether the pass that looked found gates that were not known to be closed."""
        met, self._met = self._met, {}
        closed = {edge: name for edge, (is_closed, name) in met.items() if is_closed}
        self.opened.update(closed)
        self.names.update(closed.values())
        self._rounds += 1
        return bool(closed) and self._rounds < _MOST

    def _hook(self, tape: Tape, i: int, opened: set[int]) -> Callable[[Any, Any], Any]:
        # Numbers and a name: a hook that holds its own node would keep it alive.
        numbers, name, looks = _data_inputs(tape, i), tape.names[i], self.is_looking

        def hook(
            grad_inputs: tuple[Tensor | None, ...],
            grad_outputs: tuple[Tensor | None, ...],
        ) -> tuple[Tensor | None, ...] | None:
            came = next((g for g in grad_outputs if g is not None), None)
            if came is None or not came.is_floating_point():
                return None
            with torch.no_grad():
                if looks:
                    self._look((i, name), numbers, opened, came, grad_inputs)
                if not opened:
                    return None
                left = list(grad_inputs)
                for number in opened:
                    left[number] = self._open(i, number, came, left[number])
                return tuple(left)

        return hook

    def _look(
        self,
        node: tuple[int, str],
        numbers: list[int],
        opened: set[int],
        came: Tensor,
        left: tuple[Tensor | None, ...],
    ) -> None:
        i, name = node
        for number in numbers:
            g = left[number]
            if g is None or number in opened or g.layout != torch.strided:
                continue
            is_factor = name in _SCALING and g.shape == came.shape
            is_closed = _is_closed(came, g, _AJAR if is_factor else 0.0)
            if is_closed is not False:
                self._met[i, number] = is_closed, name

    def _open(
        self, i: int, number: int, came: Tensor, left: Tensor | None
    ) -> Tensor | None:
        """What leaves by an opened gate."""
        if left is None:
            return None
        put = _in_place_of(came, left.shape)
        if put is None:
            self.sealed.add(i)
            return left
        return put.to(left.dtype)


def _is_closed(came: Tensor, left: Tensor, ratio: float) -> Tensor | bool:
    """Whether at most `ratio` of what came is left; on a GPU not known yet."""
    if came.device.type == "cpu":
        of_came, of_left = _glance(came), _glance(left)
        if of_left > 10 * ratio * of_came and of_left > 0:
            return False
    if not (came.numel() and left.numel()):
        return False
    most_came, most_left = (torch.linalg.vector_norm(t, math.inf) for t in (came, left))
    return (most_came > 0) & (most_left <= ratio * most_came)


def _data_inputs(tape: Tape, i: int) -> list[int]:
    """Inputs of a node by which data may come."""
    return [
        number
        for number, edge in enumerate(tape.children[i])
        if edge is not None
        and not tape.is_surely_parameter[edge[0]]
        and not tape.is_leaf(edge[0])
    ]


def _glance(t: Tensor) -> float:
    """The largest of some elements, all over a tensor."""
    for dim, size in enumerate(t.shape):
        if t.numel() > _GLANCE:
            step = min(size, -(-t.numel() // _GLANCE))
            t = t[(slice(None),) * dim + (slice(None, None, step),)]
    return float(t.abs().max()) if t.numel() else 0.0


def _in_place_of(came: Tensor, shape: torch.Size) -> Tensor | None:
    """Rows of what came in the shape of what is left; None where rows do not fit."""
    if came.shape == shape:
        return came * _OPENED
    try:
        is_spread = torch.broadcast_shapes(came.shape, shape) == came.shape
    except RuntimeError:
        is_spread = False
    if is_spread:  # an operand that was broadcast
        return came.sum_to_size(shape) * _OPENED
    if came.dim() != len(shape) or came.dim() < 2 or came.shape[0] != shape[0]:
        return None
    kept = came.shape[:-1] == shape[:-1]
    dims = (-1,) if kept else tuple(range(1, came.dim()))
    # No plain sum: behind a normalisation that is zero.
    along = torch.arange(came.shape[-1], dtype=came.dtype, device=came.device)
    total = (came * (along % 7 + 1)).sum(dims, keepdim=True)
    return total.expand(shape)
