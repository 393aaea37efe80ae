"""A step like the one before, of which nothing has to be decided again.

Most steps of a training loop differ from the last one in their numbers alone: the same
graph in the same sizes, a program for every use, norms that are all that counts.
Such a step is a walk in C++, hooks in C++, and the sums at the end. Whatever is not as
it was makes it an ordinary step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..graph.passes import owner_of_pass
from ..options import REDUCTIONS, Request, Target
from ..reading.known import KnownReading
from .collector import Collector, FusedCollector
from .fused import Fusion, FusionPlan
from .held import may_be_left_out
from .parts import Parts
from .program import Program
from .states import Outcome, Pass
from .taking import Taking
from .visit import Announce

__all__ = ["Repeat", "Repeated", "new_repeat"]


class Repeat:
    """What the last step was, for those that repeat it.

    Args:
        known: recognises the graph.
        program: its steps.
        target: the loss of the last step, and its samples.
        parameters: the tracked parameters by name.
        announce: as for a session.
        fusion: what the pass left out, if anything.
        by_parameter: whether squared norms of single parameters' gradients are asked
            for.
    """

    def __init__(
        self,
        known: KnownReading,
        program: Program,
        target: Target,
        parameters: Mapping[str, Tensor],
        announce: Announce,
        fusion: FusionPlan | None,
        *,
        by_parameter: bool,
    ) -> None:
        self.by_parameter = by_parameter
        self.known, self.program, self.fusion = known, program, fusion
        self.fused = {} if fusion is None else fusion.parameters(parameters)
        self.parameters, self.announce = parameters, announce
        self._samples, self._count = target.samples, target.samples.count

    def attach(self, request: Request, names: dict[int, str]) -> Repeated | None:
        """The pass of a loss, hooked; None where this is no step like the last one.

        Args:
            request: the loss.
            names: of the tracked parameters, by id.
        """
        if not (self._is_alike(request) and self.known.is_next(names)):
            return None
        if self.fused and not may_be_left_out(list(self.fused.values())):
            return None
        target = Target(request.loss, self._samples, True, request.scale)
        repeated = Repeated(self, target)
        if repeated.hook(self.known, request.loss.grad_fn, names):
            self.known.count()
            return repeated
        repeated.close()
        return None

    def _is_alike(self, request: Request) -> bool:
        loss = request.loss
        return (
            loss.dim() == 1
            and loss.shape[0] == self._count
            and loss.grad_fn is not None
            and request.batch_size in (None, self._count)
            and request.reduction in REDUCTIONS
            and request.batch_dim is None
            and request.segment_ids is None
            and request.scale > 0
            and not torch.is_inference_mode_enabled()
        )


class Repeated(Taking, Pass):
    """A pass of the probe's own over a known graph, `.grad` being its alone."""

    is_repeated = True

    def __init__(self, repeat: Repeat, target: Target) -> None:
        plan = repeat.fusion
        fusion = None if plan is None else Fusion(plan, repeat.fused)
        super().__init__(
            *(repeat.parameters, repeat.known.layouts, target.samples.count),
            _collector(fusion, by_parameter=repeat.by_parameter),
            Parts(repeat.known.sources, is_own_pass=True),
            repeat.announce,
        )
        self._target, self._fusion = target, fusion
        self._start(repeat.program)

    def hook(self, known: KnownReading, root: Any, names: dict[int, str]) -> bool:
        """Hook all uses below a root; returns whether it is the known graph's."""
        nodes = self._pass.follow(known.wiring, known.conditions, root, names)
        if nodes is not None and self._fusion is not None:
            self._fusion.enter(nodes, is_fresh=True)
        return nodes is not None

    @property
    def inputs(self) -> list[Any] | None:
        return None if self._fusion is None else self._fusion.inputs

    def deliver(self) -> None:
        if self._fusion is not None:
            self.complete()
            self._fusion.deliver()

    def read_gradients(self) -> None:
        self._collector.read_gradients(self._parameters)

    def finish(self) -> Outcome:
        self.complete()
        self._note_filled()
        self.close()
        target = self._target
        return Outcome(self._collector.collected, target, target.factor, None)

    def close(self) -> None:
        self._pass.close()
        if self._fusion is not None:
            self._fusion.close()

    def is_anothers(self) -> bool:
        """Whether a pass that comes by a step is not the one that is observed."""
        return owner_of_pass() is not None


def _collector(fusion: Fusion | None, *, by_parameter: bool) -> Collector:
    measure = frozenset(["norms"])
    if fusion is None:
        return Collector(measure, {}, keep_grads=False, by_parameter=by_parameter)
    return FusedCollector(
        measure, {}, fusion, keep_grads=False, by_parameter=by_parameter
    )


def new_repeat(
    known: KnownReading | None,
    program: Program | None,
    target: Target,
    parameters: Mapping[str, Tensor],
    announce: Announce,
    fusion: FusionPlan | None,
    *,
    by_parameter: bool,
) -> Repeat | None:
    """What a step was, if others can repeat it."""
    if known is None or program is None:
        return None
    if target.loss.dim() != 1:
        return None
    return Repeat(
        known, program, target, parameters, announce, fusion, by_parameter=by_parameter
    )
