"""One backward pass after another: attached, observed, collected, counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .._parameters import tracked_parameters
from .._processes import find_group
from ..statistics import GradientStatistics
from .accumulation import Accumulation
from .errors import CaptureError
from .graph.sharding import find_sharding, reshard
from .options import Options, Request, check_direction
from .ranks import Alone, Found, Ranks
from .reading.reader import Reader
from .reading.tracked import TrackedModel
from .session.attach import Attacher
from .session.states import Failed, Nothing, Pass

__all__ = ["Stepping"]


class Stepping:
    """What a probe is made of, and what it does about a pass.

    Args:
        model: a module, or parameters by name.
        options: what the probe was told.
        directions: by name, as given.
        process_group: "world", a group, or None.

    Raises:
        ValueError: as `GradientProbe`.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        options: Options,
        directions: Mapping[str, Tensor | Mapping[str, Tensor]],
        process_group: Any,
    ) -> None:
        sharded_modules = reshard(model)
        self._owned = tracked_parameters(model)  # they have .grad after a pass
        sharding = find_sharding(sharded_modules, model, self._owned)
        self._parameters = self._owned if sharding is None else sharding.whole
        self._options = options
        options.check_group(process_group)
        self._steps = Accumulation(
            options.accumulate, options.every, keep_mean=options.keep_mean
        )
        self._parameter_count = sum(p.numel() for p in self._parameters.values())
        self._given_directions = dict(directions)
        self._directions = self._checked_directions(self._parameters)
        self._model, self._process_group = model, process_group
        module = model if isinstance(model, nn.Module) else None
        tracked = TrackedModel(self._parameters, module, sharding, self._retrack)
        self._reader = Reader(tracked, options.batchnorm, options.check_every)
        self._ranks: Ranks | Alone = Alone()
        group = None if process_group is None else find_group(process_group)
        if group is not None:
            self._ranks = Ranks(
                group,
                self._parameters,
                list(self._directions),
                per_parameter=options.per_parameter,
                second_moments="second_moments" in options.measure,
                keep_mean=options.needs_mean,
                sharding=sharding,
            )
            self._ranks.check_model(model)
        self._attacher = Attacher(
            options,
            self._parameters,
            self._directions,
            self._reader,
            defer_errors=self._ranks.waits_for_others,
        )
        self._pass: Pass = Nothing()

    def __repr__(self) -> str:
        name = type(self._model).__name__
        tensors, total = len(self._parameters), self._parameter_count
        shown = f"{name}, {total} parameters in {tensors} tensors"
        directions = [f"directions={list(self._directions)}"] * bool(self._directions)
        words = "; ".join([shown, *self._options.said(), *directions])
        return f"GradientProbe({words}; {self._steps.steps} steps)"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """A copy is made anew: it has the arguments and the state, and no graphs."""
        given = self._options, self._given_directions, self._process_group
        return _made_anew, (type(self), self._model, *given), self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(state)

    def _state(self) -> dict[str, Any]:
        """What a run goes on with."""
        return {"steps": self._steps.steps, "random": self._attacher.random_state}

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._steps.restart(state["steps"])
        self._attacher.random_state = state["random"].cpu()

    def _retrack(self) -> Mapping[str, Tensor]:
        """Track the parameters that the model has now.

        Raises:
            CaptureError: where a probe cannot follow.
        """
        if not isinstance(self._model, nn.Module) or self._ranks.waits_for_others:
            raise CaptureError(
                "Parameters were added, replaced, frozen or unfrozen since this probe "
                "was made with a process_group. Make a new probe, on every rank."
            )
        tracked = tracked_parameters(self._model)
        directions = self._checked_directions(tracked)
        self._parameters.clear()
        self._parameters.update(tracked)
        self._parameter_count = sum(p.numel() for p in tracked.values())
        self._directions.clear()
        self._directions.update(directions)
        return self._parameters

    def _checked_directions(
        self, parameters: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Tensor]]:
        return {
            name: check_direction(name, v, parameters)
            for name, v in self._given_directions.items()
        }

    def _attach(self, request: Request, *, is_fresh: bool, waits: bool) -> None:
        """Hook the graph of a loss.

        Where other ranks wait for this one's gradients and message, the pass runs in
        any case, and then all of them raise.

        Args:
            request: the loss.
            is_fresh: whether `.grad` will be that of this pass alone.
            waits: whether the pass is the user's own.
        """
        self._detach()
        earlier = self._ranks.found_earlier(self._owned)
        try:
            self._pass = self._attacher.attach(request, is_fresh=is_fresh, waits=waits)
        except (CaptureError, ValueError) as error:
            if not self._ranks.waits_for_others:
                raise
            self._pass = Failed(earlier or error)
        if earlier is not None:
            self._detach()
            self._pass = Failed(earlier)

    def _collected(self) -> GradientStatistics | None:
        """What the pass brought; of a step of several, with the last of them."""
        return self._steps.add(self._ranks.collect(self._finished, self._owned))

    def _finished(self) -> Found:
        waiting, self._pass = self._pass, Nothing()
        outcome = waiting.finish()
        if not waiting.is_repeated:  # parameters may have been given another shape
            sizes = (p.numel() for p in self._parameters.values())
            self._parameter_count = sum(sizes)
        stats = outcome.statistics(
            self._options,
            self._parameters,
            self._parameter_count,
            list(self._directions),
        )
        self._attacher.note(outcome.target.loss, stats)
        return Found(stats, outcome.collected.sq_norms.keys(), outcome.factor)

    def _detach(self) -> None:
        self._pass.close()
        self._pass = Nothing()


def _made_anew(
    kind: type[Stepping], model: Any, options: Options, *others: Any
) -> Stepping:
    probe = kind.__new__(kind)
    Stepping.__init__(probe, model, options, *others)
    return probe
