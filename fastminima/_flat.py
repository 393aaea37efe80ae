"""One flat vector for the trainable parameters of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ._dtypes import accumulation_dtype
from ._parameters import check_parameter

__all__ = ["FlatLayout", "Joined", "dense_values"]


class Joined(list["Tensor | None"]):
    """Parts that lie in one flat vector already, in the order of the parameters.

    Whoever joins them is given that vector itself, so it must be nobody else's.
    """

    def __init__(self, parts: Sequence[Tensor | None], flat: Tensor) -> None:
        super().__init__(parts)
        self.flat = flat


class FlatLayout:
    """Where each trainable parameter lies in a flat vector.

    Order and names are those of `model.named_parameters()`, only parameters that
    require grad; a tied parameter appears once, under its first name. The vector's
    dtype is the accumulation dtype of the widest parameter: float32 for half-precision
    models.

    Raises:
        ValueError: No parameter requires grad, one is complex or not initialised, or
            they lie on several devices.

    Example:
        >>> from torch import nn
        >>> layout = FlatLayout(nn.Linear(3, 2))
        >>> layout.names, layout.size
        (('weight', 'bias'), 8)
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        _check(model, named)
        self.names = tuple(name for name, _ in named)
        self.parameters = tuple(parameter for _, parameter in named)
        self.sizes = tuple(p.numel() for p in self.parameters)
        self._kinds = tuple(map(_kind, self.parameters))
        self.size = sum(self.sizes)
        self.device = self.parameters[0].device
        dtype = self.parameters[0].dtype
        for parameter in self.parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        self.dtype = accumulation_dtype(dtype)

    def is_of(self, model: nn.Module) -> bool:
        """Whether the model's trainable parameters are those that lie here."""
        now = [p for p in model.parameters() if p.requires_grad]
        return (
            len(now) == len(self.parameters)
            and all(p is q for p, q in zip(now, self.parameters, strict=True))
            and tuple(map(_kind, now)) == self._kinds
        )

    def following(self, model: nn.Module) -> FlatLayout:
        """The layout of parameters put in the place of these, alike in all but values.

        Raises:
            ValueError: Vectors would mean something else: a parameter was frozen,
                added or removed, or has another shape, dtype or device.
        """
        now = FlatLayout(model)
        before = dict(zip(self.names, self._kinds, strict=True))
        after = dict(zip(now.names, now._kinds, strict=True))
        if list(before.items()) == list(after.items()):
            return now
        changes = [
            f"{name!r} {_change(before.get(name), after.get(name))}"
            for name in {**before, **after}
            if before.get(name) != after.get(name)
        ]
        shown = ", ".join(changes[:5] or ["their order"])
        raise ValueError(
            f"The model's trainable parameters have changed since the operator was "
            f"made: {shown} ({len(changes)} in all). Its vectors would mean something "
            "else: make a new operator."
        )

    def split(self, vector: Float[Tensor, " params"]) -> list[Tensor]:
        """The parts of a flat vector, shaped and typed as the parameters."""
        parts = torch.split(vector, list(self.sizes))
        return [
            part.view(p.shape).to(p.dtype)
            for part, p in zip(parts, self.parameters, strict=True)
        ]

    def join(
        self,
        parts: Sequence[Tensor | None],
        out: Float[Tensor, " params"] | None = None,
    ) -> Float[Tensor, " params"]:
        """The flat vector of tensors shaped as the parameters; None counts as zeros.

        Written into `out` where given.
        """
        if isinstance(parts, Joined) and parts.flat.dtype == self.dtype:
            return parts.flat if out is None else out.copy_(parts.flat)
        flat = [
            torch.zeros(size, dtype=self.dtype, device=self.device)
            if part is None
            else part.detach().reshape(-1).to(self.dtype)
            for part, size in zip(parts, self.sizes, strict=True)
        ]
        return torch.cat(flat) if out is None else torch.cat(flat, out=out)

    def named(self, vector: Float[Tensor, " params"]) -> dict[str, Tensor]:
        """The parts of a flat vector under the parameters' names."""
        return dict(zip(self.names, self.split(vector), strict=True))


_Kind = tuple[torch.Size, torch.dtype, torch.device]


def _kind(parameter: Tensor) -> _Kind:
    return parameter.shape, parameter.dtype, parameter.device


def _change(before: _Kind | None, after: _Kind | None) -> str:
    if after is None:
        return "was frozen or removed"
    if before is None:
        return "was added or set to require grad"
    shown = [
        f"{tuple(shape)} {dtype} {device}" for shape, dtype, device in (before, after)
    ]
    return f"went from {shown[0]} to {shown[1]}"


def _check(model: nn.Module, named: list[tuple[str, nn.Parameter]]) -> None:
    if not named:
        total = sum(1 for _ in model.parameters())
        raise ValueError(
            f"The model has no trainable parameters: 0 of its {total} parameters "
            "require grad. Call requires_grad_() on those to differentiate by."
        )
    for name, parameter in named:
        check_parameter(name, parameter, "curvature is")
    devices = sorted({str(parameter.device) for _, parameter in named})
    if len(devices) > 1:
        raise ValueError(
            f"Trainable parameters lie on {len(devices)} devices, {devices}; a flat "
            "vector needs one. Move the model to one device, or freeze the rest."
        )


def dense_values(grad: Tensor) -> Tensor:
    """A dense tensor with the elements of a gradient that may be sparse."""
    if grad.layout == torch.strided:
        return grad
    return grad.coalesce().values() if grad.is_sparse else grad.to_dense()
