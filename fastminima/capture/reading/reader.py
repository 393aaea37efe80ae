"""Read a graph: its uses and the sample of every row, found once and remembered."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CaptureError
from ..graph.passes import is_capturing, run_pass
from ..graph.tape import Tape
from ..rows.measure import leaves_below
from ..rows.samples import Samples, Segments
from . import mixing
from .attempt import Attempt, Graph, OtherAxis, Understood
from .fit import disagreement, nodes_to_watch
from .known import KnownReading
from .marked import Marked
from .memory import Structure
from .recipe import Recipe
from .refusals import (
    refuse_collectives,
    refuse_compiled,
    refuse_complex,
    refuse_nested,
)
from .regions import identity, region_nodes
from .tracked import TrackedModel

__all__ = ["Reader", "Reading"]

_MOST_STRUCTURES = 64


@dataclass(frozen=True)
class Reading:
    """A graph that is understood: what to hook and how to read it."""

    tape: Tape
    recipe: Recipe
    mixing: list[int]

    def choosing(self, samples: Tensor) -> Reading:
        """This reading, looking at some samples only."""
        return replace(self, recipe=self.recipe.choosing(samples))


class Reader:
    """Finds the uses of a model's parameters, measuring each new graph structure once.

    Where the parameters are sharded, every pass gathers them, and all ranks run equally
    many.

    Args:
        model: the parameters that are tracked.
        batchnorm: "error", "rows" or "frozen".
        check_every: steps after which a known structure is measured anew.
    """

    def __init__(
        self, model: TrackedModel, batchnorm: str, check_every: int = 200
    ) -> None:
        self._model, self._batchnorm = model, batchnorm
        self._check_every = check_every
        self.is_suspicious = False  # whether the next graph is to be measured anew
        self._structures: dict[tuple, Structure] = {}
        self._recalled: Structure | None = None  # what served the last graph
        self._announced_gates: set[str] = set()
        self._announced_regions: set[str] = set()

    @property
    def names(self) -> dict[int, str]:
        """Of the tracked parameters, by id."""
        return self._model.names

    def read(self, loss: Tensor, samples: Samples) -> Reading:
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
        tape = self._model.walk(loss.grad_fn)
        regions = region_nodes(tape)
        if not tape.leaves and not regions:
            raise CaptureError(
                f"The loss reaches none of the {len(self.names)} tracked parameters. "
                "Check that it was computed with this model, and that the parameters "
                "require gradients."
            )
        if self._model.sharding is None:
            return self._read(tape, loss, samples, regions)
        try:
            return self._read(tape, loss, samples, regions)
        finally:
            self.accompany(loss)

    def known(self, reading: Reading) -> KnownReading | None:
        """The graph read last, to be recognised; None where it has to be read.

        Where parameters are sharded or not all reached, and where rows are routed, each
        graph is looked at.
        """
        structure, recipe = self._recalled, reading.recipe
        wiring = self._model.wiring(reading.tape)
        if structure is None or wiring is None or recipe.regions or not recipe.lasts:
            return None
        if recipe.routes is not None or structure.conditions is None:
            return None
        return KnownReading(
            *(structure, recipe, wiring, structure.conditions),
            *(self.names, self._check_every),
        )

    def extra_passes(self, tape: Tape) -> AbstractContextManager[None]:
        """What wraps the model takes no notice of passes in this context."""
        return self._model.extra_passes(tape)

    def accompany(self, loss: Tensor) -> None:
        """Run the passes that other ranks measure in and this one does not need."""
        sharding = self._model.sharding
        if sharding is None or loss.grad_fn is None:
            return
        leaves: list[Tensor] | None = None
        tape = Tape([loss.grad_fn], self.names)
        while passes := sharding.most(0):
            if leaves is None:
                leaves = leaves_below(tape, nodes_to_watch(tape, 2))
            with self.extra_passes(tape):
                for _ in range(passes):
                    weights = torch.ones_like(loss) if loss.dim() else None
                    run_pass(loss, leaves, self, weights)

    def _read(
        self, tape: Tape, loss: Tensor, samples: Samples, regions: list[int]
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
        known = self._structures.get(key)
        if known is None:
            refuse_compiled(tape, regions)
            refuse_nested(tape)
            refuse_collectives(tape)
            while len(self._structures) >= _MOST_STRUCTURES:  # loops of any length
                self._structures.pop(next(iter(self._structures)))
        candidates = None if known is None else known.norms
        mixes = mixing.mixing_nodes(tape, batch, candidates)
        if mixes and self._batchnorm == "error":
            raise CaptureError(self._model.where.mixing_message(tape, mixes))
        graph = Graph(key, tape, loss, samples, mixes, regions)
        recipe = None if known is None else known.recall(tape, samples)
        self._recalled = None
        if recipe is None:
            understood = self._measure(graph)
            self._remember(graph, understood)
            return Reading(tape, understood.complete, mixes)
        assert known is not None
        if not known.is_settled:
            try:
                refuse_complex(tape, [use.node for use in recipe.plan.uses])
                mixing.refuse_mixing_uses(
                    tape,
                    recipe.plan,
                    recipe.layouts,
                    batchnorm=self._batchnorm,
                    where=self._model.where,
                )
            except CaptureError:
                known.unsettle()
                raise
        # All rows of a batch of one are its own; in a CUDA graph nothing is looked at.
        may_check = batch > 1 and not is_capturing(loss)
        if may_check and (known.is_due(self._check_every) or self.is_suspicious):
            self._check(known, recipe, graph)
        self._recalled = known
        return Reading(tape, recipe, mixes)

    def _check(self, known: Structure, recipe: Recipe, graph: Graph) -> None:
        """Measure a known structure anew.

        Raises:
            CaptureError: where what was remembered does not hold any more.
        """
        steps = known.recalls
        try:
            understood = self._measure(graph)
            self._remember(graph, understood)
        except CaptureError as error:
            self._structures.pop(graph.key, None)
            raise CaptureError(_changed_message(steps) + str(error)) from error
        node = disagreement(recipe, understood.seen)
        if node is None and understood.guards is not None:
            node = _other_region(recipe, understood.recipe)
        if node is not None:
            self._structures.pop(graph.key, None)
            where = self._model.where.module_at(graph.tape, node)
            raise CaptureError(
                _changed_message(steps)
                + f"At {where} the rows belong to other samples "
                "now: something moves them that the graph does not show. Report it, "
                "with the layer, if you do not know what."
            )
        # Also where some samples were not seen this time.
        self._structures[graph.key] = known

    def _measure(self, graph: Graph) -> Understood:
        """Measure a graph with its closed gates opened, else as it is.

        Where samples meet behind a closed gate, what is measured holds for this step
        only. An axis of a scalar loss that turns out to be another one is passed by.
        """
        refuse_complex(graph.tape)  # a known structure may become so: it has no dtypes
        rejected: set[int] = set()
        may_open = True
        while True:
            attempt = Attempt(graph, self._model, self._batchnorm, rejected, may_open)
            try:
                understood = attempt.run()
                self._announce_regions(attempt.run_again)
                return understood
            except OtherAxis as other:
                rejected |= other.nodes
            except CaptureError:
                if not attempt.opened:
                    raise
                self._announce_gates(attempt.opened)
                may_open = False

    def _remember(self, graph: Graph, understood: Understood) -> None:
        """Keep how a graph is read, if that holds for the steps to come."""
        key, recipe, guards = graph.key, understood.recipe, understood.guards
        if guards is None:
            if graph.samples.count > 1:
                self._structures.pop(key, None)
            return
        known = self._structures.get(key)
        is_one = graph.samples.count == 1
        if known is None or not (is_one or known.fits(recipe, guards)):
            known = self._structures[key] = Structure(
                graph.tape,
                recipe,
                guards,
                moves_rows=not is_one,
                is_open=graph.is_open,
                rejected=understood.rejected,
            )
        known.remember(graph.tape, graph.samples, recipe)

    def _announce_regions(self, reasons: list[str]) -> None:
        for reason in reasons:
            if reason not in self._announced_regions:
                self._announced_regions.add(reason)
                warnings.warn(
                    "A compiled region runs once more, uncompiled, on each probed "
                    f"step, because {reason}. The statistics are exact; these steps "
                    "cost more.",
                    stacklevel=2,
                )

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


def _other_region(recipe: Recipe, now: Recipe) -> int | None:
    """The first compiled region whose rows a new measurement gives to other samples."""
    for i, region in recipe.regions.items():
        measured = now.regions.get(i)
        if not (isinstance(region, Marked) and isinstance(measured, Marked)):
            continue
        if region.layouts != measured.layouts and not region.agrees(measured):
            return i
    return None


def _changed_message(steps: int) -> str:
    return (
        f"This graph was measured {steps} steps ago and has the same structure since, "
        "but its rows are not what they were; the statistics of the steps in between "
        "may be wrong. "
    )
