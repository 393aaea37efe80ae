"""What waits between `attach` and `collect`, and what the pass in between brings."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CaptureError
from ..graph.passes import is_capturing
from ..graph.tape import Tape
from ..options import Target
from .arrival import Arrival, Surroundings
from .fused import Fusion
from .grouped import GroupedSession
from .hooks import Collected, Session

__all__ = ["Attached", "wait_for"]


@dataclass(eq=False)
class Attached:
    """A graph with hooks on it.

    Attributes:
        target: the loss and its samples.
        session: the hooks; None once there is a result.
        result: what was gathered, where that did not wait for the user's pass.
        factor: what a sample's part of the pass is multiplied with to be its gradient.
        chosen: numbers of the samples looked at.
        fusion: the gradients that the pass leaves out.
        error: what is wrong with the pass that came, for `collect`.
        reads_grad: whether the mean gradient is read from `.grad` later, and so cannot
            be told from what else is in the pass.
    """

    target: Target
    session: Session | GroupedSession | None
    result: Collected | None = None
    factor: float | Tensor = 1.0
    chosen: Tensor | None = None
    fusion: Fusion | None = None
    error: CaptureError | None = None
    reads_grad: bool = False
    arrival: Arrival | None = None

    def close(self) -> None:
        """Remove every hook."""
        if self.arrival is not None:
            self.arrival.remove()
        if self.session is not None:
            self.session.close()

    def finish(self) -> Collected:
        """What the pass brought; every hook is gone.

        Raises:
            CaptureError: when none came, or it cannot be told from another.
        """
        self.close_arrival()
        if self.error is not None:
            self.close()
            raise self.error
        collected = self.result
        if collected is None:
            assert self.session is not None
            collected = self.session.finish()
        if not collected.sq_norms:
            raise CaptureError(
                "No backward pass reached the graph since probe.attach(loss, ...). "
                "Call loss.backward() on that same loss before probe.collect()."
            )
        return collected

    def close_arrival(self) -> None:
        """Wait for no other pass."""
        if self.arrival is not None:
            self.arrival.remove()


def wait_for(
    attached: Attached,
    names: Mapping[int, str],
    run: Callable[[Attached], Collected],
) -> Arrival:
    """Let the pass that reaches the loss say what a sample's part of it is worth.

    Args:
        attached: what is told; it is not kept alive, or the graph would be.
        names: of the parameters, by id.
        run: a method: a pass of our own over the loss, where samples weigh
            differently.
    """
    waiting, runs = weakref.ref(attached), weakref.WeakMethod(run)

    def on_arrival(g: Tensor, around: Surroundings) -> None:
        attached, run = waiting(), runs()
        if attached is None or run is None or attached.error is not None:
            return
        try:
            _arrived(attached, names, run, g, around)
        except CaptureError as error:  # training goes on, and `collect` raises it
            attached.error = error

    return Arrival(attached.target.loss, names, on_arrival)


def _arrived(
    attached: Attached,
    names: Mapping[int, str],
    run: Callable[[Attached], Collected],
    g: Tensor,
    around: Surroundings,
) -> None:
    target = attached.target
    if not around.is_known:
        warnings.warn(
            "The call of backward that reached the attached loss cannot be seen from "
            "Python, so whether something else is in the same pass is not known. Use "
            "probe.backward(loss), or attach to the loss that is differentiated.",
            stacklevel=2,
        )
    if around.shared is not None:
        raise CaptureError(
            f"Something else than the attached loss is differentiated in the same pass "
            f"and shares {around.shared} with it, such as an auxiliary loss on the "
            "same activations: its gradient cannot be told from that of the samples. "
            "Add it to the per-sample losses before attaching, or run a backward pass "
            "for each."
        )
    if g.dim() and not (around.is_even or _is_even(g)):
        attached.result = run(attached)
        attached.factor = target.factor
        return
    if around.leaves:
        _separate(attached, names, around)
    ratio = _ratio(g, target)
    if target.scale != 1.0 and _is_close(ratio, target.scale, g.dtype):
        warnings.warn(
            f"scale={target.scale:g} is also what the loss was multiplied with after "
            "it was attached, which is seen in the gradient that arrives: it is taken "
            "out once. Leave scale= out; it is for what the loss that you pass has "
            "been multiplied with before.",
            stacklevel=2,
        )
        ratio = 1.0
    attached.factor = target.factor / ratio


def _separate(
    attached: Attached, names: Mapping[int, str], around: Surroundings
) -> None:
    """Read the gradients that something else in the pass adds to where they start."""
    session = attached.session
    if attached.reads_grad or session is None:
        raise CaptureError(
            f"Parameters {sorted(around.leaves)[:4]} also get gradients from something "
            "else in the same pass, such as a penalty on weights, and the mean "
            "gradient of the ranks is read from .grad, where they are added up. Create "
            "the probe with keep_mean=True, or leave the penalty out of this pass."
        )
    session.separate(Tape([torch._C._current_autograd_node()], names), around.leaves)


def _is_even(g: Tensor) -> bool:
    """Whether all samples weigh the same, by a look at the device."""
    if g.is_meta:
        return True
    if is_capturing(g):
        raise CaptureError(
            "The vector of losses is weighted on the way to what is differentiated, "
            "and under CUDA graph capture the weights cannot be looked at. Attach to "
            "the weighted losses."
        )
    return bool((g == g[0]).all())


def _ratio(g: Tensor, target: Target) -> float | Tensor:
    """What the loss, or the mean of a vector of losses, was multiplied with."""
    ratio = g[0] * target.samples.count if g.dim() else g
    if ratio.device.type != "cpu" and target.scale == 1.0:
        return ratio.to(torch.promote_types(ratio.dtype, torch.float32))
    if ratio.is_meta:
        return 1.0
    number = float(ratio)
    return 1.0 if _is_close(number, 1.0, g.dtype) else number


def _is_close(a: float | Tensor, b: float, dtype: torch.dtype) -> bool:
    """Whether two numbers differ by rounding; never for what is on a device."""
    return isinstance(a, float) and abs(a - b) <= 4 * torch.finfo(dtype).eps * abs(b)
