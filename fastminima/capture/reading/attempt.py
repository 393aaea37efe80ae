"""One measurement of a graph, from the passes to how it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError
from ..graph.passes import is_distributed, run_pass, run_whole_pass
from ..graph.replay import replay_of
from ..graph.saved import frames_of
from ..graph.tape import Tape
from ..rows.batch_axis import batch_edges, nodes_above, unshown_message, weigh_edges
from ..rows.decode import Scheme
from ..rows.evidence import Evidence, Measurements
from ..rows.fingerprints import measurements_of
from ..rows.gates import Gates
from ..rows.guards import Guard, find_guards, gather_nodes, places
from ..rows.measure import measure_samples
from ..rows.own_functions import OwnGuard
from ..rows.samples import Batch, Samples
from ..rows.unseen import may_move
from . import mixing
from .axis_shown import Shown, said_together, what_uses_say
from .fit import Fit, fit, fit_one, guards_of, nodes_to_watch
from .marked import Marked, Unmarked, marked_region
from .plan import is_spread, reads_data
from .recipe import Recipe, Region
from .refusals import refuse_compiled, refuse_complex
from .regions import Survey, block_leaves, is_reentrant, named_inputs, watch
from .tracked import TrackedModel

__all__ = ["Attempt", "Graph", "OtherAxis", "Understood"]


@dataclass(frozen=True)
class Graph:
    """The graph of one loss, to be read.

    Attributes:
        key: equal for graphs that may be read alike.
        mixing: batch normalisations that mix samples.
        regions: nodes that have graphs of their own.
    """

    key: tuple
    tape: Tape
    loss: Tensor
    samples: Samples
    mixing: list[int]
    regions: list[int]

    @property
    def is_open(self) -> bool:
        """Whether the samples have to be found below a scalar loss."""
        return self.samples.count > 1 and self.loss.dim() == 0


@dataclass(frozen=True)
class Understood:
    """What a measurement showed.

    Attributes:
        recipe: how to read the graph, with what is found in each step anew.
        complete: the same for this very graph.
        guards: what must stay the same for the recipe to hold; None where it holds in
            this step only.
        seen: at the watched nodes; empty for one sample, to whom all rows belong.
        rejected: nodes that only look as if they had the samples' axis.
    """

    recipe: Recipe
    complete: Recipe
    guards: Sequence[Guard | OwnGuard] | None
    seen: Measurements
    rejected: frozenset[int] = frozenset()


class OtherAxis(Exception):
    """The axis of a scalar loss is not that of the samples."""

    def __init__(self, nodes: set[int]) -> None:
        super().__init__()
        self.nodes = nodes


@dataclass
class Attempt:
    """Measures a graph with its closed gates opened, or as it is.

    Attributes:
        rejected: nodes that only look as if they had the samples' axis.
        may_open: whether closed gates are opened.
        opened: names of those that were.
        is_sealed: whether something was closed that cannot be opened.
        words: what regions say of the axis of a scalar loss.
        run_again: why compiled regions are run again on probed steps.
    """

    graph: Graph
    model: TrackedModel
    batchnorm: str
    rejected: set[int]
    may_open: bool
    opened: set[str] = field(default_factory=set)
    is_sealed: bool = False
    words: list[Shown] = field(default_factory=list)
    run_again: list[str] = field(default_factory=list)

    def run(self) -> Understood:
        """Run the measuring passes, and understand what they show.

        Raises:
            CaptureError: for a graph that cannot be read exactly.
            OtherAxis: where a scalar loss' axis was looked for in the wrong place.
        """
        graph = self.graph
        tape, samples, regions = graph.tape, graph.samples, graph.regions
        surveys = self._surveys()
        watched = nodes_to_watch(tape, samples.count, regions)
        scheme = Scheme.of(samples.count, _has_half(tape, watched + list(surveys)))
        roots = batch_edges(tape, samples, self.rejected) if graph.is_open else {}
        seen: Measurements = {}
        if samples.count > 1 or surveys:
            seen = self._measured(watched, scheme, surveys, roots)
        evidence = Evidence(tape, samples, seen)
        if graph.is_open:
            evidence.hide(nodes_above(tape, roots))
        inner: dict[int, Region | Marked | None] = {}
        is_settled = self.may_open and not self.is_sealed
        for i, survey in surveys.items():
            inner[i], holds = self._read_region(i, survey, scheme)
            is_settled &= holds
        if samples.count == 1:
            one = fit_one(tape, regions)
            recipe = Recipe(one.plan, one.layouts, inner)
            return Understood(recipe, recipe, [] if is_settled else None, {})
        found, evidence = fit(evidence, self.model.where, regions)
        if graph.is_open:
            self._check_axis(found, roots)
        own = self.model.storages()
        reads = (i for i in found.plan.preparing if reads_data(tape, i, own))
        self._refuse_met(evidence, found, reads)
        recipe = Recipe(found.plan, found.layouts, inner, found.routes)
        complete = recipe.followed(tape, samples)
        assert complete is not None  # the routes agree with this very graph
        self._refuse_mixing(evidence, complete)
        routes = found.routes
        if routes is not None and not routes.nodes.keys().isdisjoint(regions):
            routes = None  # the rows inside such a region are not followed
        guards = guards_of(evidence, routes)
        if not (is_settled and found.is_settled):
            guards = None
        return Understood(recipe, complete, guards, seen, frozenset(self.rejected))

    def _check_axis(self, found: Fit, roots: Mapping[int, list[int]]) -> None:
        tape, samples = self.graph.tape, self.graph.samples
        words = what_uses_say(tape, found.plan, found.layouts, samples)
        shown = said_together([*words, *self.words])
        if shown is Shown.EITHER:
            raise CaptureError(unshown_message(samples))
        if shown is not Shown.SAMPLES:
            raise OtherAxis(_children(tape, roots))

    def _refuse_met(self, evidence: Evidence, found: Fit, reads: Iterable[int]) -> None:
        """Raise for preparations that met data, and then a layer that mixes samples."""
        tape = evidence.tape
        for i in reads:
            if not is_spread(tape, found.plan, found.layouts, i):
                where = self.model.where
                raise CaptureError(where.mixed_message(tape, i, evidence.samples))

    def _refuse_mixing(self, evidence: Evidence, recipe: Recipe | Fit) -> None:
        mixing.refuse_mixing_uses(
            evidence.tape,
            recipe.plan,
            recipe.layouts,
            batchnorm=self.batchnorm,
            where=self.model.where,
            is_sure=evidence.is_sure,
        )

    def _read_region(
        self, i: int, survey: Survey, scheme: Scheme
    ) -> tuple[Region | Marked | None, bool]:
        """How to read a region's graph, and whether that holds for the next steps."""
        tape, samples = survey.tape, self.graph.samples
        if tape is None:  # no gradient came there
            return None, True
        refuse_compiled(tape, [])
        refuse_complex(tape)
        where = self.model.where
        mixes = mixing.mixing_nodes(tape, samples.count)
        sight = survey.sight
        if mixes and (self.batchnorm != "rows" or sight is None or not sight.marks):
            raise self._mixing_error(tape, mixes)
        holds = not gather_nodes(tape)  # they may pick other rows in the next step
        placed = None
        measured: Measurements = {}
        if samples.count == 1:
            found = fit_one(tape)
        else:
            measured = measurements_of(survey.seen, scheme)
            seen = Evidence(tape, samples, measured)
            found, evidence = fit(seen, where, is_inner=True)
            self._refuse_met(evidence, found, survey.reads & found.plan.preparing)
            if isinstance(samples, Batch):
                self._refuse_mixing(evidence, found)
            # Its saved tensors are gone, and no node is asked for them.
            holds = holds and found.is_settled
            holds = holds and not may_move(tape, found.plan.preparing)
            holds = holds and find_guards(evidence) == []
            placed = places(tape, found.plan.preparing)
        plan = found.plan
        above = self.graph.tape
        if not any(above.is_data(edge, ()) for edge in above.children[i]):
            self.words += what_uses_say(tape, plan, found.layouts, samples)
        if sight is not None:
            try:
                marked, is_shown = marked_region(
                    *(sight, measured, samples, self._inputs_of(i)),
                    *(len(self.graph.tape.children[i]), plan.sources),
                    # Compiled code mixes samples whatever is frozen.
                    _by_parameter(tape, found) if mixes else None,
                )
            except Unmarked as reason:
                if mixes:
                    raise self._mixing_error(tape, mixes) from None
                replay = replay_of(self.graph.tape.nodes[i])
                if replay is not None and replay.difference is not None:
                    message = f"{replay.difference} (It is not marked: {reason}.)"
                    raise CaptureError(message) from None
                self.run_again.append(str(reason))
            else:
                return marked, holds and is_shown
        shapes = plan.signature(tape)
        region = Region(tape.key, plan, found.layouts, shapes, survey.inputs, placed)
        return region, holds

    def _mixing_error(self, tape: Tape, mixes: list[int]) -> CaptureError:
        return CaptureError(
            self.model.where.mixing_message(tape, mixes)
            + ' (Inside a compiled region batchnorm="rows" is there, where the region '
            "need not run again; inside a reentrant checkpoint it is refused in any "
            "case.)"
        )

    def _inputs_of(self, i: int) -> dict[int, str]:
        """The tracked parameters that a region is given, by place."""
        tape = self.graph.tape
        return {
            place: tape.parameter_at[edge[0]]
            for place, edge in enumerate(tape.children[i])
            if edge is not None and edge[0] in tape.parameter_at
        }

    def _measured(
        self,
        watched: list[int],
        scheme: Scheme,
        surveys: Mapping[int, Survey],
        roots: Mapping[int, list[int]],
    ) -> Measurements:
        graph, tape, loss = self.graph, self.graph.tape, self.graph.loss
        frames = frames_of(tape.nodes)
        accumulates = any(is_reentrant(tape.nodes[i]) for i in graph.regions)

        def weighting(weights: Tensor) -> list[Any]:
            handles = weigh_edges(tape, roots, weights, graph.samples)
            handles += mixing.freeze(tape, graph.mixing)
            for i, survey in surveys.items():
                node = tape.nodes[i]
                handles += [survey, watch(node, survey, self, may_differ=True)]
                handles.append(node.register_hook(survey.free_inputs))
                handles += survey.look_inside(node, self)
            return handles + (block_leaves(tape) if accumulates else [])

        def backward(weights: Tensor, leaves: list[Tensor]) -> None:
            of_losses = None
            if loss.dim():
                of_losses = weights.to(device=loss.device, dtype=loss.dtype)
            if accumulates:
                run_whole_pass(loss, self, of_losses, frames)
            else:
                run_pass(loss, leaves, self, of_losses, frames)

        sharding = self.model.sharding
        gates = Gates(may_open=self.may_open)
        try:
            with self.model.extra_passes(tape):
                return measure_samples(
                    tape,
                    watched,
                    scheme=scheme,
                    weighting=weighting,
                    backward=backward,
                    gates=gates,
                    regions=graph.regions,
                    inner=list(surveys.values()),
                    to_the_end=sharding is not None,
                    joint=_alone if sharding is None else sharding.most,
                )
        finally:
            for of_graph in [gates, *(survey.gates for survey in surveys.values())]:
                self.opened |= of_graph.names
                self.is_sealed |= bool(of_graph.sealed)

    def _surveys(self) -> dict[int, Survey]:
        """Who looks at each region that will be computed again."""
        tape = self.graph.tape
        accumulating = [i for i in self.graph.regions if is_reentrant(tape.nodes[i])]
        if accumulating and is_distributed():
            raise CaptureError(
                "The loss was computed under checkpoint(use_reentrant=True) in a "
                "distributed run, where its rows cannot be measured without a "
                "reduction of gradients. Use use_reentrant=False."
            )
        return {
            i: Survey(
                self.model.names,
                named_inputs(tape, i),
                self.model.storages(),
                batch=self.graph.samples.count,
                gates=Gates(may_open=self.may_open),
                accumulates=i in accumulating,
                freezes=self.batchnorm == "rows",
            )
            for i in self.graph.regions
        }


def _by_parameter(tape: Tape, found: Fit) -> dict[str, tuple[tuple[int, ...], Any]]:
    """The shape of the output gradient of each parameter's use, and its layout."""
    return {
        name: (tuple(tape.shapes(use.node)[0]), found.layouts[use.node][0])
        for use in found.plan.uses
        for name in use.parameters
    }


def _alone(passes: int) -> int:
    """How many passes all ranks run where there is one."""
    return passes


def _children(tape: Tape, edges: Mapping[int, list[int]]) -> set[int]:
    below = (tape.children[i][number] for i, ns in edges.items() for number in ns)
    return {edge[0] for edge in below if edge is not None}


def _has_half(tape: Tape, nodes: Iterable[int]) -> bool:
    """Whether a gradient in float16 reaches one of these nodes."""
    return any(
        meta.dtype == torch.float16
        for i in nodes
        for meta in tape.nodes[i]._input_metadata
    )
