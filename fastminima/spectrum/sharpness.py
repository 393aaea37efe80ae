"""The sharpness along a training run, each time from the last eigenvectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..curvature import Hessian, Noise
from .eigenpairs import top_eigenpairs
from .results import Eigenpairs

__all__ = ["SharpnessProbe"]

# Cold runs go to this share of the tolerance: the next ones then start within it.
_SPARE = 0.5
_CHECK_EVERY = 50  # calls between looks at whether the loss has one Hessian


class SharpnessProbe:
    """The largest eigenvalues of the Hessian, step after step of a training run.

    The first call runs cold, from the gradient and a random part; later ones start from
    the vectors of the last, with a fresh random part, and take a few products. An
    eigenvector that overtakes far from the known ones could go unnoticed for some
    calls; therefore every `cold_every`-th call is cold again.

    That the loss has one symmetric Hessian is looked at as `Hessian` does, in the first
    call, in every 50th, and when the kind of data or a module's mode is another; the
    calls between pay nothing for it but two dot products.

    Args:
        model: The model.
        loss: `loss(model, batch)`, a scalar: the mean over the batch.
        k: How many eigenpairs.
        rtol: Tolerance of the residuals, as in `top_eigenpairs`.
        cold_every: Calls between cold starts; 1 makes all of them cold.
        max_products: Where a call gives up, with a warning.
        count: Number of samples of a batch, as for `Hessian`.
        seed: Of the random parts; global generators are not touched.

    Raises:
        ValueError: As `Hessian` and `top_eigenpairs`, at the call.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> def loss(model, x):
        ...     return model(x).square().mean()
        >>> sharpness = SharpnessProbe(model, loss)
        >>> pairs = sharpness(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        >>> round(float(pairs.values[0]), 3)
        9.0
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        k: int = 1,
        rtol: float = 1e-2,
        *,
        cold_every: int = 50,
        max_products: int = 200,
        count: Callable[[Any], int] | None = None,
        seed: int = 0,
    ) -> None:
        if cold_every < 1:
            raise ValueError(f"cold_every must be at least 1, got {cold_every}.")
        self._model, self._loss, self._count = model, loss, count
        self._k, self._rtol, self._max_products = k, rtol, max_products
        self._cold_every, self._seed = cold_every, seed
        self._calls = 0
        self._vectors: Tensor | None = None
        self._noise: Noise | None = None
        self._checked: tuple[Any, ...] | None = None
        self._data: Any = None

    def __call__(self, batch: Any) -> Eigenpairs:
        """The eigenpairs on a batch (or several) at the present point."""
        operator = Hessian(self._model, self._loss, batch, self._count)
        kind = self._kind(batch)
        is_known = kind == self._checked and (kind[1] or batch is self._data)
        if is_known and self._calls % _CHECK_EVERY:
            operator.trust(self._noise)
        start = self._vectors
        is_cold = self._calls % self._cold_every == 0
        if is_cold or start is None or start.shape[1] != operator.shape[0]:
            start = None
        pairs = top_eigenpairs(
            operator,
            self._k,
            rtol=self._rtol * (_SPARE if start is None else 1.0),
            max_products=self._max_products,
            start=start,
            seed=self._seed + self._calls,
        )
        self._vectors = pairs.vectors
        self._noise, self._checked = operator.noise, kind
        self._data = None if kind[1] else batch
        self._calls += 1
        return pairs

    def reset(self) -> None:
        """Forget the vectors: the next call runs cold, and is checked."""
        self._vectors, self._checked = None, None

    def _kind(self, batch: Any) -> tuple[Any, ...]:
        """What is checked anew when it is another: not the values of batches."""
        modes = [module.training for module in self._model.modules()]
        return type(batch), isinstance(batch, Tensor | Mapping | tuple | list), modes
