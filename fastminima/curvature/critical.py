"""Critical sharpness: the curvature that a step of training feels, by losses alone.

Along a direction u, such as the next step of an optimizer, the critical learning rate
is the least η > 0 at which L(θ - η u) > L(θ), and the critical sharpness 2 / η. On a
quadratic loss that is uᵀHu / gᵀu, which along the gradient is at most the largest
eigenvalue, and may be a small part of it. No second derivative is taken, so it can be
had under fused attention, compiled code and sharded parameters.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._flat import FlatLayout
from ._joint_loss import JointLoss
from ._random import RandomState

__all__ = ["CriticalSharpness", "critical_sharpness"]

_GROWTH = 4.0  # of the learning rate until the loss is larger, or smaller
_ROUNDING = 4.0  # units in the last place of a loss that tell nothing
_NEAR = 0.5  # share of rtol by which a guess is moved to enclose it


@dataclass(frozen=True)
class CriticalSharpness:
    """Where the loss stops to fall along a direction.

    Attributes:
        value: 2 / learning_rate.
        lower, upper: the sharpness at the two ends of the bracket: the loss is larger
            than here after a step of 2 / lower, and is not after one of 2 / upper.
        learning_rate: between the two.
        evaluations: of the loss, that at the present point included.
        converged: whether the bracket is as narrow as was asked for, and the losses at
            its ends differ by more than the rounding of their dtype.
    """

    value: float
    lower: float
    upper: float
    learning_rate: float
    evaluations: int
    converged: bool

    def __repr__(self) -> str:
        how = "" if self.converged else ", not converged"
        return (
            f"CriticalSharpness({self.value:.4g} in [{self.lower:.4g}, "
            f"{self.upper:.4g}], {self.evaluations} evaluations{how})"
        )

    def to_dict(self) -> dict[str, float]:
        """Numbers for a log line, or a row of a table."""
        return dict(vars(self))


def critical_sharpness(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batch: Any,
    direction: Tensor | Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    *,
    start: float | CriticalSharpness | None = None,
    rtol: float = 0.05,
    max_evaluations: int = 40,
    count: Callable[[Any], int] | None = None,
    process_group: Any = None,
) -> CriticalSharpness:
    """The critical sharpness along a direction, with a bracket.

    The bracket is a certificate: the loss was compared with the present one at both of
    its ends. That it encloses the *first* crossing is not: a loss that rises and falls
    again between two steps that were tried goes unseen.

    A quadratic through what is known gives the next step, so that it takes 4 to 6
    evaluations from a `start` nearby. The parameters are written in place and put back
    bit by bit, also after an exception; buffers and random generators too. So it may be
    called between a forward and a backward pass. Each
    evaluation draws the same random numbers. Of several ranks the loss is the mean over
    the samples of all (`process_group`), so all take the same way. Parameters
    under `fully_shard` stay sharded; pass their `.grad` as the direction there.

    Args:
        model: The model.
        loss: `loss(model, batch)`, a scalar: the mean over the batch.
        batch: What `loss` is given.
        direction: u, by which training subtracts η u: a flat vector [P], a mapping by
            name, or tensors in the order of the trainable parameters. The gradient if
            None, which costs a backward pass.
        start: A learning rate to try first, or what the last call gave.
        rtol: Width of the bracket, relative to its lower end.
        max_evaluations: Where to give up.
        count: Number of samples of the batch, as of `Hessian`; asked of several ranks
            alone.
        process_group: The ranks whose batches are meant, as of `Hessian`.

    Raises:
        ValueError: A loss that is not a finite scalar at the present point; a direction
            that is not finite, is zero, or is not shaped as the parameters; sharded
            parameters without a direction; an argument out of its range; a loss that
            does not grow along the direction.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> def loss(model, x):
        ...     return 4 * model(x).square().mean()  # the second derivative is 8
        >>> found = critical_sharpness(model, loss, torch.ones(1, 1))
        >>> round(found.value, 1), found.converged
        (8.0, True)

    Source: Kalra et al. (2026), "A scalable measure of loss landscape curvature for
    analyzing the training dynamics of LLMs", arXiv:2601.16979, who take 5 to 6 forward
    passes. Their relative critical sharpness is that of one loss along the gradient of
    another: pass it as `direction`.
    """
    if not rtol > 0:
        raise ValueError(f"rtol must be positive, got {rtol}.")
    if max_evaluations < 4:
        raise ValueError(f"max_evaluations must be at least 4, got {max_evaluations}.")
    _reshard(model)
    layout = FlatLayout(model)
    with _unchanged(model, layout.device) as again:
        slope = None
        joint = JointLoss(model, loss, batch, count, process_group, again)
        if direction is None:
            _refuse_sharded(layout)
            parts = joint.gradient(layout)
            slope = -_sq_norm(parts)
        else:
            parts = _parts(layout, direction)
        _check_direction(parts)
        walk = _Walk(model, joint, layout, parts)
        found = _Search(walk, slope, _first(start, parts, slope), rtol, max_evaluations)
        return found.run()


def _first(
    start: float | CriticalSharpness | None,
    parts: Sequence[Tensor],
    slope: float | None,
) -> float:
    """The learning rate to try first."""
    if isinstance(start, CriticalSharpness):
        start = start.learning_rate
    if start is None:  # a sharpness of two along the direction
        return 1.0 if slope is not None else 1 / math.sqrt(_sq_norm(parts))
    if not (start > 0 and math.isfinite(start)):
        raise ValueError(f"start must be a positive learning rate, got {start}.")
    return float(start)


def _sq_norm(parts: Sequence[Tensor]) -> float:
    return sum(_whole(part.double().square().sum()) for part in parts)


def _whole(number: Tensor) -> float:
    """A number that may be spread over ranks."""
    full: Any = getattr(number, "full_tensor", None)
    return float(number if full is None else full())


def _refuse_sharded(layout: FlatLayout) -> None:
    names = [
        name
        for name, p in zip(layout.names, layout.parameters, strict=True)
        if hasattr(p, "full_tensor")
    ]
    if names:
        raise ValueError(
            f"Gradients of sharded parameters ({names[:3]}) come by a backward pass "
            "alone: run it, and pass direction=[p.grad for p in model.parameters()]."
        )


class _Walk:
    """The loss along the direction, from where the parameters are."""

    def __init__(
        self,
        model: nn.Module,
        loss: JointLoss,
        layout: FlatLayout,
        parts: Sequence[Tensor],
    ) -> None:
        self._model, self._joint = model, loss
        self._parameters, self._parts = layout.parameters, parts
        self._here = [p.detach().clone() for p in layout.parameters]
        self.evaluations, self.unit = 0, 0.0
        loss.compare(parts)
        self.value = self._loss()
        if not math.isfinite(self.value):
            raise ValueError(
                f"The loss is {self.value} at the present point. Check the batch and "
                "the parameters."
            )

    def growth(self, eta: float) -> float:
        """How much larger the loss is after a step; infinite where it is no number."""
        with torch.no_grad():
            # Through .data: what was there comes back, so graphs of before stay valid.
            for p, here, part in zip(
                self._parameters, self._here, self._parts, strict=True
            ):
                p.data.copy_(here.to(part.dtype).sub(part, alpha=eta))
            _forget_copies(self._model)
            try:
                found = self._loss() - self.value
            finally:
                for p, here in zip(self._parameters, self._here, strict=True):
                    p.data.copy_(here)
                _forget_copies(self._model)
        return math.inf if math.isnan(found) else found

    def _loss(self) -> float:
        value = self._joint.value()
        self.evaluations += 1
        self.unit = self._joint.eps
        return value


def _forget_copies(model: nn.Module) -> None:
    """Let go of what was made from parameters before they were written.

    That is their casts in an autocast around the call, and what `fully_shard` gathered.
    """
    torch.clear_autocast_cache()
    _reshard(model)


def _reshard(model: nn.Module) -> None:
    """Let go of parameters that `fully_shard` gathered before they were written."""
    # Where it was never imported nothing can have been sharded.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        sharded: Any = module
        if isinstance(module, fsdp.FSDPModule):
            sharded.reshard()


class _Search:
    """Encloses the learning rate at which the loss has grown to what it was.

    What is divided by the step, growth / η, is a straight line on a quadratic loss,
    from the slope at zero; a line through the last two steps crosses zero where the
    next two are made, one on each side.
    """

    def __init__(
        self,
        walk: _Walk,
        slope: float | None,
        first: float,
        rtol: float,
        most: int,
    ) -> None:
        self._walk, self._rtol, self._most = walk, rtol, most
        self._next, self._low, self._high = first, 0.0, math.inf
        self._at_low = self._at_high = 0.0  # growth there
        # growth / η, by η: the last two.
        self._points: list[tuple[float, float]] = []
        if slope is not None:
            self._points.append((0.0, slope))

    def run(self) -> CriticalSharpness:
        """Until the bracket is narrow, or evaluations run out."""
        while not self._is_narrow() and self._walk.evaluations < self._most:
            eta = self._next
            growth = self._walk.growth(eta)
            if growth > 0:
                self._high, self._at_high = eta, growth
            else:
                self._low, self._at_low = eta, growth
            if math.isfinite(growth):
                self._points = [*self._points[-1:], (eta, growth / eta)]
            self._next = self._guess()
        if math.isinf(self._high):
            raise ValueError(
                f"The loss does not grow along the direction, up to {self._low:.3g} "
                "times it: there is no critical learning rate. Look at the sign of the "
                "direction: a step of training subtracts it."
            )
        return self._result()

    def _is_narrow(self) -> bool:
        return self._high <= self._low * (1 + self._rtol)

    def _guess(self) -> float:
        """The next step, within the bracket, so that it gets narrower."""
        low, high = self._low, self._high
        crossing = self._crossing()
        if crossing is not None and low < crossing < high:
            # To the side that is farther away, so that the other end comes near too.
            room = self._rtol * _NEAR
            is_near_low = low > 0 and crossing <= low * (1 + 2 * room)
            is_near_high = math.isfinite(high) and crossing >= high / (1 + 2 * room)
            if is_near_low:
                return min(low * (1 + self._rtol), math.sqrt(low * high))
            if is_near_high:
                return max(high / (1 + self._rtol), math.sqrt(low * high) if low else 0)
            if math.isinf(high) or (low > 0 and crossing / low < high / crossing):
                return min(crossing * (1 + room), math.sqrt(crossing * high))
            return crossing / (1 + room)
        if math.isinf(high):
            return low * _GROWTH
        return math.sqrt(low * high) if low > 0 else high / _GROWTH

    def _crossing(self) -> float | None:
        """Where the line through the last two points is zero."""
        if len(self._points) < 2:
            return None
        (a, at_a), (b, at_b) = self._points
        if a == b or at_a == at_b:
            return None
        crossing = a - at_a * (b - a) / (at_b - at_a)
        return crossing if crossing > 0 and math.isfinite(crossing) else None

    def _result(self) -> CriticalSharpness:
        low, high = self._low, self._high
        eta = math.sqrt(low * high) if low > 0 else high / 2
        return CriticalSharpness(
            value=2 / eta,
            lower=2 / high,
            upper=2 / low if low > 0 else math.inf,
            learning_rate=eta,
            evaluations=self._walk.evaluations,
            converged=self._is_narrow() and self._is_told(),
        )

    def _is_told(self) -> bool:
        """Whether the ends of the bracket differ by more than rounding of the loss."""
        difference = self._at_high - self._at_low
        return difference > _ROUNDING * self._walk.unit * abs(self._walk.value)


def _parts(
    layout: FlatLayout, direction: Tensor | Mapping[str, Tensor] | Sequence[Tensor]
) -> list[Tensor]:
    """A direction as tensors like the parameters."""
    if isinstance(direction, Tensor):
        if direction.shape != (layout.size,):
            raise ValueError(
                f"direction must be a vector [{layout.size}], a mapping by name or a "
                f"list of tensors, got a tensor of shape {tuple(direction.shape)}."
            )
        parts = list(torch.split(direction.detach(), list(layout.sizes)))
        return [
            part.view(p.shape) for part, p in zip(parts, layout.parameters, strict=True)
        ]
    if isinstance(direction, Mapping):
        missing = [name for name in layout.names if name not in direction]
        if missing:
            raise ValueError(f"direction lacks the parameters {missing[:5]}.")
        direction = [direction[name] for name in layout.names]
    parts = [part.detach() for part in direction]
    shapes = [tuple(p.shape) for p in layout.parameters]
    if [tuple(part.shape) for part in parts] != shapes:
        raise ValueError(
            f"direction has {len(parts)} tensors, which are not shaped as the "
            f"{len(shapes)} trainable parameters."
        )
    return parts


def _check_direction(parts: Sequence[Tensor]) -> None:
    size = max(_whole(p.abs().max()) if p.numel() else 0.0 for p in parts)
    if not (size > 0 and math.isfinite(size)):
        raise ValueError(
            f"The largest element of the direction is {size}: there is no way to go. "
            "Pass the step of training as the direction; where it is the gradient, "
            "check the batch and the parameters, or that training has not ended."
        )


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    """Leaves model and generators as they were; gives what sets generators back."""
    state = RandomState(device)
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    try:
        yield state.restore
    finally:
        for buffer, kept in buffers:
            buffer.data.copy_(kept)
        state.restore()
