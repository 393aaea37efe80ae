"""Read a graph: its uses and the sample of every row, found once and remembered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import batchnorm
from .errors import CaptureError
from .fitting import (
    guards_of,
    is_sure,
    layouts_of,
    layouts_of_one,
    nodes_to_watch,
)
from .gathers import find_guards, gather_nodes, places
from .known import Found, Known, Layouts
from .measure import (
    Measurements,
    Scheme,
    Weighting,
    leaves_below,
    measure_samples,
)
from .passes import is_distributed, replicas_at_rest, run_pass, run_whole_pass
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
from .roots import batch_edges, nodes_above, weigh_edges
from .routes import find_routes
from .samples import Batch, Segments
from .saved import frames_of
from .sharded import Sharding, is_sharded
from .tape import Tape
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


class Reader:
    """Finds the uses of a model's parameters, measuring each new graph structure once.

    Args:
        parameters: the tracked parameters by name.
        batchnorm: "error", "rows" or "frozen".
        model: the module, if there is one: names its parts in messages, and tells its
            buffers from data.
        sharding: of the parameters, if they are sharded: then every pass gathers them,
            and all ranks run equally many.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        batchnorm: str,
        model: nn.Module | None,
        sharding: Sharding | None = None,
    ) -> None:
        self._sharding = sharding
        self._has_agreed = False
        self._names = {id(p): name for name, p in parameters.items()}
        self._batchnorm = batchnorm
        self._model = model
        self._where = Whereabouts(model)
        self._known: dict[tuple, Known] = {}

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
        tape = Tape([loss.grad_fn], self._names)
        regions = region_nodes(tape)
        if not tape.leaves and not regions:
            raise CaptureError(
                f"The loss reaches none of the {len(self._names)} tracked parameters. "
                "Check that it was computed with this model, and that the parameters "
                "require gradients."
            )
        if self._sharding is None:
            return self._read(tape, loss, samples, regions)
        self._has_agreed = False
        try:
            return self._read(tape, loss, samples, regions)
        finally:
            if not self._has_agreed:
                self.accompany(loss)

    def accompany(self, loss: Tensor) -> None:
        """Run the passes that other ranks measure in and this one does not need."""
        if self._sharding is None or loss.grad_fn is None:
            return
        digits = self._sharding.most(0)
        tape = Tape([loss.grad_fn], self._names)
        leaves = leaves_below(tape, nodes_to_watch(tape, 2)) if digits else []
        with self.extra_passes(tape):
            for _ in range(digits + 1 if digits else 0):
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
            isinstance(samples, Segments),
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
        else:
            self._refuse_mixing_uses(tape, found.plan, found.layouts, None)
        return Reading(tape, found, mixing)

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
            if use.name not in batchnorm.MAY_MIX:
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
                not (use.name in batchnorm.BATCH_NORM and self._batchnorm != "error")
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
        batch = samples.count
        surveys = self._surveys(tape, inner)
        watched = nodes_to_watch(tape, batch, inner)
        scheme = Scheme.of(batch, _has_half(tape, watched + list(surveys)))
        is_open = batch > 1 and loss.dim() == 0
        roots = batch_edges(tape, samples) if is_open else {}
        accumulates = any(is_reentrant(tape.nodes[i]) for i in inner)

        def weighting(weights: Tensor) -> list[Any]:
            handles = weigh_edges(tape, roots, weights, samples)
            handles += batchnorm.freeze(tape, mixing)
            for i, survey in surveys.items():
                node = tape.nodes[i]
                handles += [survey, watch(node, survey, self)]
                handles.append(node.register_hook(survey.free_inputs))
            return handles + (block_leaves(tape) if accumulates else [])

        measured: Measurements | None = None
        if batch > 1 or surveys:
            measured = self._measured_samples(
                tape, watched, loss, scheme, weighting, inner, accumulates
            )
            # A weight of one is some sample's too, but all of them meet there.
            for i in nodes_above(tape, roots) if is_open else ():
                if i in measured:
                    measured[i] = [m and m.mixed() for m in measured[i]]
        regions, is_settled = self._regions(surveys, scheme, samples)
        if batch == 1:
            plan = find_plan(tape, None, inner)
            refuse_hidden(plan)
            found = Found(plan, layouts_of_one(tape, plan), regions)
            if is_settled:
                known = self._known.get(key)
                if known is None:
                    known = self._known[key] = Known(tape, found, [], moves_rows=False)
                known.remember(tape, samples, found)
            return found
        assert measured is not None
        plan = find_plan(tape, measured, inner)
        refuse_hidden(plan)
        routes = None
        if isinstance(samples, Batch):
            routes = find_routes(tape, measured, batch, plan.preparing)
        routed = routes.nodes if routes else ()
        layouts, is_fitted = layouts_of(
            self._where, tape, plan, measured, samples, routed
        )
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
        if guards is None or not (is_settled and is_fitted):
            self._known.pop(key, None)
            return complete
        known = self._known.get(key)
        if known is None or not known.fits(found, guards):
            known = self._known[key] = Known(tape, found, guards, is_open=is_open)
        known.remember(tape, samples, found)
        return complete

    def _measured_samples(
        self,
        tape: Tape,
        watched: list[int],
        loss: Tensor,
        scheme: Scheme,
        weighting: Weighting,
        inner: list[int],
        accumulates: bool,
    ) -> Measurements:
        frames = frames_of(tape.nodes)

        def backward(weights: Tensor, leaves: list[Tensor]) -> None:
            of_losses = None
            if loss.dim():
                of_losses = weights.to(device=loss.device, dtype=loss.dtype)
            if accumulates:
                run_whole_pass(loss, self, of_losses, frames)
            else:
                run_pass(loss, leaves, self, of_losses, frames)

        sharding = self._sharding
        if sharding is not None:
            self._has_agreed = True
            scheme = replace(scheme, digits=sharding.most(scheme.digits))
        with self.extra_passes(tape):
            return measure_samples(
                *(tape, watched, scheme, weighting, backward),
                regions=inner,
                to_the_end=sharding is not None,
            )

    def _surveys(self, tape: Tape, inner: list[int]) -> dict[int, Survey]:
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
                self._names,
                named_inputs(tape, i),
                self._storages(),
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
                measured = scheme.decode(survey.seen)
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


def _has_half(tape: Tape, nodes: Iterable[int]) -> bool:
    """Whether a gradient in float16 reaches one of these nodes."""
    return any(
        meta.dtype == torch.float16
        for i in nodes
        for meta in tape.nodes[i]._input_metadata
    )
