"""The rule for nodes without a rule: their backward, once per sample.

A node's backward is linear in its output gradient, so with the rows of all samples but
one set to zero it returns that sample's gradients. It costs the batch size times the
node's own backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from .contributions import Contribution, Materialized
from .errors import CaptureError
from .layout import RowLayout
from .plan import Slot

__all__ = ["Universal"]


class Universal:
    """The sample gradients of one node's inputs, by calling the node itself."""

    def __init__(
        self,
        node: Any,
        grads: Sequence[Tensor | None],
        layouts: Sequence[RowLayout | None],
        batch: int,
    ) -> None:
        self.node, self.grads, self.layouts, self.batch = node, grads, layouts, batch

    def contributions(self, slots: Sequence[Slot]) -> dict[int, Contribution]:
        """A contribution for each slot, all of one sweep over the samples."""
        samples: dict[int, list[Tensor]] = {slot.number: [] for slot in slots}
        for n in range(self.batch):
            found = self._backward_of(n)
            self._check_asked(found, slots)
            for slot in slots:
                samples[slot.number].append(
                    _fitted(found[slot.number], slot, self._any)
                )
        return {i: Materialized(torch.stack(parts)) for i, parts in samples.items()}

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


def _fitted(grad: Tensor | None, slot: Slot, like: Tensor) -> Tensor:
    """What the engine does with a node's result: undo broadcasting, accumulate."""
    if grad is None:
        return torch.zeros(slot.shape, dtype=like.dtype, device=like.device)
    if grad.is_sparse:
        grad = grad.to_dense()
    if tuple(grad.shape) != slot.shape:
        grad = grad.sum_to_size(slot.shape)
    return grad.to(accumulation_dtype(grad.dtype))
