"""Hessian products that evaluate the loss each time, and keep no graph."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ._graph import Graph, Parts, differentiate
from ._nodes import nodes_of, survey
from ._scale import norm

__all__ = ["FiniteDifferences", "ForwardOverReverse"]

Evaluate = Callable[[], tuple[Tensor, ...]]


class _Evaluated(Graph):
    """A gradient without a graph, and the loss to be evaluated again."""

    def __init__(
        self, roots: tuple[Tensor, ...], parameters: Sequence[Tensor], again: Evaluate
    ) -> None:
        self._parameters, self._again = parameters, again
        super().__init__(roots, _gradient(roots, parameters))

    def gradient(self) -> Parts:
        """The gradient."""
        return self.reached


class ForwardOverReverse(_Evaluated):
    """Products by evaluating the loss and its gradient with tangents.

    The tangent of the gradient is the product. It takes the memory of a step of
    training and of as much again for tangents, and no graph of a gradient.

    Source: Pearlmutter (1994), "Fast exact multiplication by the Hessian", who derives
    the product in this way.
    """

    def __init__(
        self,
        roots: tuple[Tensor, ...],
        parameters: Sequence[Tensor],
        model: nn.Module,
        again: Evaluate,
    ) -> None:
        super().__init__(roots, parameters, again)
        self._model = model

    def product(self, parts: list[Tensor], only: Sequence[int] | None = None) -> Parts:
        """The product with a vector, in parts; of all parameters."""
        with forward_ad.dual_level():
            pairs = zip(self._parameters, parts, strict=True)
            duals = {id(p): forward_ad.make_dual(p, part) for p, part in pairs}
            try:
                # What is checkpointed is evaluated in the backward pass.
                with _in_place_of_parameters(self._model, duals):
                    with _ConstantWithoutGrad():
                        roots = self._again()
                    self._look_at_reads(roots, duals)
                    found = _gradient(roots, self._parameters)
            except NotImplementedError as error:
                raise ValueError(
                    'engine="forward_over_reverse" met an operation without a forward '
                    f'derivative. Use engine="recompute". PyTorch says: {error}'
                ) from error
            return [
                None if part is None else forward_ad.unpack_dual(part).tangent
                for part in found
            ]

    def _look_at_reads(
        self, roots: tuple[Tensor, ...], duals: Mapping[int, Tensor]
    ) -> None:
        """ValueError where the loss read a parameter and not what stood for it."""
        own: set[Any] = {dual.grad_fn for dual in duals.values()}
        for node in nodes_of(roots):
            for below, _ in node.next_functions:
                leaf = getattr(below, "variable", None)
                if leaf is not None and id(leaf) in duals and node not in own:
                    raise ValueError(
                        "The loss reads a parameter of shape "
                        f"{tuple(leaf.shape)} from elsewhere than its model argument "
                        f"({node.name()}), where it has no tangent. Read it from the "
                        'model, or use engine="recompute".'
                    )


class FiniteDifferences(_Evaluated):
    """Central differences of gradients along a vector.

    Attributes:
        step: Length of the displacement over that of the parameters.
    """

    def __init__(
        self,
        roots: tuple[Tensor, ...],
        parameters: Sequence[Tensor],
        again: Evaluate,
        step: float | None,
    ) -> None:
        super().__init__(roots, parameters, again)
        eps = max(survey(roots).eps, *(torch.finfo(p.dtype).eps for p in parameters))
        self.step = eps ** (1 / 3) if step is None else step

    def product(self, parts: list[Tensor], only: Sequence[int] | None = None) -> Parts:
        """The product with a vector, in parts; of all parameters."""
        length = math.hypot(*(norm(part) for part in parts))
        if not length:
            return [None] * len(self._parameters)
        size = math.hypot(*(norm(p.detach()) for p in self._parameters)) or 1.0
        factor = self.step * size / length
        ends = [self._gradient_at(parts, sign * factor) for sign in (1, -1)]
        return [
            None if a is None or b is None else (a - b) / (2 * factor)
            for a, b in zip(*ends, strict=True)
        ]

    def _gradient_at(self, parts: list[Tensor], factor: float) -> Parts:
        before = [p.data for p in self._parameters]
        try:
            for p, data, part in zip(self._parameters, before, parts, strict=True):
                p.data = data + factor * part
            return _gradient(self._again(), self._parameters)
        finally:
            for p, data in zip(self._parameters, before, strict=True):
                p.data = data


class _ConstantWithoutGrad(TorchFunctionMode):
    """Within, what is computed under `no_grad` has no tangent either."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call `func`, which keeps tangents only where gradients would be recorded."""
        with forward_ad._set_fwd_grad_enabled(torch.is_grad_enabled()):
            return func(*args, **(kwargs or {}))


def _gradient(roots: tuple[Tensor, ...], parameters: Sequence[Tensor]) -> Parts:
    one = torch.ones((), dtype=roots[0].dtype, device=roots[0].device)
    return differentiate(roots, parameters, [one], create_graph=False, keep_graph=False)


@contextlib.contextmanager
def _in_place_of_parameters(model: nn.Module, duals: dict[int, Tensor]) -> Iterator:
    """Within, modules hold these tensors where they hold the parameters of that id."""
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in duals
    ]
    try:
        for module, name, parameter in places:
            module._parameters[name] = duals[id(parameter)]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter
