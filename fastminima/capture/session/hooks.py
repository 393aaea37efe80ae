"""One backward pass under observation: hooks in, contributions out, hooks gone."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..compiled.operators import receive
from ..errors import CaptureError
from ..graph.node import current_node
from ..graph.saved import readable
from ..graph.tape import Tape
from ..graph.undisturbed import undisturbed
from ..reading.marked import Marked
from ..reading.plan import Layouts, Plan, Use
from ..reading.reader import Reading
from ..reading.recipe import Region
from ..reading.regions import Watcher, is_reentrant, watch
from ..rows.layout import RowLayout
from .arrival import Arrival, PassFilter
from .collector import Collected, Collector
from .delivery import delivery_of
from .gradients import Gradients
from .marked import MarkedUses
from .parts import Parts
from .program import Program, program_of
from .taking import Taking
from .visit import Announce

__all__ = ["Observer", "Session"]


@runtime_checkable
class Observer(Protocol):
    """What watches one backward pass."""

    @property
    def owner(self) -> object:
        """Whom the passes belong to that are run for it."""
        ...

    def separate(self, tape: Tape, names: Iterable[str]) -> None:
        """Read some parameters' gradients where they leave this graph, from now on."""
        ...

    def take_gradients(self, grads: Mapping[str, Tensor]) -> None:
        """Note the gradients of some parameters in this pass."""
        ...

    def read_gradients(self) -> None:
        """Note the gradients of this pass, all there is in `.grad` now."""
        ...

    def finish(self) -> Collected:
        """What was gathered; removes every hook."""
        ...

    def close(self) -> None:
        """Remove every hook and let go of what waits."""
        ...


class Session(Taking):
    """Hooks on the uses of one graph; what they see goes to a collector.

    Args:
        parameters: the tracked parameters by name.
        batch: number of samples that are looked at.
        collector: takes the sample gradients of whole parameters.
        hook_gradients: read the gradient when it is about to be accumulated, for
            passes after which nobody calls `take_gradients`.
        defer_errors: let the pass go on after a CaptureError and raise it in `finish`:
            other ranks wait for this one's gradients.
        makes: whether compiled regions may make gradients with their statistics.
        arrival: of the loss, where the pass is not run by the probe itself: only what
            comes by it counts.
        owner: of the passes that are run for it, where several sessions share them.
        announce: called with a message the first time a node has no rule.
    """

    def __init__(
        self,
        reading: Reading,
        parameters: Mapping[str, Tensor],
        batch: int,
        collector: Collector,
        *,
        hook_gradients: bool,
        announce: Announce,
        defer_errors: bool = False,
        makes: bool = False,
        arrival: Arrival | None = None,
        owner: object = None,
    ) -> None:
        recipe = reading.recipe
        missing, split = recipe.plan.sources, frozenset[str]()
        if recipe.regions:
            missing, split = _of_several_graphs(reading)
        parts = Parts(missing, is_own_pass=arrival is None)
        super().__init__(parameters, recipe.layouts, batch, collector, parts, announce)
        self._names = {id(p): name for name, p in parameters.items()}
        self._filter = PassFilter(owner, arrival, has_inner_passes=recipe.runs_again)
        self._defer_errors = defer_errors
        self._error: CaptureError | None = None
        self._reads_gradients = hook_gradients
        self._gradients = Gradients(collector, parameters, split, self._filter)
        self._handles: list[Any] = []
        self._marked: list[MarkedUses] = []
        try:
            taken: frozenset[int] = frozenset()
            may_run = collector.wants_norms_only and not defer_errors
            if collector.makes and torch.is_inference_mode_enabled():
                may_run = False  # gradients would be inference tensors
            if may_run:
                program = program_of(reading, parameters, collector.makes)
                if program is not None:
                    taken = self._hook_program(program, reading.tape)
            self._hook_graph(reading.tape, recipe.plan, recipe.layouts, but=taken)
            for i, region in recipe.regions.items():
                node = reading.tape.nodes[i]
                if isinstance(region, Marked):
                    uses = self._marked_uses(region, makes=makes)
                    self._handles.append(node.register_hook(uses.note_run))
                    self._marked.append(uses)
                    handle = receive(node, uses)
                else:
                    handle = watch(node, self._region_watcher(region), self.owner)
                self._handles.append(handle)
            if hook_gradients:
                is_known = not recipe.runs_again and self._gradients.hook_known(
                    reading.tape, self._parts
                )
                if not is_known:
                    self._handles += self._gradients.hook(reading.tape, self._parts)
        except BaseException:
            self.close()
            raise

    @property
    def owner(self) -> object:
        """Whom the passes belong to that are run for this session."""
        return self._filter.owner

    def close(self) -> None:
        """Remove every hook and let go of what waits."""
        self._filter.close()
        if self._pass is not None:
            self._pass.close()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._marked.clear()
        self._parts.clear()
        self._gradients.clear()

    def finish(self) -> Collected:
        """Complete the parameters some of whose uses got no gradient; remove hooks."""
        for message in filter(None, (uses.missing() for uses in self._marked)):
            self._keep_error(CaptureError(message))
        if self._error is not None:
            self.close()
            raise self._error
        self.complete()
        self._gradients.finish()
        self._note_filled()
        self.close()
        return self._collector.collected

    def separate(self, tape: Tape, names: Iterable[str]) -> None:
        """Read some parameters' gradients where they leave this graph, from now on."""
        self._handles += self._gradients.separate(tape, names)

    def take_gradients(self, grads: Mapping[str, Tensor]) -> None:
        """Note the gradients of some parameters in this pass."""
        self._collector.take_gradients(grads)

    def read_gradients(self) -> None:
        """Note the gradients of this pass, all there is in `.grad` now."""
        self._collector.read_gradients(self._parameters)

    def _hook_program(self, program: Program, tape: Tape) -> frozenset[int]:
        """Let the extension hook the uses that have a step; returns their nodes."""
        self._start(program, self._filter)
        return program.nodes(self._pass.hook(tape.nodes, program.all))

    def is_anothers(self) -> bool:
        """Whether a pass that comes by a step is not the one that is observed."""
        return self._filter.is_anothers()

    def _hook_graph(
        self,
        tape: Tape,
        plan: Plan,
        layouts: Layouts,
        but: Container[int] = frozenset(),
    ) -> None:
        for use in plan.uses:
            if use.node not in but:
                hook = self._use_hook(tape, use, layouts[use.node])
                self._handles.append(tape.nodes[use.node].register_prehook(hook))

    def _use_hook(
        self, tape: Tape, use: Use, layouts: Sequence[RowLayout | None]
    ) -> Callable[[tuple[Tensor | None, ...]], None]:
        # The closure holds the nodes between use and leaf, never the use itself: a
        # cycle through the graph would keep it alive until the garbage collector runs.
        deliveries = [
            (slot.number, path, delivery_of(tape, slot, path))
            for slot in use.slots
            for path in slot.paths
        ]

        def hook(grads: tuple[Tensor | None, ...]) -> None:
            if all(g is None for g in grads) or self._filter.is_anothers():
                return
            node = readable(current_node())
            try:
                with undisturbed():
                    self._visit(use, node, grads, layouts, deliveries)
            except CaptureError as error:
                if not self._defer_errors:
                    raise
                self._keep_error(error)

        return hook

    def _marked_uses(self, region: Marked, *, makes: bool) -> MarkedUses:
        return MarkedUses(
            *(region, self._parts, self._collector),
            is_anothers=self._filter.is_anothers,
            on_error=self._keep_error if self._defer_errors else None,
            makes=makes,
        )

    def _keep_error(self, error: CaptureError) -> None:
        self._error = self._error or error

    def _region_watcher(self, region: Region | None) -> Watcher:
        def watcher(
            inputs: Sequence[Tensor], outputs: Sequence[Tensor]
        ) -> list[Tensor]:
            if region is None:
                raise CaptureError(
                    "A gradient reached a region that runs again in the backward pass "
                    "where none came when its rows were measured. Make a new probe."
                )
            tape = region.read(inputs, outputs, self._names)
            plan = region.plan.sized(tape)
            self._hook_graph(tape, plan, region.layouts)
            if self._reads_gradients:
                self._handles += self._gradients.hook(tape, self._parts)
            # All of them: a node that rules call gives nothing that nobody asked for.
            paths = (path for u in plan.uses for s in u.slots for path in s.paths)
            leaves = dict.fromkeys(path.leaf for path in paths)
            return [tape.nodes[leaf].variable for leaf in leaves]

        return watcher


def _of_several_graphs(reading: Reading) -> tuple[dict[str, int], frozenset[str]]:
    """How many uses a graph and those of its regions have of each parameter.

    And the parameters whose gradient comes from several of them, in parts.
    """
    recipe, tape = reading.recipe, reading.tape
    regions = {i: r for i, r in recipe.regions.items() if r is not None}
    missing: dict[str, int] = {}
    for part in (recipe.plan, *regions.values()):
        for name, count in part.sources.items():
            missing[name] = missing.get(name, 0) + count
    reentrant = (
        r.plan.own
        for i, r in regions.items()
        if isinstance(r, Region) and is_reentrant(tape.nodes[i])
    )
    arrivals = [set(tape.leaves), *reentrant]
    return missing, frozenset(n for n in missing if sum(n in a for a in arrivals) > 1)
