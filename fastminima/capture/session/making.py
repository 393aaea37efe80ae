"""A use, and what its step is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ..graph.nodes import ADDMM, EMBEDDING, REARRANGING
from ..graph.tape import Tape
from ..reading.plan import Slot, Use
from .called import Called, Launched

__all__ = ["Making"]

# What says whether a use is fused, by the name of its node: see `fusible.py`.
_DECIDING = {
    ADDMM: ("_saved_alpha", "_saved_beta"),
    EMBEDDING: ("_saved_scale_grad_by_freq", "_saved_sparse"),
    "IndexSelectBackward0": ("_saved_dim",),
}


@dataclass(frozen=True)
class Making:
    """One use, of which a step may be made."""

    steps: Any
    tape: Tape
    use: Use
    layout: Any
    rows: Mapping[str, int]
    dtype: torch.dtype | None
    calls: dict[int, Called]
    launched: Launched
    makes: frozenset[str]  # parameters whose gradients are made too
    parameters: Mapping[str, Tensor]

    @property
    def is_alone(self) -> bool:
        """Whether its parameters are used only here, rearranged at most.

        Norms do not change with the order of elements.
        """
        return all(_comes_alone(self.tape, slot) for slot in self.use.slots)

    @property
    def is_fused(self) -> bool:
        """Whether gradients are made of parameters that it has."""
        return not self.makes.isdisjoint(self.use.parameters)

    def by_rule(self) -> None:
        """Add a step that asks the use's rule, whatever it is."""
        node, required = self.tape.nodes[self.use.node], {}
        if self.is_fused:  # a fusion was decided by these
            names = _DECIDING.get(self.use.name, ())
            required = {name: getattr(node, name) for name in names}
        self.steps.add_by_rule(self.use.node, required)

    @property
    def is_for_kernels(self) -> bool:
        """Whether kernels on the host read its tensors."""
        (output, *_) = self.tape.nodes[self.use.node]._input_metadata
        return output.device.type == "cpu" and output.dtype == self.dtype

    def call(
        self,
        saved: Sequence[str],
        slots: Sequence[Slot | None],
        run: Callable[..., Sequence[Tensor | None]],
        required: Mapping[str, Any] = MappingProxyType({}),
        *,
        minds_sign: bool = False,
        made: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> bool:
        """Let Python take it: `run(g, *saved)` gives norms for each of the slots.

        `minds_sign`: they are others where a saved tensor has another sign. After the
        norms come the gradients that are `made`: of which parameters, in what shapes.
        """
        names = [None if slot is None else slot.paths[0].parameter for slot in slots]
        self.calls[self.use.node] = Called(
            *(run, names, made, self.rows),
            *(self.use.node, self.steps, self.launched),
        )
        self.steps.add_called(
            *(self.use.node, list(saved), minds_sign, dict(required)),
            [self._gradient(name, shape) for name, shape in made.items()],
        )
        return True

    def _gradient(self, parameter: str, shape: Sequence[int]) -> tuple[Any, ...]:
        """What is launched writes a gradient in float32, whatever the parameter is."""
        kept = self.parameters[parameter].dtype
        is_same = kept == torch.float32
        return self.rows[parameter], shape, torch.float32, None if is_same else kept

    @property
    def axis(self) -> tuple[int, int, int, int]:
        """Where the samples are."""
        layout = self.layout
        return layout.dim, layout.outer, layout.batch, layout.inner

    def slots(self, *numbers: int | None) -> dict[int, Slot] | None:
        """The slots by number; None where others take parameters."""
        slots = {slot.number: slot for slot in self.use.slots}
        return slots if slots and slots.keys() <= set(numbers) else None

    def row(self, slot: Slot | None) -> int:
        """Where the norms of the slot's parameter go; -1 where it has none."""
        return -1 if slot is None else self.rows[slot.paths[0].parameter]


def _comes_alone(tape: Tape, slot: Slot) -> bool:
    """Whether a slot takes one parameter, rearranged at most, used only here."""
    if not slot.is_alone or len(slot.paths) != 1 or slot.paths[0].steps is None:
        return False
    return all(tape.names[node] in REARRANGING for node, _, _ in slot.paths[0].steps)
