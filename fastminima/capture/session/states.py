"""What stands between the attaching of a graph and the collecting of its statistics.

    Nothing    no graph is attached
    Resting    the step is one of those that `every` leaves out
    Observed   hooks wait for the pass
    Frozen     a pass of our own has run, with batch statistics as constants
    Failed     what is wrong, for when all ranks raise together

A probe holds one of them and replaces it whole; none is half one and half another.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._dtypes import accumulation_dtype
from ...statistics import GradientStatistics
from ..errors import CaptureError
from ..graph.node import current_node
from ..graph.passes import is_capturing
from ..graph.tape import Tape
from ..options import Options, Target
from .arrival import Arrival, Surroundings
from .collector import Collected
from .fused import Fusion
from .hooks import Observer, Session

__all__ = ["Failed", "Frozen", "Nothing", "Observed", "Outcome", "Pass", "Resting"]


class Outcome(NamedTuple):
    """What one pass brought.

    Attributes:
        collected: in units of the pass' gradient.
        target: the loss and its samples.
        factor: what a sample's part of the pass is multiplied with to be its gradient.
        chosen: numbers of the samples that were looked at; None for all.
    """

    collected: Collected
    target: Target
    factor: float | Tensor
    chosen: Tensor | None

    def statistics(
        self,
        options: Options,
        parameters: Mapping[str, Tensor],
        parameter_count: int,
        directions: Sequence[str],
    ) -> GradientStatistics:
        """From sums over one backward pass to statistics of g_n = factor * its part.

        Everything by parameter is in the order of `parameters`, whose elements are
        `parameter_count`.
        """
        collected, factor = self.collected, self.factor
        batch = self.target.samples.count
        count = batch if self.chosen is None else len(self.chosen)
        norms = collected.sq_norms.total(parameters)
        to_mean = factor / batch
        # Where ranks join without the mean nothing was read: it is in .grad by then.
        parts = collected.grad_sq_norms or [norms.new_zeros(())]
        total = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
        by_parameter = squares = moments = mean = None
        if options.per_parameter:
            each = collected.sq_norms.rows(parameters)
            by_parameter = _scaled(*each, factor**2, norms.dtype)
            each = collected.grad_sq_norms_by_parameter.rows(parameters)
            squares = _scaled(*each, to_mean**2, total.dtype)
        if "second_moments" in options.measure:
            moments = {
                name: t.mul_(factor**2 / count)  # made for this pass alone
                for name, t in _in_order(collected.second_moments, parameters).items()
            }
        if options.needs_mean:
            mean = {
                name: t.to(accumulation_dtype(t.dtype)) * to_mean
                for name, t in _in_order(collected.grads, parameters).items()
            }
        return GradientStatistics(
            count=count,
            parameter_count=parameter_count,
            sq_norms=norms * factor**2,
            mean_grad_sq_norm=total * to_mean**2,
            sq_norms_by_parameter=by_parameter,
            mean_grad_sq_norms_by_parameter=squares,
            second_moments=moments,
            gram=None if collected.gram is None else collected.gram * factor**2,
            dots={
                name: collected.dots[name] * factor
                if name in collected.dots
                else norms.new_zeros(count)  # it names only what was not reached
                for name in directions
            },
            mean_grad=mean,
            mean_count=None if self.chosen is None else batch,
            samples=self.chosen,
        )


def _in_order(
    found: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """By parameter in the order of the model, whatever the order of arrival."""
    return {name: found[name] for name in parameters if name in found}


def _scaled(
    names: Sequence[str], rows: Tensor, factor: float | Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Numbers of parameters, multiplied together: rows of one tensor."""
    return dict(zip(names, (rows * factor).to(dtype).unbind(), strict=True))


class Pass:
    """One backward pass, from attaching to collecting; an interface."""

    error: Exception | None = None  # what is known to be wrong before the pass runs
    is_repeated = False  # sizes were compared, and are those of the last pass

    @property
    def inputs(self) -> list[Any] | None:
        """For `backward(inputs=...)`: where the pass has to go; None for all leaves."""
        return None

    def read_gradients(self) -> None:
        """Note the gradients of the pass, all there is in `.grad` now."""

    def deliver(self) -> None:
        """Give parameters the gradients that the pass left out."""

    def finish(self) -> Outcome:
        """What the pass brought; every hook is gone.

        Raises:
            CaptureError: when none came, or it cannot be told from another.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Remove every hook."""


class Nothing(Pass):
    """No graph is attached."""

    def finish(self) -> Outcome:
        raise CaptureError(
            "Nothing is attached to this probe; call probe.attach(loss, ...) "
            "before the backward pass and probe.collect() once after it."
        )


class Resting(Nothing):
    """The step is left out: the pass runs without being looked at."""


class Failed(Pass):
    """Something is wrong, and the pass runs in any case: other ranks wait for it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def finish(self) -> Outcome:
        assert self.error is not None
        raise self.error


class Frozen(Pass):
    """A pass of our own has brought the statistics already."""

    def __init__(
        self, collected: Collected, target: Target, chosen: Tensor | None
    ) -> None:
        self._outcome = Outcome(collected, target, target.factor, chosen)

    def finish(self) -> Outcome:
        return self._outcome


class Observed(Pass):
    """Hooks on a graph wait for the pass that runs through it.

    Args:
        target: the loss and its samples.
        chosen: numbers of the samples looked at; None for all.
        reads_grad: whether the mean gradient is read from `.grad` later, and so cannot
            be told from what else is in the pass.
    """

    def __init__(
        self, target: Target, chosen: Tensor | None, *, reads_grad: bool
    ) -> None:
        self._target, self._chosen = target, chosen
        self._factor: float | Tensor = target.factor
        self._reads_grad = reads_grad
        self._result: Collected | None = None  # where the user's pass does not serve
        self._wrong: CaptureError | None = None  # with the pass that came
        self.observer: Observer | None = None
        self.arrival: Arrival | None = None
        self.fusion: Fusion | None = None

    @property
    def inputs(self) -> list[Any] | None:
        return None if self.fusion is None else self.fusion.inputs

    def read_gradients(self) -> None:
        if self._result is None and self.observer is not None:
            self.observer.read_gradients()

    def deliver(self) -> None:
        if self.fusion is not None:
            assert isinstance(self.observer, Session)
            self.observer.complete()
            self.fusion.deliver()

    def close(self) -> None:
        if self.arrival is not None:
            self.arrival.remove()
        if self.fusion is not None:
            self.fusion.close()
        if self.observer is not None:
            self.observer.close()

    def finish(self) -> Outcome:
        if self.arrival is not None:
            self.arrival.remove()
        if self._wrong is not None:
            self.close()
            raise self._wrong
        collected = self._result
        if collected is None:
            assert self.observer is not None
            collected = self.observer.finish()
        if self.fusion is not None:
            self.fusion.close()
        if not collected.sq_norms:
            raise CaptureError(
                "No backward pass reached the graph since probe.attach(loss, ...). "
                "Call loss.backward() on that same loss before probe.collect()."
            )
        return Outcome(collected, self._target, self._factor, self._chosen)

    def wait(
        self,
        names: Mapping[int, str],
        run: Callable[[Observer, Target], Collected],
    ) -> None:
        """Let the pass that reaches the loss say what a sample's part of it is worth.

        Args:
            names: of the parameters, by id.
            run: a method: a pass of our own over the loss, where the samples of the
                user's weigh differently.
        """
        # Neither is kept alive by the graph, which hooks on it would do.
        waiting, runs = weakref.ref(self), weakref.WeakMethod(run)

        def on_arrival(g: Tensor, around: Surroundings) -> None:
            observed, run = waiting(), runs()
            if observed is None or run is None or observed._wrong is not None:
                return
            try:
                observed._arrived(names, run, g, around)
            except CaptureError as error:  # training goes on, and `collect` raises it
                observed._wrong = error

        self.arrival = Arrival(self._target.loss, names, on_arrival)

    def _arrived(
        self,
        names: Mapping[int, str],
        run: Callable[[Observer, Target], Collected],
        g: Tensor,
        around: Surroundings,
    ) -> None:
        target = self._target
        if not around.is_known:
            warnings.warn(
                "The call of backward that reached the attached loss cannot be seen "
                "from Python, so whether something else is in the same pass is not "
                "known. Use probe.backward(loss), or attach to the loss that is "
                "differentiated.",
                stacklevel=2,
            )
        if around.shared is not None:
            raise CaptureError(
                "Something else than the attached loss is differentiated in the same "
                f"pass and shares {around.shared} with it, such as an auxiliary loss "
                "on the same activations: its gradient cannot be told from that of "
                "the samples. Add it to the per-sample losses before attaching, or run "
                "a backward pass for each."
            )
        if g.dim() and not (around.is_even or _is_even(g)):
            assert self.observer is not None
            self._result = run(self.observer, target)
            self._factor = target.factor
            return
        if around.leaves:
            self._separate(names, around)
        ratio = _ratio(g, target)
        if target.scale != 1.0 and _is_close(ratio, target.scale, g.dtype):
            warnings.warn(
                f"scale={target.scale:g} is also what the loss was multiplied with "
                "after it was attached, which is seen in the gradient that arrives: it "
                "is taken out once. Leave scale= out; it is for what the loss that you "
                "pass has been multiplied with before.",
                stacklevel=2,
            )
            ratio = 1.0
        if isinstance(ratio, float) and ratio == 0.0:
            raise CaptureError(
                "The attached loss was multiplied by zero before it was "
                "differentiated, so no gradient of a sample is left in the pass. Leave "
                "this step out: probe.detach()."
            )
        self._factor = target.factor / ratio

    def _separate(self, names: Mapping[int, str], around: Surroundings) -> None:
        """Read gradients that something else in the pass adds to where they start."""
        if self._reads_grad or self.observer is None:
            raise CaptureError(
                f"Parameters {sorted(around.leaves)[:4]} also get gradients from "
                "something else in the same pass, such as a penalty on weights, and "
                "the mean gradient of the ranks is read from .grad, where they are "
                "added up. Create the probe with keep_mean=True, or leave the penalty "
                "out of this pass."
            )
        tape = Tape([current_node()], names)
        self.observer.separate(tape, around.leaves)


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
