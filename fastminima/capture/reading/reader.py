"""Read a graph: its uses and the sample of every row, found once and remembered."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CaptureError
from ..graph.nodes import MAY_MIX
from ..graph.passes import (
    is_capturing,
    is_distributed,
    replicas_at_rest,
    run_pass,
    run_whole_pass,
)
from ..graph.saved import frames_of
from ..graph.sharding import Sharding, is_sharded
from ..graph.tape import Tape
from ..graph.tracking import has_changed, untracked_leaves
from ..rows.batch_axis import batch_edges, nodes_above, unshown_message, weigh_edges
from ..rows.decode import Scheme
from ..rows.gates import Gates
from ..rows.guards import find_guards, gather_nodes, places
from ..rows.measure import Measurements, decode, leaves_below, measure_samples
from ..rows.routes import find_routes
from ..rows.samples import Batch, Segments
from . import mixing as batchnorm
from .axis_shown import Shown, what_is_shown
from .fit import (
    disagreement,
    guards_of,
    is_sure,
    layouts_of,
    layouts_of_one,
    nodes_to_watch,
)
from .memory import Found, Known, Layouts
from .plan import Plan, find_plan, is_spread, reads_data
from .refusals import (
    refuse_collectives,
    refuse_compiled,
    refuse_complex,
    refuse_hidden,
    refuse_nested,
)
from .regions import (
    Region,
    Survey,
    block_leaves,
    identity,
    is_reentrant,
    named_inputs,
    region_nodes,
    watch,
)
from .whereabouts import Whereabouts

__all__ = ["Reader", "Reading"]

_MOST_STRUCTURES = 64


@dataclass(frozen=True)
class Reading:
    """A graph that is understood: what to hook and how to read it."""

    tape: Tape
    found: Found
    mixing: list[int]

    def choosing(self, samples: Tensor) -> Reading:
        """The same, looking at some samples only."""
        return replace(self, found=self.found.choosing(samples))


class _OtherAxis(Exception):
    """The axis of a scalar loss is not that of the samples."""

    def __init__(self, nodes: set[int]) -> None:
        super().__init__()
        self.nodes = nodes


@dataclass
class _Attempt:
    """One measurement of a graph: of what, and what it met.

    Attributes:
        rejected: nodes that only look as if they had the samples' axis.
        opened: names of the closed gates that were opened.
        is_sealed: whether something was closed that cannot be opened.
    """

    key: tuple
    tape: Tape
    loss: Tensor
    samples: Batch | Segments
    mixing: list[int]
    inner: list[int]
    rejected: set[int]
    opened: set[str] = field(default_factory=set)
    is_sealed: bool = False

    @property
    def is_open(self) -> bool:
        """Whether the samples have to be found below a scalar loss."""
        return self.samples.count > 1 and self.loss.dim() == 0

    def note(self, gates: Iterable[Gates]) -> None:
        """Keep what was closed."""
        for of_graph in gates:
            self.opened |= of_graph.names
            self.is_sealed |= bool(of_graph.sealed)


class Reader:
    """Finds the uses of a model's parameters, measuring each new graph structure once.

    Args:
        parameters: the tracked parameters by name.
        batchnorm: "error", "rows" or "frozen".
        model: the module, if there is one: names its parts in messages, and tells its
            buffers from data.
        sharding: of the parameters, if they are sharded: then every pass gathers them,
            and all ranks run equally many.
        check_every: steps after which a known structure is measured anew.
        retrack: returns the parameters that are tracked from now on, where those of the
            model have changed.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        batchnorm: str,
        model: nn.Module | None,
        sharding: Sharding | None = None,
        check_every: int = 200,
        retrack: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._sharding = sharding
        self._check_every = check_every
        self._measured: Measurements = {}  # last of all
        self.is_suspicious = False  # whether the next graph is to be measured anew
        self._parameters = parameters
        self.names = {id(p): name for name, p in parameters.items()}
        self._retrack = retrack
        self._is_whole: bool | None = None  # nothing but tracked parameters was met
        self._batchnorm = batchnorm
        self._model = model
        self._where = Whereabouts(model)
        self._known: dict[tuple, Known] = {}
        self._announced_gates: set[str] = set()

    def read(self, loss: Tensor, samples: Batch | Segments) -> Reading:
        """Walk the graph of `loss` and say how to read it for those samples.

        Raises:
            CaptureError: for a graph that cannot be read exactly.
        """
        if loss.grad_fn is None:
            raise CaptureError(
                "The loss has no graph: none of the tracked parameters took part in "
                "it, or it was computed under torch.no_grad(). Compute it with "
                "gradients on."
            )
        tape = self._walk(loss.grad_fn)
        regions = region_nodes(tape)
        if not tape.leaves and not regions:
            raise CaptureError(
                f"The loss reaches none of the {len(self.names)} tracked parameters. "
                "Check that it was computed with this model, and that the parameters "
                "require gradients."
            )
        if self._sharding is None:
            return self._read(tape, loss, samples, regions)
        try:
            return self._read(tape, loss, samples, regions)
        finally:
            self.accompany(loss)

    def _walk(self, root: Any) -> Tape:
        """The graph below a node, once all parameters in it are tracked."""
        tape = Tape([root], self.names)
        if self._sharding is not None or self._retrack is None:
            return tape
        others = untracked_leaves(tape)
        if self._model is None:
            self._check_given(tape, others)
        elif has_changed(self._model, self._parameters, tape, others):
            self._parameters = self._retrack()
            self.names = {id(p): name for name, p in self._parameters.items()}
            self._where = Whereabouts(self._model)
            tape = Tape([root], self.names)
        return tape

    def _check_given(self, tape: Tape, others: Sequence[Tensor]) -> None:
        """Raise where a dict of parameters does not name all that it did before."""
        was_whole, self._is_whole = self._is_whole, not others
        frozen = [n for n, p in self._parameters.items() if not p.requires_grad]
        missing = [n for n in self._parameters if n not in tape.leaves]
        if frozen:
            what = f"{frozen[:4]} do not require gradients any more"
        elif was_whole and others:
            shapes = ", ".join(str(tuple(p.shape)) for p in others[:4])
            gone = f" (not reached now: {missing[:4]})" if missing else ""
            what = f"the loss also reaches parameters of shape {shapes}{gone}"
        else:
            return
        self._is_whole = was_whole
        raise CaptureError(
            f"The parameters are not those that this probe was made with: {what}. Make "
            "a new probe with the present ones, or give it the module, whose "
            "parameters it follows."
        )

    def accompany(self, loss: Tensor) -> None:
        """Run the passes that other ranks measure in and this one does not need."""
        if self._sharding is None or loss.grad_fn is None:
            return
        leaves: list[Tensor] | None = None
        tape = Tape([loss.grad_fn], self.names)
        while passes := self._sharding.most(0):
            if leaves is None:
                leaves = leaves_below(tape, nodes_to_watch(tape, 2))
            with self.extra_passes(tape):
                for _ in range(passes):
                    weights = torch.ones_like(loss) if loss.dim() else None
                    run_pass(loss, leaves, self, weights)

    @contextmanager
    def extra_passes(self, tape: Tape) -> Iterator[None]:
        """What wraps the model takes no notice of passes in this context."""
        sharding = self._sharding
        at_rest = nullcontext() if sharding is None else sharding.at_rest()
        with replicas_at_rest(tape.nodes), at_rest:
            yield

    def _read(
        self,
        tape: Tape,
        loss: Tensor,
        samples: Batch | Segments,
        regions: list[int],
    ) -> Reading:
        batch = samples.count
        key = (
            tape.key,
            batch > 1,
            samples.dims if loss.dim() == 0 else None,
            # Rows of one document each say nothing of what keeps several apart.
            isinstance(samples, Segments) and 1 + samples.is_shared,
            tuple(identity(tape, i) for i in regions),
        )
        known = self._known.get(key)
        if known is None:
            refuse_compiled(tape, regions)
            refuse_complex(tape)
            refuse_nested(tape)
            refuse_collectives(tape)
            while len(self._known) >= _MOST_STRUCTURES:  # unrolled loops of any length
                self._known.pop(next(iter(self._known)))
        candidates = None if known is None else known.norms
        mixing = batchnorm.mixing_nodes(tape, batch, candidates)
        if mixing and self._batchnorm == "error":
            raise CaptureError(self._where.mixing_message(tape, mixing))
        found = None if known is None else known.recall(tape, samples)
        if found is None:
            found = self._measure(key, tape, loss, samples, mixing, regions)
            return Reading(tape, found, mixing)
        assert known is not None
        self._refuse_mixing_uses(tape, found.plan, found.layouts, None)
        # All rows of a batch of one are its own; in a CUDA graph nothing is looked at.
        may_check = batch > 1 and not is_capturing(loss)
        if may_check and (known.is_due(self._check_every) or self.is_suspicious):
            self._check(known, found, (key, tape, loss, samples, mixing, regions))
        return Reading(tape, found, mixing)

    def _check(self, known: Known, found: Found, graph: tuple) -> None:
        """Measure a known structure anew.

        Raises:
            CaptureError: where what was remembered does not hold any more.
        """
        key, tape, *_ = graph
        steps = known.recalls
        try:
            self._measure(*graph)
        except CaptureError as error:
            self._known.pop(key, None)
            raise CaptureError(_changed_message(steps) + str(error)) from error
        node = disagreement(found, self._measured)
        if node is not None:
            self._known.pop(key, None)
            raise CaptureError(
                _changed_message(steps) + f"At {self._where.module_at(tape, node)} the "
                "rows belong to other samples now: something moves them that the graph "
                "does not show. Report it, with the layer, if you do not know what."
            )
        self._known[key] = known  # also where some samples were not seen this time

    def _refuse_mixing_uses(
        self,
        tape: Tape,
        plan: Plan,
        layouts: Layouts,
        measured: Measurements | None,
    ) -> None:
        """Raise for a use that mixes samples by itself.

        For a normalisation that depends on its layout, which may not be sure yet where
        it was `measured` in this step.
        """
        for use, of_use in zip(plan.uses, layouts, strict=True):
            if use.name not in MAY_MIX and use.name not in batchnorm.BATCH_NORMS:
                continue
            layout = of_use[0]
            if layout is None or layout.batch == 1:
                continue
            if batchnorm.counts_in_batch(tape, use.node):
                does = (
                    "divides gradients by how often an index is in the batch "
                    "(scale_grad_by_freq=True)"
                )
            elif (
                # Any other choice than "error" says what is meant.
                not (use.name in batchnorm.BATCH_NORMS and self._batchnorm != "error")
                and batchnorm.normalises_over(tape, use.node, layout)
                and (measured is None or is_sure(measured[use.node], layout.batch))
            ):
                does = "takes its statistics over several samples"
            else:
                continue
            raise CaptureError(
                f"{use.name} at {self._where.module_at(tape, use.node)} {does}, so the "
                "gradient of one sample depends on the others. Change the layer, or "
                "use MinibatchVariance."
            )

    def _measure(
        self,
        key: tuple,
        tape: Tape,
        loss: Tensor,
        samples: Batch | Segments,
        mixing: list[int],
        inner: list[int],
    ) -> Found:
        """Measure a graph with its closed gates opened, else as it is.

        Where samples meet behind a closed gate, what is measured holds for this step
        only. An axis of a scalar loss that turns out to be another one is passed by.
        """
        rejected: set[int] = set()
        may_open = True
        while True:
            attempt = _Attempt(key, tape, loss, samples, mixing, inner, rejected)
            try:
                return self._try(attempt, may_open)
            except _OtherAxis as other:
                rejected |= other.nodes
            except CaptureError:
                if not attempt.opened:
                    raise
                self._announce_gates(attempt.opened)
                may_open = False

    def _announce_gates(self, names: set[str]) -> None:
        new = names - self._announced_gates
        if new:
            self._announced_gates |= new
            warnings.warn(
                f"Samples meet behind {', '.join(sorted(new))}, which multiplies by "
                "zero at present. The statistics are exact while it does; what is "
                "measured holds for one step, so each step is measured (two or three "
                "more passes). Leave the term out of the graph until it is used.",
                stacklevel=2,
            )

    def _try(self, attempt: _Attempt, may_open: bool) -> Found:
        tape, samples, inner = attempt.tape, attempt.samples, attempt.inner
        batch = samples.count
        surveys = self._surveys(tape, inner, batch, may_open)
        watched = nodes_to_watch(tape, batch, inner)
        scheme = Scheme.of(batch, _has_half(tape, watched + list(surveys)))
        roots = {}
        if attempt.is_open:
            roots = batch_edges(tape, samples, attempt.rejected)
        measured: Measurements | None = None
        gates = Gates(may_open=may_open)
        if batch > 1 or surveys:
            try:
                measured = self._measured_samples(
                    attempt, watched, scheme, surveys, roots, gates
                )
            finally:
                attempt.note([gates, *(s.gates for s in surveys.values())])
            # A weight of one is some sample's too, but all of them meet there.
            for i in nodes_above(tape, roots) if attempt.is_open else ():
                if i in measured:
                    measured[i] = [m and m.mixed() for m in measured[i]]
        regions, is_settled = self._regions(surveys, scheme, samples)
        is_settled &= may_open and not attempt.is_sealed
        if batch == 1:
            return self._read_one(attempt, regions, is_settled)
        assert measured is not None
        self._measured = measured
        return self._understand(attempt, measured, roots, regions, is_settled)

    def _read_one(
        self, attempt: _Attempt, regions: dict[int, Region | None], is_settled: bool
    ) -> Found:
        """How to read the graph of one sample: every row is its own."""
        tape = attempt.tape
        plan = find_plan(tape, None, attempt.inner)
        refuse_hidden(plan)
        found = Found(plan, layouts_of_one(tape, plan), regions)
        if is_settled:
            known = self._known.get(attempt.key)
            if known is None:
                known = self._known[attempt.key] = Known(
                    tape, found, [], moves_rows=False
                )
            known.remember(tape, attempt.samples, found)
        return found

    def _understand(
        self,
        attempt: _Attempt,
        measured: Measurements,
        roots: Mapping[int, list[int]],
        regions: dict[int, Region | None],
        is_settled: bool,
    ) -> Found:
        """From what was measured to how to read the graph, now and later."""
        tape, samples = attempt.tape, attempt.samples
        batch = samples.count
        plan = find_plan(tape, measured, attempt.inner)
        refuse_hidden(plan)
        routes = None
        if isinstance(samples, Batch):
            routes = find_routes(tape, measured, batch, plan.preparing)
        routed = routes.nodes if routes else ()
        layouts, is_fitted = layouts_of(
            self._where, tape, plan, measured, samples, routed
        )
        shown = Shown.SAMPLES
        if attempt.is_open:
            shown = what_is_shown(tape, plan, layouts, samples)
        if shown is Shown.EITHER:
            raise CaptureError(unshown_message(samples))
        if shown is not Shown.SAMPLES:
            raise _OtherAxis(_children(tape, roots))
        own = self._storages()
        for i in plan.preparing:
            if reads_data(tape, i, own) and not is_spread(tape, plan, layouts, i):
                raise CaptureError(self._where.mixed_message(tape, i, samples))
        found = Found(plan, layouts, regions, routes)
        complete = found.followed(tape, samples)
        assert complete is not None  # the routes agree with this very graph
        covered = routes.covered if routes else ()
        self._refuse_mixing_uses(tape, plan, complete.layouts, measured)
        guards = guards_of(tape, measured, samples, plan, covered)
        key = attempt.key
        if guards is None or not (is_settled and is_fitted):
            self._known.pop(key, None)
            return complete
        known = self._known.get(key)
        if known is None or not known.fits(found, guards):
            known = self._known[key] = Known(
                tape,
                found,
                guards,
                is_open=attempt.is_open,
                rejected=frozenset(attempt.rejected),
            )
        known.remember(tape, samples, found)
        return complete

    def _measured_samples(
        self,
        attempt: _Attempt,
        watched: list[int],
        scheme: Scheme,
        surveys: Mapping[int, Survey],
        roots: Mapping[int, list[int]],
        gates: Gates,
    ) -> Measurements:
        tape, loss, inner = attempt.tape, attempt.loss, attempt.inner
        frames = frames_of(tape.nodes)
        accumulates = any(is_reentrant(tape.nodes[i]) for i in inner)

        def weighting(weights: Tensor) -> list[Any]:
            handles = weigh_edges(tape, roots, weights, attempt.samples)
            handles += batchnorm.freeze(tape, attempt.mixing)
            for i, survey in surveys.items():
                node = tape.nodes[i]
                handles += [survey, watch(node, survey, self)]
                handles.append(node.register_hook(survey.free_inputs))
            return handles + (block_leaves(tape) if accumulates else [])

        def backward(weights: Tensor, leaves: list[Tensor]) -> None:
            of_losses = None
            if loss.dim():
                of_losses = weights.to(device=loss.device, dtype=loss.dtype)
            if accumulates:
                run_whole_pass(loss, self, of_losses, frames)
            else:
                run_pass(loss, leaves, self, of_losses, frames)

        sharding = self._sharding
        with self.extra_passes(tape):
            return measure_samples(
                tape,
                watched,
                scheme=scheme,
                weighting=weighting,
                backward=backward,
                gates=gates,
                regions=inner,
                inner=list(surveys.values()),
                to_the_end=sharding is not None,
                joint=_alone if sharding is None else sharding.most,
            )

    def _surveys(
        self, tape: Tape, inner: list[int], batch: int, may_open: bool
    ) -> dict[int, Survey]:
        """Who looks at each region that will be computed again."""
        accumulating = [i for i in inner if is_reentrant(tape.nodes[i])]
        if accumulating and is_distributed():
            raise CaptureError(
                "The loss was computed under checkpoint(use_reentrant=True) in a "
                "distributed run, where its rows cannot be measured without a "
                "reduction of gradients. Use use_reentrant=False."
            )
        return {
            i: Survey(
                self.names,
                named_inputs(tape, i),
                self._storages(),
                batch=batch,
                gates=Gates(may_open=may_open),
                accumulates=i in accumulating,
            )
            for i in inner
        }

    def _regions(
        self,
        surveys: Mapping[int, Survey],
        scheme: Scheme,
        samples: Batch | Segments,
    ) -> tuple[dict[int, Region | None], bool]:
        regions: dict[int, Region | None] = {}
        is_settled = True
        for i, survey in surveys.items():
            tape = survey.tape
            if tape is None:  # no gradient came there
                regions[i] = None
                continue
            refuse_compiled(tape, [])
            refuse_complex(tape)
            if mixing := batchnorm.mixing_nodes(tape, scheme.batch):
                raise CaptureError(
                    self._where.mixing_message(tape, mixing)
                    + " (In a region that runs again in the backward pass, a reentrant "
                    "checkpoint or a compiled one, it is refused in any case.)"
                )
            placed = None
            if scheme.batch == 1:
                plan = find_plan(tape, None)
                layouts = layouts_of_one(tape, plan)
                is_settled &= not gather_nodes(tape)  # as many rows in each step?
            else:
                measured = decode(survey.seen, scheme)
                plan = find_plan(tape, measured)
                layouts, fits = layouts_of(self._where, tape, plan, measured, samples)
                for j in survey.reads & plan.preparing:
                    if not is_spread(tape, plan, layouts, j):
                        raise CaptureError(self._where.mixed_message(tape, j, samples))
                if isinstance(samples, Batch):
                    self._refuse_mixing_uses(tape, plan, layouts, measured)
                is_settled &= fits and not gather_nodes(tape)
                if is_settled:
                    guards = find_guards(tape, measured, scheme.batch, plan.preparing)
                    is_settled = guards == []
                placed = places(tape, plan.preparing)
            regions[i] = Region(
                *(tape.key, plan, layouts, plan.signature(tape)),
                *(survey.inputs, placed),
            )
        return regions, is_settled

    def _storages(self) -> set[int]:
        """Which storages hold what is the model's own."""
        if self._model is None:
            return set()
        held = [*self._model.parameters(), *self._model.buffers()]
        if self._sharding is not None:
            held = [t for t in held if not is_sharded(t)] + self._sharding.held
        # Addresses would not do: sharded parameters have none between their uses.
        return {t.untyped_storage()._cdata for t in held}


def _changed_message(steps: int) -> str:
    return (
        f"This graph was measured {steps} steps ago and has the same structure since, "
        "but its rows are not what they were; the statistics of the steps in between "
        "may be wrong. "
    )


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
