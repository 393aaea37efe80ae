"""The uses of a compiled region, as its own code shows them in the backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..compiled.marks import WITH_FACTORS, Into, Mark, Move
from ..contributions import Contribution, Dense, Embedding, Placed, Pushed
from ..errors import CaptureError
from ..graph.undisturbed import undisturbed
from ..reading.marked import Marked
from ..reading.plan import Path, Use
from ..rules import contributions_of
from .collector import Collector
from .delivery import Delivery, turned
from .marked_launches import Memory
from .marked_norms import Way, way_of
from .parts import Parts
from .visit import visit

__all__ = ["MarkedUses"]


class MarkedUses:
    """Takes what the operators of one region are given.

    Args:
        region: how to read it.
        parts: joins the contributions of several uses.
        collector: takes whole parameters.
        is_anothers: whether the pass that runs is not the one that is observed.
        on_error: called with an error that must wait; None raises it.
        makes: whether gradients of weights may be made with their statistics.
    """

    def __init__(
        self,
        region: Marked,
        parts: Parts,
        collector: Collector,
        *,
        is_anothers: Callable[[], bool],
        on_error: Callable[[CaptureError], None] | None,
        makes: bool,
    ) -> None:
        self._region, self._parts, self._collector = region, parts, collector
        self._is_anothers, self._on_error, self._makes = is_anothers, on_error, makes
        self._is_plain = collector.wants_norms_only
        self._memory = Memory(sum(len(u.parameters) for u in region.uses.values()))
        self._taken: set[int] = set()
        self._has_run = False

    def note_run(self, *_: Any) -> None:
        """Note that the region's node has run: a hook on it."""
        self._has_run = self._has_run or not self._is_anothers()

    def missing(self) -> str | None:
        """What is wrong where the region ran and did not show all its uses."""
        if not self._has_run or self._taken == self._region.uses.keys():
            return None
        return (
            f"A compiled region ran and showed {len(self._taken)} of its "
            f"{len(self._region.uses)} uses of parameters: its code ran without "
            "calling the operators that were compiled into it, as a CUDA graph does "
            "that was recorded around them. Compile with fastminima.compile(model) "
            "without such a wrapper."
        )

    def take(self, mark: Mark, g: Tensor, saved: Sequence[Tensor]) -> Tensor | None:
        """Take a use; returns its weight's gradient where it is made here."""
        use = self._region.uses.get(mark.place)
        if use is None or self._is_anothers():
            return None
        try:
            with undisturbed():
                return self._take(use, mark, g, saved)
        except CaptureError as error:
            if self._on_error is None:
                raise
            self._on_error(error)
            return None

    def refuse(self, reason: str) -> None:
        """The region was marked when it was measured, unless nothing is read there.

        Raises:
            CaptureError: where something is.
        """
        if not self._region.uses or self._is_anothers():
            return
        raise CaptureError(
            f"A compiled region is not marked now, and was when its rows were "
            f"measured: {reason}. Make a new probe."
        )

    def _take(
        self, use: Use, mark: Mark, g: Tensor, saved: Sequence[Tensor]
    ) -> Tensor | None:
        place = mark.place
        self._taken.add(place)
        way = self._way(mark, use, tuple(g.shape)) if self._is_plain else None
        if way is not None:
            return self._take_by(way, use.name, g, saved)
        known = self._region.at(mark, tuple(g.shape))
        if known is None:
            raise CaptureError(
                f"A gradient of shape {tuple(g.shape)} reached {use.name} in a "
                f"compiled region (parameters {use.parameters}), where it was "
                f"{self._region.shapes[place]} when its rows were measured. Make a new "
                "probe; report it if that does not help."
            )
        use, layouts = known
        if any(map(self._parts.will_wait, use.parameters)):
            # Compiled code writes other things there as soon as the operator is done.
            g, saved = g.clone(), [t.clone() for t in saved]
        node = mark.node(saved)
        found = contributions_of(use.name, node, (g,), layouts, use.slots)
        if len(found) < len(use.slots):
            raise CaptureError(
                f"{use.name} in a compiled region (parameters {use.parameters}, shape "
                f"{tuple(g.shape)}) is not covered by its rule. Report it, with the "
                "layer."
            )
        made = self._made(use, mark, found, g.dtype)
        entered = {slot.number: slot.shape for slot in use.slots}
        deliveries = [
            (into.number, path, _delivery(into, entered[into.number], node))
            for into, path in paths_of(mark, use)
            if into.number in found
        ]
        visit(use, found, deliveries, self._parts, self._collector)
        return made

    def _take_by(
        self, way: Way, name: str, g: Tensor, saved: Sequence[Tensor]
    ) -> Tensor | None:
        outputs = way.take(self._memory, g, *saved)
        into = self._collector.collected.sq_norms
        for parameter, norms in zip(way.names, outputs, strict=False):
            if parameter is not None and norms is not None:
                self._parts.count(parameter, name)
                into[parameter] = norms
        gradient = outputs[-1] if way.take.makes else None
        return None if gradient is None else gradient.to(g.dtype).contiguous()

    def _way(self, mark: Mark, use: Use, shape: tuple[int, ...]) -> Way | None:
        """How the norms are computed; None where the rule is asked."""
        key, ways = (mark.place, shape, self._makes), self._region.ways
        if key not in ways:
            known = self._region.at(mark, shape)
            is_alone = all(map(self._parts.has_one_use, use.parameters))
            ways[key] = None
            if known is not None and is_alone:
                of_shape, (layout, *_) = known
                ways[key] = way_of(mark, of_shape, layout, makes=self._makes)
        return ways[key]

    def _made(
        self,
        use: Use,
        mark: Mark,
        found: dict[int, Contribution],
        dtype: torch.dtype,
    ) -> Tensor | None:
        """The gradient of a weight with its statistics, which is taken out of `found`.

        None where the product is not the whole gradient of one parameter, and where
        samples have one row each, whose norms share nothing with it.
        """
        number = _WEIGHTS.get(use.name)
        ways = [way for way in paths_of(mark, use) if way[0].number == number]
        if not self._makes or number not in found or len(ways) != 1:
            return None
        ((into, path),) = ways
        is_turned = mark.constants["is_left"]
        is_one = self._parts.has_one_use(path.parameter)
        if len(into.moves) != is_turned or not is_one:
            return None
        part = found[number]
        if isinstance(part, Dense) and part.products.has_one_row:
            return None
        del found[number]
        deliver = delivery_by(into.moves, into.shape)
        self._parts.count(path.parameter, use.name)
        whole = part if deliver is None else deliver(part)
        return self._collector.make(path.parameter, whole).to(dtype).contiguous()


def _delivery(into: Into, entered: tuple[int, ...], node: Any) -> Delivery | None:
    """How a contribution to a use becomes one to the parameter."""
    if into.looked_up is None:
        if any(move[0] in WITH_FACTORS for move in into.moves):
            return _multiplied(into.moves, entered, node._saved_factor)
        return delivery_by(into.moves, entered)
    ids, rows = node._saved_lookup.flatten(), into.looked_up
    padding = getattr(node, "_saved_padding_idx", None)
    if padding is None:  # an index may count from the end
        ids, padding = ids.remainder(rows), -1
    factors = getattr(node, "_saved_factor", ())

    def delivered(inner: Contribution) -> Contribution:
        """A table looked up once for all samples: the ids are the same in each."""
        found = _of_each(into.moves, inner.per_sample(0, inner.batch), factors)
        found = found.reshape(inner.batch, len(ids), -1)
        return Embedding(ids.expand(inner.batch, -1), found, padding, rows)

    return delivered


def _multiplied(
    moves: Sequence[Move], entered: tuple[int, ...], factors: Sequence[Tensor]
) -> Delivery:
    """For a gradient that is multiplied or masked by tensors on its way."""
    zeros = torch.zeros(entered, dtype=torch.float32, device=factors[0].device)
    shape = tuple(_by(moves, zeros, factors).shape)
    return lambda inner: Pushed(inner, shape, lambda t: _by(moves, t, factors))


# The input by which the weight of a product enters, as eager nodes count.
_WEIGHTS = {"AddmmBackward0": 2, "BmmBackward0": 1}


def paths_of(mark: Mark, use: Use) -> list[tuple[Into, Path]]:
    """Where the parts of a use go: one for each gradient of a tracked parameter."""
    paths = {p.leaf: p for slot in use.slots for p in slot.paths}
    return [(into, paths[into.edge]) for into in mark.into if into.edge in paths]


@lru_cache(maxsize=4096)
def delivery_by(moves: tuple[Move, ...], entered: tuple[int, ...]) -> Delivery | None:
    """How a contribution to a use becomes one to the parameter, by what only moves it.

    Args:
        moves: from the use's gradient to that of the parameter.
        entered: the shape of the use's gradient.
    """
    moved = torch.empty(entered, dtype=torch.float32, device="meta")
    for move in moves:
        moved = _moved(moved, move)
    shape = tuple(moved.shape)
    factor = math.prod(move[1] for move in moves if move[0] == "scale")
    rest = tuple(move for move in moves if move[0] != "scale")
    if factor != 1 or any(move[0] == "take" for move in rest):
        return lambda inner: Pushed(inner, shape, lambda t: factor * _by(rest, t))
    if not rest or (shape == entered and all(move[0] == "reshape" for move in rest)):
        return None
    if len(entered) == 2 and all(move == ("permute", (1, 0)) for move in rest):
        return turned if len(rest) % 2 else None
    return lambda inner: Placed(inner, shape, lambda t: _by(rest, t), _span(rest))


def _by(moves: Sequence[Move], t: Tensor, factors: Sequence[Tensor] = ()) -> Tensor:
    for kind, *numbers in moves:
        if kind == "times":
            t = t * factors[numbers[0]]
        elif kind == "where":
            t = _kept(t, factors[numbers[0]], is_kept=numbers[1])
        else:
            t = _moved(t, (kind, *numbers))
    return t


def _kept(t: Tensor, mask: Tensor, *, is_kept: bool) -> Tensor:
    """Zero but where a mask is `is_kept`."""
    return t.masked_fill(~mask if is_kept else mask, 0)


def _of_each(
    moves: Sequence[Move], samples: Tensor, factors: Sequence[Tensor]
) -> Tensor:
    """Samples' gradients `[batch, ...]`, each moved as the sum of them would be."""
    for kind, *numbers in moves:
        if kind == "reshape":
            samples = samples.reshape(len(samples), *numbers[0])
        elif kind == "permute":
            samples = samples.permute(0, *(dim + 1 for dim in numbers[0]))
        else:  # of the same shape as before
            samples = _by([(kind, *numbers)], samples, factors)
    return samples


def _moved(t: Tensor, move: Move) -> Tensor:
    kind, *arguments = move
    if kind == "reshape":
        return t.reshape(arguments[0])
    if kind == "permute":
        return t.permute(arguments[0])
    if kind == "scale":
        return t * arguments[0]
    if kind == "take":
        dim, start, end, step = arguments
        return t[(slice(None),) * dim + (slice(start, end, step),)]
    dim, start, end, step, size = arguments
    whole = t.new_zeros(*t.shape[:dim], size, *t.shape[dim + 1 :])
    whole[(slice(None),) * dim + (slice(start, end, step),)] = t
    return whole


def _span(moves: Sequence[Move]) -> tuple[int, int] | None:
    """Which rows of the parameter are taken, where the last move says so."""
    kind, *arguments = moves[-1]
    if kind != "put" or arguments[0] != 0 or arguments[3] != 1:
        return None
    return arguments[1], arguments[2]
