"""The rule for nodes without a rule: their backward, once per sample.

A node's backward is linear in its output gradient, so with the rows of all samples but
one set to zero it returns that sample's gradients. It costs the batch size times the
node's own backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..._dtypes import accumulation_dtype
from ...ops._pieces import step_of
from ..contributions import Contribution, Materialized
from ..errors import CaptureError
from ..graph.node import Node
from ..reading.plan import Slot
from ..rows.layout import RowLayout

__all__ = ["Universal"]


class Universal:
    """The sample gradients of one node's inputs, by calling the node itself."""

    def __init__(
        self,
        node: Node,
        grads: Sequence[Tensor | None],
        layouts: Sequence[RowLayout | None],
        batch: int,
    ) -> None:
        self.node, self.grads, self.layouts, self.batch = node, grads, layouts, batch

    def contributions(self, slots: Sequence[Slot]) -> dict[int, Contribution]:
        """A contribution for each slot, all of one sweep over the samples.

        Where that many gradients would be too much to hold, each statistic takes a
        sweep of its own.
        """
        size = 4 * sum(torch.Size(slot.shape).numel() for slot in slots)
        if self.batch * size > step_of(1):
            sweep = _Sweep(self, slots)
            return {slot.number: _Swept(sweep, slot) for slot in slots}
        samples = self.samples(slots, 0, self.batch)
        return {number: Materialized(grads) for number, grads in samples.items()}

    def samples(self, slots: Sequence[Slot], lo: int, hi: int) -> dict[int, Tensor]:
        """Gradients of samples lo ... hi - 1, of each slot."""
        whole: dict[int, Tensor] = {}
        for n in range(lo, hi):
            for slot, grad in zip(slots, self.of_sample(slots, n), strict=True):
                if n == lo:
                    whole[slot.number] = grad.new_empty(hi - lo, *slot.shape)
                whole[slot.number][n - lo] = grad
        return whole

    def of_sample(self, slots: Sequence[Slot], n: int) -> list[Tensor]:
        """Gradients of one sample, of each slot."""
        found = self._backward_of(n)
        self._check_asked(found, slots)
        return [_fitted(found[slot.number], slot, self._any) for slot in slots]

    def _check_asked(
        self, found: Sequence[Tensor | None], slots: Sequence[Slot]
    ) -> None:
        """Raise where a node leaves out what its pass does not need.

        Nodes of C++ do: in a pass for other inputs they say nothing of this one.
        """
        if hasattr(self.node, "apply") or any(g is None for g in self.grads):
            return
        for slot in slots:
            if found[slot.number] is None:
                raise CaptureError(
                    f"The pass does not compute the gradient of "
                    f"{[p.parameter for p in slot.paths]} at {self.node.name()}, whose "
                    "norms need it. Run loss.backward() for all parameters, without "
                    "inputs=, between attach and collect."
                )

    @property
    def _any(self) -> Tensor:
        return next(g for g in self.grads if g is not None)

    def _backward_of(self, n: int) -> tuple[Tensor | None, ...]:
        masked = [
            None if g is None or layout is None else layout.keep_only(g, n)
            for g, layout in zip(self.grads, self.layouts, strict=True)
        ]
        # Python functions keep their backward in `apply`; calling the node is C++ only.
        call = getattr(self.node, "apply", None)
        if call is None:
            found = self.node(*masked)
            return found if isinstance(found, tuple) else (found,)
        return self._of_edges(call(*self._filled(masked)))

    def _of_edges(self, found: Any) -> tuple[Tensor | None, ...]:
        """What a Python function gives to each edge: it gives one to each argument.

        Those that are no tensors have no edge.
        """
        found = found if isinstance(found, tuple) else (found,)
        asked = zip(found, self.node.needs_input_grad, strict=False)
        wanted = iter([grad for grad, is_needed in asked if is_needed])
        return tuple(
            None if child is None else next(wanted)
            for child, _ in self.node.next_functions
        )

    def _filled(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Zeros in the place of nothing, as the engine gives Python functions."""
        metadata = self.node._input_metadata
        return [
            torch.zeros(tuple(meta.shape), dtype=meta.dtype, device=meta.device)
            if grad is None
            else grad
            for grad, meta in zip(grads, metadata, strict=True)
        ]


class _Sweep:
    """One call of a node for each sample, for the statistics of all its slots."""

    def __init__(self, universal: Universal, slots: Sequence[Slot]) -> None:
        self.universal, self.slots = universal, slots

    def _over_samples(self) -> Iterator[list[Tensor]]:
        samples = range(self.universal.batch)
        return (self.universal.of_sample(self.slots, n) for n in samples)

    @cached_property
    def sq_norms(self) -> dict[int, Tensor]:
        """Squared norms `[batch]` of each slot."""
        norms = [
            torch.stack([grad.square().sum() for grad in grads])
            for grads in self._over_samples()
        ]
        return self._by_slot(torch.stack(norms, 1).unbind())

    @cached_property
    def sums(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Sums over the samples of the gradients and of their squares."""
        found: list[tuple[Tensor, Tensor]] = []
        for grads in self._over_samples():
            if not found:
                found = [(torch.zeros_like(g), torch.zeros_like(g)) for g in grads]
            for (total, moment), grad in zip(found, grads, strict=True):
                total += grad
                moment.addcmul_(grad, grad)
        return self._by_slot(found)

    def _by_slot(self, values: Sequence[Any]) -> dict[int, Any]:
        return {s.number: v for s, v in zip(self.slots, values, strict=True)}


class _Swept(Contribution):
    """Sample gradients that are made when they are read: there are too many to hold."""

    def __init__(self, sweep: _Sweep, slot: Slot) -> None:
        self._sweep, self._slot = sweep, slot
        self.batch, self.shape = sweep.universal.batch, slot.shape

    def per_sample(self, lo: int, hi: int) -> Tensor:
        found = self._sweep.universal.samples([self._slot], lo, hi)
        return found[self._slot.number]

    def sq_norms(self) -> Tensor:
        return self._sweep.sq_norms[self._slot.number]

    def second_moment(self) -> Tensor:
        return self._sweep.sums[self._slot.number][1]

    def total(self) -> Tensor:
        return self._sweep.sums[self._slot.number][0]

    def settled(self) -> Contribution:
        # The node is gone when the parameter's other uses have been seen.
        return Materialized(self.per_sample(0, self.batch))


def _fitted(grad: Tensor | None, slot: Slot, like: Tensor) -> Tensor:
    """What the engine does with a node's result: undo broadcasting, accumulate."""
    if grad is None:
        return torch.zeros(slot.shape, dtype=like.dtype, device=like.device)
    if grad.is_sparse:
        grad = grad.to_dense()
    if tuple(grad.shape) != slot.shape:
        grad = grad.sum_to_size(slot.shape)
    return grad.to(accumulation_dtype(grad.dtype))
