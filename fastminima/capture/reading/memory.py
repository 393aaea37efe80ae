"""What a graph structure taught, for the steps that repeat it in any sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..graph.extension import learned
from ..graph.nodes import SHOWN_SHAPE
from ..graph.tape import Tape
from ..graph.tracking import untracked_nodes
from ..rows.batch_axis import batch_edges
from ..rows.guards import Guard, placing_numbers, read_numbers, reordering_nodes
from ..rows.layout import IrregularLayout, RegularLayout
from ..rows.own_functions import OwnGuard
from ..rows.samples import Batch, Samples
from . import mixing as batchnorm
from .marked import Marked
from .plan import Layouts
from .recipe import Recipe
from .regions import region_shapes

__all__ = ["Structure"]

# Sizes of a graph are measured this often before a layout is carried over to new ones.
_MEASURED_SIZES = 3
_MOST_SIZES = 256
# A known structure is measured anew after so many steps, whatever the cadence is.
_EARLY = 10


class _Last(NamedTuple):
    """The sizes of the last graph, as conditions that the extension can check."""

    sizes: Any
    conditions: Any
    recipe: Recipe


class Structure:
    """One graph structure in all the sizes it was met in."""

    def __init__(
        self,
        tape: Tape,
        recipe: Recipe,
        guards: Sequence[Guard | OwnGuard],
        *,
        moves_rows: bool = True,
        is_open: bool = False,
        rejected: frozenset[int] = frozenset(),
    ) -> None:
        self.norms = batchnorm.norm_nodes(tape)
        self._is_open = is_open  # a scalar loss: its samples are found on the way
        self._rejected = rejected  # what only looks like their axis
        self._uses = recipe.plan.uses
        self._guards = tuple(guards)
        self._plan = recipe.plan
        self._regions = tuple(recipe.regions)
        self._routed = _routed(recipe)
        preparing = recipe.plan.preparing
        self._placing = placing_numbers(tape, preparing) if moves_rows else []
        self._reordering = reordering_nodes(tape, preparing) if moves_rows else []
        self._recipes: dict[tuple, Recipe] = {}
        self._measured: list[tuple] = []
        self._last: _Last | None = None
        self._met: tuple | None = None  # the signature of the last graph
        self.is_settled = False  # the graph recalled last is as the one before it
        self.recalls = 0  # steps since it was measured
        self._follows = True  # measured layouts were those carried over from the first

    def is_due(self, every: int) -> bool:
        """Whether this structure is to be measured anew; counts the step.

        Every so many steps, and once early on.
        """
        is_due = self.will_be_due(every)
        self.recalls += 1
        return is_due

    def will_be_due(self, every: int) -> bool:
        """Whether it is to be measured anew in the next step."""
        steps = self.recalls + 1
        return steps % every == 0 or steps == min(_EARLY, every)

    @property
    def conditions(self) -> Any:
        """Of a graph like the last one, where nothing else tells its rows; else None.

        None too where it has been met once in its sizes, and where batch normalisation
        may change its mode.
        """
        if not self.is_settled or self._last is None or self._guards or self.norms:
            return None
        return self._last.conditions

    def fits(self, recipe: Recipe, guards: Sequence[Guard | OwnGuard]) -> bool:
        """Whether a new measurement speaks of the same uses under the same guards."""
        return (
            self._uses == recipe.plan.uses
            and self._guards == tuple(guards)
            and self._routed == _routed(recipe)
        )

    def recall(self, tape: Tape, samples: Samples) -> Recipe | None:
        """What holds for this graph, or None when it has to be measured.

        Raises:
            CaptureError: for a batch size that the graph does not have.
        """
        if not all(guard.holds(tape) for guard in self._guards):
            return None
        last, sizes = self._last, _sizes(samples)
        self.is_settled = (
            last is not None
            and last.sizes == sizes
            and last.conditions.hold(tape.nodes)
        )
        if self.is_settled:
            assert last is not None
            return last.recipe.followed(tape, samples)
        signature = self._signature(tape, samples)
        recipe = self._recipes.get(signature)
        if recipe is not None:
            self._expect(signature, tape, sizes, recipe)
            return recipe.followed(tape, samples)
        if len(self._measured) < _MEASURED_SIZES or not self._follows:
            return None
        layouts = self._carried_over(signature)
        if layouts is None:
            return None
        if self._is_open:
            batch_edges(tape, samples, self._rejected)  # raises where there is none
        routes = self._recipes[self._measured[0]].routes
        if routes is not None:
            routes = routes.resized(tape, samples.count)
            if routes is None:
                return None
        regions = self._carried_regions(samples)
        if regions is None:
            return None
        recipe = Recipe(self._plan.sized(tape), layouts, regions, routes)
        self._keep(signature, recipe)
        return recipe.followed(tape, samples)

    def _expect(self, signature: tuple, tape: Tape, sizes: Any, recipe: Recipe) -> None:
        """Let the extension look for sizes that were met twice in a row."""
        met, self._met = self._met, signature
        host = learned()
        deciding = batchnorm.deciding_numbers(tape, self._uses)
        if host is None or met != signature or self._regions or deciding is None:
            return
        conditions = host.Conditions()
        shown = {use.node for use in self._uses if use.node not in self._routed}
        shown |= {i for i, _ in self._plan.entering} | set(self._reordering)
        for i in sorted(shown):
            parent = tape.shown_above(i)
            if tape.is_leaf(i):
                conditions.add_leaf(i, *tape.shapes(i), tape.nodes[i].variable)
            elif parent is not None:
                conditions.add_value(parent, SHOWN_SHAPE, *tape.shapes(i))
            else:
                conditions.add_shapes(i, tape.shapes(i))
        for i in untracked_nodes(tape):  # one may become a parameter to be tracked
            conditions.add_type(i, type(tape.nodes[i].variable))
        numbers = [(i, name) for i, names in self._placing for name in names]
        for i, name in (*numbers, *deciding):
            conditions.add_value(i, name, getattr(tape.nodes[i], name))
        self._last = _Last(sizes, conditions, recipe)

    def unsettle(self) -> None:
        """Expect nothing of the next graph: the last one was refused."""
        self._last = self._met = None

    def remember(self, tape: Tape, samples: Samples, recipe: Recipe) -> None:
        """Keep what was measured on a graph."""
        self._last = None
        signature = self._signature(tape, samples)
        if self._measured:
            self._follows &= self._carried_over(signature) == recipe.layouts
            self._follows &= self._regions_agree(recipe)
        # What runs again may compute anything in other sizes.
        self._follows &= not recipe.runs_again
        if signature not in self._recipes:
            self._measured.append(signature)
        self._keep(signature, recipe)

    def _carried_regions(self, samples: Samples) -> dict[int, Any] | None:
        """The regions of the first measurement, for samples of another number."""
        first = self._recipes[self._measured[0]].regions
        if first and not isinstance(samples, Batch):
            return None
        carried = {
            i: region.carried_to(samples.count) if isinstance(region, Marked) else None
            for i, region in first.items()
        }
        is_lost = any(carried[i] is None and first[i] is not None for i in first)
        return None if is_lost else carried

    def _regions_agree(self, recipe: Recipe) -> bool:
        """Whether a measurement shows regions as those of the first one, carried over.

        Of one sample all rows are its own.
        """
        first = self._recipes[self._measured[0]].regions
        return all(
            isinstance(region, Marked) and region.agrees(now)
            for i, region in first.items()
            if isinstance(now := recipe.regions[i], Marked)
        )

    def _keep(self, signature: tuple, recipe: Recipe) -> None:
        if len(self._recipes) >= _MOST_SIZES:
            self._recipes = {s: self._recipes[s] for s in self._measured}
        self._recipes[signature] = recipe

    def _signature(self, tape: Tape, samples: Samples) -> tuple:
        """All by which two graphs of one structure can differ in their layouts."""
        shapes = zip(self._plan.uses, self._plan.signature(tape), strict=True)
        return (
            _sizes(samples),
            tuple(() if use.node in self._routed else s for use, s in shapes),
            self._plan.entrances(tape),
            read_numbers(tape, self._placing),
            tuple(tape.shapes(i)[0] for i in self._reordering),
            tuple(region_shapes(tape, i) for i in self._regions),
        )

    def _carried_over(self, signature: tuple) -> Layouts | None:
        """The layouts of the first measurement in the sizes of another graph."""
        old_sizes, old_shapes, old_entrances, old_numbers, before, _ = self._measured[0]
        sizes, new_shapes, entrances, numbers, reordered, _ = signature
        if numbers != old_numbers or _ones(entrances) != _ones(old_entrances):
            return None
        first = self._recipes[self._measured[0]]
        if _is_between(first) and not _scales(before, reordered, old_sizes, sizes):
            return None
        layouts: Layouts = {}
        shapes = zip(first.layouts.items(), old_shapes, new_shapes, strict=True)
        for (node, of_use), old, new in shapes:
            moved: list[Any] = []
            for layout, was, now in zip(of_use, old, new, strict=True):
                if layout is None:
                    moved.append(None)
                    continue
                assert not isinstance(layout, IrregularLayout)
                carried = layout.transfer(was, now, sizes)
                if carried is None:
                    return None
                moved.append(carried)
            layouts[node] = tuple(moved)
        return layouts


def _sizes(samples: Samples) -> Any:
    """By which the layouts of one graph are told apart."""
    return samples.sizes if samples.count > 1 else 1  # else all rows are the one's


def _is_between(recipe: Recipe) -> bool:
    """Whether the batch is somewhere in the middle of a dim.

    Then the dim's size does not say what is on either side of it.
    """
    regular = recipe.routes.regular.values() if recipe.routes is not None else ()
    layouts = [x for of_use in recipe.layouts.values() for x in of_use]
    layouts += [stretch.layout for stretch in regular]
    return any(
        isinstance(x, RegularLayout) and x.outer > 1 and x.inner > 1 for x in layouts
    )


def _scales(
    old: Sequence[Sequence[int]],
    new: Sequence[Sequence[int]],
    old_batch: int,
    batch: int,
) -> bool:
    """Whether shapes differ by the batch size alone."""
    return all(
        len(a) == len(b)
        and all(x == y or x * batch == y * old_batch for x, y in zip(a, b, strict=True))
        for a, b in zip(old, new, strict=True)
    )


def _routed(recipe: Recipe) -> frozenset[int]:
    """Nodes whose layouts the routes give."""
    return frozenset(recipe.routes.nodes if recipe.routes is not None else ())


def _ones(shapes: Sequence[Sequence[int]]) -> list[list[bool]]:
    return [[size == 1 for size in shape] for shape in shapes]
