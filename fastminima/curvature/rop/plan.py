"""Which steps a product takes, of all parameters or within some of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .leaves import Leaf, Leaves, Nowhere
from .steps import LeafInput, Step

__all__ = ["Plan"]


class Plan:
    """The steps that make something of some of the parameters, and their sums.

    What is made of none of them has no tangent, and no change of a gradient that goes
    there reaches any of them: those steps are left out, both ways.

    Attributes:
        active: The numbers of the steps, in order.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        parameters: Sequence[Tensor],
        only: Sequence[int],
        kind: type[Leaves],
    ) -> None:
        self._only = tuple(only)
        self._places = {index: place for place, index in enumerate(self._only)}
        self._count = len(parameters)
        self._leaves = kind([parameters[index] for index in self._only])
        self._is_active = [False] * len(steps)
        for at, step in enumerate(steps):
            self._is_active[at] = any(map(self._is_moved, step.inputs))
        self.active = [at for at, active in enumerate(self._is_active) if active]

    def within(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        """The parts of a vector, None for zero where it is about other parameters."""
        return [p if i in self._places else None for i, p in enumerate(parts)]

    def start(self) -> None:
        """New sums."""
        self._leaves.start()

    def leaves(self, step: Step) -> list[Leaf | None]:
        """Where what goes to each input of a step is added up, if not at a step."""
        return [self._leaf(source) for source in step.inputs]

    def finish(self, gradient: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """The sums; None for parameters not reached, and for others."""
        found = self._leaves.finish([gradient[i] is not None for i in self._only])
        if len(self._only) == self._count:
            return found
        sums = dict(zip(self._only, found, strict=True))
        return [sums.get(index) for index in range(self._count)]

    def _is_moved(self, source: tuple[int, int] | LeafInput | None) -> bool:
        if isinstance(source, LeafInput):
            return source.index in self._places
        return source is not None and self._is_active[source[0]]

    def _leaf(self, source: tuple[int, int] | LeafInput | None) -> Leaf | None:
        if isinstance(source, LeafInput) and self._is_moved(source):
            return Leaf(self._leaves, self._places[source.index], source.is_turned)
        if source is None or self._is_moved(source):
            return None
        return Nowhere(self._leaves, -1, is_turned=False)
