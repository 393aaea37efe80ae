"""From the loss of a step to the pass that is observed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from ...statistics import GradientStatistics
from ..errors import explaining
from ..graph.passes import run_pass
from ..graph.saved import frames_of
from ..graph.tape import Tape
from ..options import Options, Request, Target
from ..reading import mixing
from ..reading.jumps import Jumps
from ..reading.reader import Reader, Reading
from ..rows.samples import Segments
from .arrival import Arrival
from .collector import Collected, Collector, FusedCollector
from .fused import Fusion, find_fusion
from .grouped import GroupedSession
from .hooks import Observer, Session
from .program import program_of
from .repeat import Repeat, new_repeat
from .states import Frozen, Observed, Pass
from .timed import TimedCollector, TimedSession, stop_watch

__all__ = ["Attacher"]


class Attacher:
    """Reads graphs, and puts hooks on them.

    Args:
        options: of the probe.
        parameters, directions: by name; what they hold may change.
        reader: of the model's graphs.
        defer_errors: whether other ranks wait for this one's gradients.
    """

    def __init__(
        self,
        options: Options,
        parameters: Mapping[str, Tensor],
        directions: Mapping[str, Mapping[str, Tensor]],
        reader: Reader,
        *,
        defer_errors: bool,
    ) -> None:
        self._options, self._reader = options, reader
        self._parameters, self._directions = parameters, directions
        self._defer_errors = defer_errors
        # Never the user's.
        self._generator = torch.Generator(device="cpu").manual_seed(0)
        self._jumps = Jumps()
        self._announced: set[str] = set()
        self._repeat: Repeat | None = None
        self._may_repeat = (
            options.measure == {"norms"}
            and options.sample is None
            and not (options.needs_mean or directions)
            and not defer_errors
        )

    @property
    def random_state(self) -> Tensor:
        """Of the generator that `sample` draws with."""
        return self._generator.get_state()

    @random_state.setter
    def random_state(self, state: Tensor) -> None:
        self._generator.set_state(state)

    def note(self, loss: Tensor, stats: GradientStatistics) -> None:
        """Keep what a step brought, by which a jump is told."""
        self._jumps.note(loss, stats)

    def timed_session(self, reading: Reading, count: int) -> TimedSession:
        """One with a stop-watch, for an audit."""
        return TimedSession(
            reading,
            self._parameters,
            count,
            TimedCollector(stop_watch(p.device for p in self._parameters.values())),
            hook_gradients=False,
            announce=self.announce,
            defer_errors=self._defer_errors,
        )

    def attach(self, request: Request, *, is_fresh: bool, waits: bool) -> Pass:
        """Hook the graph of a loss, or run a pass of its own where that is needed.

        Args:
            request: the loss.
            is_fresh: whether `.grad` will be that of this pass alone.
            waits: whether the pass is the user's own.

        Raises:
            CaptureError: for a graph that cannot be read exactly.
            ValueError: for a request that does not make sense.
        """
        loss = request.loss
        self._reader.is_suspicious = self._jumps.is_suspicious(loss)
        if is_fresh and self._repeat is not None and not self._reader.is_suspicious:
            repeated = self._repeat.attach(request, self._reader.names)
            if repeated is not None:
                return repeated
        self._repeat = None
        try:
            target = request.checked(self._options.batch_dim)
        except ValueError:
            self._reader.accompany(loss)
            raise
        with explaining():
            reading = self._reader.read(loss, target.samples)
            chosen = self._chosen(target.samples.count)
            if chosen is not None:
                reading = reading.choosing(chosen)
            if reading.mixing and self._options.batchnorm == "frozen":
                return Frozen(self._frozen_pass(reading, target), target, chosen)
        # Ranks that join without the mean find it in .grad, when all have reduced it.
        hooks = not is_fresh
        if self._defer_errors:
            hooks = self._options.needs_mean
        observed = Observed(target, chosen, reads_grad=not hooks)
        try:
            if waits:
                observed.wait(self._reader.names, self._even_pass)
            self._observe(observed, reading, target, chosen, hook_gradients=hooks)
        except BaseException:
            observed.close()
            raise
        if is_fresh and self._may_repeat:
            fusion = observed.fusion
            makes = frozenset() if fusion is None else fusion.names
            self._repeat = new_repeat(
                self._reader.known(reading),
                program_of(reading, self._parameters, makes),
                *(target, self._parameters, self.announce),
                None if fusion is None else fusion.plan,
                by_parameter=self._options.per_parameter,
            )
        return observed

    def _observe(
        self,
        observed: Observed,
        reading: Reading,
        target: Target,
        chosen: Tensor | None,
        *,
        hook_gradients: bool,
    ) -> None:
        """Put hooks on a graph that is understood."""
        count = target.samples.count if chosen is None else len(chosen)
        groups = None
        if isinstance(target.samples, Segments) and "gram" not in self._options.measure:
            groups = target.samples.groups(chosen)
        if groups is not None:
            session = partial(self.session, arrival=observed.arrival, owner=groups)
            observed.observer = GroupedSession.of(
                groups,
                count,
                lambda group, is_first: session(
                    reading.choosing(group),
                    len(group),
                    self.collector(),
                    hook_gradients=hook_gradients and is_first,
                ),
            )
            return
        if self._options.is_fused:
            observed.fusion = find_fusion(
                *(reading, self._parameters),
                with_moments="second_moments" in self._options.measure,
            )
        observed.observer = self.session(
            reading,
            count,
            self.collector(observed.fusion),
            hook_gradients=hook_gradients,
            arrival=observed.arrival,
        )

    def _chosen(self, count: int) -> Tensor | None:
        """Numbers of the samples to look at; None for all of them."""
        sample = self._options.sample
        if sample is None or sample >= count:
            return None
        order = torch.randperm(count, generator=self._generator, device="cpu")
        return order[:sample].sort().values

    def collector(self, fusion: Fusion | None = None) -> Collector:
        """Takes what the options ask for."""
        measure, asked = self._options.measure, self._options
        keep, by_parameter = asked.needs_mean, asked.per_parameter
        if fusion is None:
            return Collector(
                measure, self._directions, keep_grads=keep, by_parameter=by_parameter
            )
        return FusedCollector(
            *(measure, self._directions, fusion),
            keep_grads=keep,
            by_parameter=by_parameter,
        )

    def session(
        self,
        reading: Reading,
        count: int,
        collector: Collector,
        *,
        hook_gradients: bool = False,
        arrival: Arrival | None = None,
        owner: object = None,
    ) -> Session:
        """Hooks on a graph that is understood, for some of its samples or all."""
        return Session(
            reading,
            self._parameters,
            count,
            collector,
            hook_gradients=hook_gradients,
            announce=self.announce,
            defer_errors=self._defer_errors,
            makes=self._options.is_fused,
            arrival=arrival,
            owner=owner,
        )

    def _frozen_pass(self, reading: Reading, target: Target) -> Collected:
        """A pass of its own in which batch normalisation keeps its statistics."""
        count = target.samples.count
        if self._options.sample is not None:
            count = min(count, self._options.sample)
        session = self.session(reading, count, self.collector())
        handles = mixing.freeze(reading.tape, reading.mixing)
        try:
            return self._own_pass(session, target, reading.tape)
        finally:
            session.close()
            for handle in handles:
                handle.remove()

    def _even_pass(self, observer: Observer, target: Target) -> Collected:
        """A pass of its own in which all samples weigh the same.

        It runs inside the user's, whose gradients are those of weighted samples.
        """
        assert target.loss.grad_fn is not None
        try:
            tape = Tape([target.loss.grad_fn], self._reader.names)
            return self._own_pass(observer, target, tape)
        finally:
            observer.close()

    def _own_pass(self, observer: Observer, target: Target, tape: Tape) -> Collected:
        """What is seen in an extra pass over the loss, or its mean."""
        loss = target.loss
        names = list(tape.leaves)
        with self._reader.extra_passes(tape):
            grads = run_pass(
                loss,
                [self._parameters[name] for name in names],
                observer.owner,
                torch.full_like(loss, 1 / len(loss)) if loss.dim() else None,
                frames_of(tape.nodes),
            )
        found = zip(names, grads, strict=True)
        observer.take_gradients({name: g for name, g in found if g is not None})
        return observer.finish()

    def announce(self, node: str, parameters: Sequence[str]) -> None:
        """Say once for each kind of node that it is read by the universal rule."""
        if node not in self._announced:
            self._announced.add(node)
            shown = ", ".join(repr(p) for p in parameters[:4])
            warnings.warn(
                f"No rule for {node} (parameters {shown}): its backward runs once per "
                "sample. The statistics are exact; this layer costs more.",
                stacklevel=2,
            )
