"""What a matrix over a model's flat parameters says of itself."""

from __future__ import annotations

import contextlib

from jaxtyping import Float
from torch import Tensor, device, dtype, nn

from .._flat import FlatLayout
from ._trust import Noise
from .derived import Algebra

__all__ = ["FlatMatrix"]


class FlatMatrix(Algebra):
    """A symmetric matrix [P, P] over the flat parameters of a model."""

    _layout: FlatLayout
    _model: nn.Module
    _products_made = 0  # that were asked for

    def __repr__(self) -> str:
        name, size = type(self).__name__, self.shape[0]
        return (
            f"{name}({size} x {size}, over the parameters of "
            f"{type(self._model).__name__}; {self.dtype} on {self.device}; "
            f"{self._products_made} products)"
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), P the number of trainable scalars."""
        return (self._layout.size, self._layout.size)

    @property
    def dtype(self) -> dtype:
        """What vectors must have; float32 for half-precision models."""
        return self._layout.dtype

    @property
    def device(self) -> device:
        """Where vectors must be."""
        return self._layout.device

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of the flat vector."""
        return self._layout.names

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many numbers each of them has."""
        return self._layout.sizes

    @property
    def noise(self) -> Noise | None:
        """What rounding may do to products; None as long as that is unknown."""
        return None

    @property
    def extra_products(self) -> int:
        """Products made so far to compare evaluations, beside those asked for."""
        return 0

    def begin(self) -> None:
        """A solver starts."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Within, nothing changes of what the matrix is made of: looked at once."""
        return contextlib.nullcontext()

    def named(self, vector: Float[Tensor, " params"]) -> dict[str, Tensor]:
        """A flat vector as tensors shaped like the parameters, by name."""
        self._check_vectors(vector)
        return self._layout.named(vector)

    def _check(self, other: Tensor) -> None:
        """ValueError for what cannot be multiplied, on all ranks."""
        self._check_vectors(other)

    def _check_vectors(self, other: Tensor) -> None:
        size, name = self.shape[0], type(self).__name__
        if not isinstance(other, Tensor):
            raise ValueError(
                f"{name} multiplies tensors, got {type(other).__name__}. Pass "
                "torch.as_tensor(v)."
            )
        if other.dim() not in (1, 2) or other.shape[0] != size:
            raise ValueError(
                f"{name} of shape {self.shape} cannot multiply a tensor of shape "
                f"{tuple(other.shape)}. Pass a vector [{size}] or a matrix [{size}, k]."
            )
        if other.dtype != self.dtype or other.device != self.device:
            raise ValueError(
                f"{name} multiplies {self.dtype} on {self.device}, got {other.dtype} "
                f"on {other.device}. Pass v.to({str(self.device)!r}, {self.dtype})."
            )
