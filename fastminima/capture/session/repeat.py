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

from ..graph.node import current_node
from ..graph.passes import owner_of_pass
from ..graph.saved import readable
from ..graph.undisturbed import undisturbed
from ..options import REDUCTIONS, Request, Target
from ..reading.known import KnownReading
from .collector import Collected, Collector
from .parts import Parts
from .program import Program
from .states import Outcome, Pass
from .visit import Announce, contributions_at, visit

__all__ = ["Repeat", "Repeated", "new_repeat"]


class Repeat:
    """What the last step was, for those that repeat it.

    Args:
        known: recognises the graph.
        program: its steps.
        target: the loss of the last step, and its samples.
        parameters: the tracked parameters by name.
        announce: as for a session.
    """

    def __init__(
        self,
        known: KnownReading,
        program: Program,
        target: Target,
        parameters: Mapping[str, Tensor],
        announce: Announce,
    ) -> None:
        self.known, self.program = known, program
        self.parameters, self.announce = parameters, announce
        self._samples, self._count = target.samples, target.samples.count

    def attach(self, request: Request, names: dict[int, str]) -> Repeated | None:
        """The pass of a loss, hooked; None where this is no step like the last one.

        Args:
            request: the loss.
            names: of the tracked parameters, by id.
        """
        if not self._is_alike(request):
            return None
        nodes = self.known.nodes(request.loss.grad_fn, names)
        if nodes is None:
            return None
        target = Target(request.loss, self._samples, True, request.scale)
        repeated = Repeated(self, target)
        if repeated.hook(nodes):
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


class Repeated(Pass):
    """A pass of the probe's own over a known graph, `.grad` being its alone."""

    def __init__(self, repeat: Repeat, target: Target) -> None:
        self._repeat, self._target = repeat, target
        self._program = program = repeat.program
        self._collector = Collector(frozenset(["norms"]), {}, keep_grads=False)
        self._parts = Parts(repeat.known.sources, is_own_pass=True)
        self._pass, self._norms.table = program.start(self, target.samples.count)

    @property
    def _collected(self) -> Collected:
        return self._collector.collected

    @property
    def _norms(self) -> Any:
        return self._collector.collected.sq_norms

    def hook(self, nodes: list[Any]) -> bool:
        """Hook all uses; returns whether all fit."""
        return 0 not in self._pass.hook(nodes, self._program.wanted(frozenset()))

    def read_gradients(self) -> None:
        self._collector.read_gradients(self._repeat.parameters)

    def finish(self) -> Outcome:
        if self._parts.are_waiting:
            with undisturbed():
                for name, whole in self._parts.rest():
                    self._collector.take(name, whole)
        self._norms.filled = self._program.filled(self._pass.taken)
        self.close()
        target = self._target
        return Outcome(self._collected, target, target.factor, None)

    def close(self) -> None:
        self._pass.close()

    def is_anothers(self) -> bool:
        """Whether a pass that comes by a step is not the one that is observed."""
        return owner_of_pass() is not None

    def again(self, node: int) -> None:
        """A use is seen for the second time: an error.

        Raises:
            CaptureError: as `Parts.count`.
        """
        use = self._program.use_at[node]
        for name in use.parameters * (1 + self._parts.most):
            self._parts.count(name, use.name)

    def call(self, node: int, g: Tensor, *saved: Tensor) -> None:
        """Take a step of Python's, with the tensors that it reads."""
        with undisturbed():
            self._norms.update(self._program.calls[node].norms(g, *saved))

    def generic(self, node: int, grads: tuple[Tensor | None, ...]) -> None:
        """Take a use by its rule: it has no other step, or not for such tensors."""
        use = self._program.use_at[node]
        layouts = self._repeat.known.layouts[node]
        with undisturbed():
            at = readable(current_node())
            found, _ = contributions_at(
                *(use, at, grads, layouts),
                *(self._target.samples.count, self._repeat.announce),
            )
            back = self._program.deliveries(use, at, self._repeat.parameters)
            visit(use, found, back, self._parts, self._collector)


def new_repeat(
    known: KnownReading | None,
    program: Program | None,
    target: Target,
    parameters: Mapping[str, Tensor],
    announce: Announce,
) -> Repeat | None:
    """What a step was, if others can repeat it."""
    if known is None or program is None:
        return None
    if target.loss.dim() != 1:
        return None
    return Repeat(known, program, target, parameters, announce)
