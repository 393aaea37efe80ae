"""A loss by itself: of one batch, or of the batches of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._flat import FlatLayout
from ._data import Batches
from ._ranks import Ranks, Said, ranks_of
from ._replicas import without_reducers
from ._same import fingerprint
from ._shards import is_sharded, sharded_group

__all__ = ["JointLoss"]


class JointLoss:
    """The mean loss at the present point, the same number on all ranks.

    Args:
        model: The model.
        loss: `loss(model, batch)`, a scalar.
        batch: What it is given.
        count: Number of samples of the batch; the leading size of its tensors if None.
        process_group: As of `Hessian`.
        again: Sets the random generators back.

    Attributes:
        eps: Machine precision of the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        batch: Any,
        count: Callable[[Any], int] | None,
        process_group: Any,
        again: Callable[[], None],
    ) -> None:
        self._model, self._loss, self._batch = model, loss, batch
        self._count, self._again = count, again
        group = process_group or sharded_group(model)
        self._ranks: Ranks | None = ranks_of(model, group, None)
        self._prints = 0, 0
        self.eps = 0.0

    def compare(self, directions: Sequence[Tensor]) -> None:
        """See, with the next loss, that the ranks have one point and one direction."""
        if self._ranks is not None:
            parameters = list(self._model.parameters())
            self._prints = tuple(
                fingerprint([t for t in tensors if not is_sharded(t)])
                for tensors in (directions, parameters)
            )

    def value(self) -> float:
        """The loss.

        Raises:
            ValueError: It is not a scalar; ranks have different parameters.
        """
        if self._ranks is None:
            return self._own_value()
        like = self._double()
        with self._ranks.together(like, 1):
            value = self._own_value()
            said = Said(weight=self._weight(), columns=self._prints[0])
            said.parameters = self._prints[1]
        self._prints = 0, 0
        (joint,), _ = self._ranks.mean([like.new_full((1,), value)], said)
        return float(joint)

    def gradient(self, layout: FlatLayout) -> list[Tensor]:
        """Its gradient, in tensors like the parameters."""
        if self._ranks is None:
            return self._own_gradient(layout)
        like = torch.zeros((), dtype=layout.dtype, device=layout.device)
        with self._ranks.together(like, layout.size):
            flat = layout.join(self._own_gradient(layout))
            said = Said(weight=self._weight())
        (joint,), _ = self._ranks.mean([flat], said)
        return layout.split(joint)

    def _double(self) -> Tensor:
        device = next(self._model.parameters()).device
        return torch.zeros((), dtype=torch.float64, device=device)

    def _weight(self) -> int:
        return Batches([self._batch], self._count).weight(self._batch)

    def _evaluate(self) -> Tensor:
        self._again()
        with without_reducers(self._model):
            found = self._loss(self._model, self._batch)
        if not isinstance(found, Tensor) or found.numel() != 1:
            is_tensor = isinstance(found, Tensor)
            met = tuple(found.shape) if is_tensor else type(found).__name__
            raise ValueError(f"loss(model, batch) must be a scalar, got {met}.")
        return found

    def _own_value(self) -> float:
        with torch.no_grad():
            found = self._evaluate()
        self.eps = torch.finfo(found.dtype).eps
        return float(found.detach().double())

    def _own_gradient(self, layout: FlatLayout) -> list[Tensor]:
        with torch.enable_grad():
            found = self._evaluate()
            if not found.requires_grad:
                raise ValueError("The loss does not depend on the parameters.")
            grads = torch.autograd.grad(found, layout.parameters, allow_unused=True)
        return [
            torch.zeros_like(p) if g is None else g.detach()
            for p, g in zip(layout.parameters, grads, strict=True)
        ]
