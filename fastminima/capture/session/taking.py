"""What the hooks of a program ask of the pass that they belong to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..contributions import Contribution
from ..graph.node import Node, current_node
from ..graph.saved import readable
from ..graph.undisturbed import undisturbed
from ..reading.plan import Layouts, Slot, Use
from ..rows.layout import RowLayout
from .arrival import PassFilter
from .collector import Collector
from .delivery import Deliveries
from .parts import Parts
from .program import Program
from .visit import Announce, check_real, contributions_at, visit

__all__ = ["Taking"]


class Taking:
    """Takes the steps of a program that are for Python; the extension takes the rest.

    Args:
        parameters: the tracked parameters by name.
        layouts: of each use.
        batch: number of samples that are looked at.
        collector: takes the sample gradients of whole parameters.
        parts: joins the contributions of several uses.
        announce: called with a message the first time a node has no rule.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        layouts: Layouts,
        batch: int,
        collector: Collector,
        parts: Parts,
        announce: Announce,
    ) -> None:
        self._parameters, self._layouts, self._batch = parameters, layouts, batch
        self._collector, self._parts, self._announce = collector, parts, announce
        self._program: Program | None = None
        self._pass: Any = None  # of the program, in the extension

    def _start(self, program: Program, of_pass: PassFilter | None = None) -> None:
        """Make the extension's pass, and the table that the collector reads."""
        self._program = program
        self._pass, table = program.start(self, self._batch, of_pass)
        self._collector.collected.sq_norms.table = table
        self._collector.expect(partial(program.gradients, self._pass))

    def complete(self) -> None:
        """Take the parameters some of whose uses got no gradient."""
        if self._pass is not None:
            self._pass.release()
        if not self._parts.are_waiting:
            return
        with undisturbed():
            for name, whole in self._parts.rest():
                self._collector.take(name, whole)
        self._parts.clear()

    def _note_filled(self) -> None:
        """Say which rows of the table kernels have filled."""
        if self._program is not None:
            norms = self._collector.collected.sq_norms
            norms.filled = self._program.filled(self._pass.taken)

    def again(self, node: int) -> None:
        """A use with a step is seen for the second time: an error.

        Raises:
            CaptureError: as `Parts.count`.
        """
        assert self._program is not None
        use = self._program.use_at[node]
        for name in use.parameters * (1 + self._parts.most):
            self._parts.count(name, use.name)

    def call(self, node: int, g: Tensor, *saved: Tensor) -> None:
        """Take a step of Python's, with the tensors that it reads."""
        assert self._program is not None
        check_real(self._program.use_at[node], (g, *saved))
        with undisturbed():
            norms, gradients = self._program.calls[node].found(g, *saved)
            for name, gradient in gradients.items():
                self._collector.add(name, gradient)
        self._collector.collected.sq_norms.update(norms)

    def part(self, node: int, g: Tensor, *saved: Tensor) -> None:
        """Take a use that was kept for another, with which it cannot be computed."""
        assert self._program is not None
        use = self._program.use_at[node]
        (parameter,) = use.parameters
        check_real(use, (g, *saved))
        with undisturbed():
            found = self._program.parts[node](g, *saved)
            whole = self._parts.add(parameter, found, use.name)
            if whole is not None:
                self._collector.take(parameter, whole)

    def generic(self, node: int, grads: tuple[Tensor | None, ...]) -> None:
        """Take a use by its rule: it has no other step, or not for such tensors."""
        assert self._program is not None
        use = self._program.use_at[node]
        with undisturbed():
            at = readable(current_node())
            deliveries = self._program.deliveries(use, at, self._parameters)
            self._visit(use, at, grads, self._layouts[node], deliveries)

    def _visit(
        self,
        use: Use,
        node: Node,
        grads: Sequence[Tensor | None],
        layouts: Sequence[RowLayout | None],
        deliveries: Deliveries,
    ) -> None:
        found, _ = self._contributions(use, node, grads, layouts)
        visit(use, found, deliveries, self._parts, self._collector)

    def _contributions(
        self,
        use: Use,
        node: Node,
        grads: Sequence[Tensor | None],
        layouts: Sequence[RowLayout | None],
    ) -> tuple[dict[int, Contribution], list[Slot]]:
        """Of each slot of a use, by its number; and the slots that no rule covers."""
        return contributions_at(use, node, grads, layouts, self._batch, self._announce)
