"""Records the graph of each batch, and keeps that of a single one."""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._flat import FlatLayout
from ._checks import Checks
from ._data import Batches
from ._explained import explained
from ._functions import look_at_functions
from ._graph import Graph
from ._guard import differentiable, parameters_kept, unchanged
from ._nodes import survey
from ._random import RandomState
from ._ranks import Ranks, ranks_of
from ._replicas import without_reducers
from ._rewrites import Rewrites
from ._shards import Shards, local, shards_of
from ._state import Snapshot

__all__ = ["Recorder"]


@dataclass
class _Kept:
    """The graph of a single batch, and what it was recorded from."""

    graph: Any
    weight: int
    snapshot: Snapshot
    uses: int = 0


class Recorder(abc.ABC):
    """The graphs of a model's loss over the data, under checks.

    What a subclass says is how closures are called (`_evaluate`) and how a graph is
    made ready for products (`_make`).
    """

    def __init__(
        self,
        model: nn.Module,
        closures: Sequence[Callable[..., Any]],
        data: Any,
        count: Callable[[Any], int] | None,
        process_group: Any = None,
    ) -> None:
        self._model = model
        self._closures = tuple(closures)
        self._shards: Shards | None = shards_of(model)
        self._ranks: Ranks | None = ranks_of(model, process_group, self._shards)
        with self._whole():
            self._layout = FlatLayout(model)
        self._batches = Batches(data, count)
        self._random = self._generators()
        self._checks = Checks(type(self).__name__, model)
        self._kept: _Kept | None = None
        self._fresh: tuple[Graph, int] | None = None
        self._is_held = False
        self._compared: _Kept | None = None  # while held, the graph that is current
        self._rewrites = Rewrites()
        self._low: torch.dtype | None = None  # what products of matrices are rounded to

    def rough(self, dtype: torch.dtype = torch.bfloat16) -> Recorder:
        """The same operator with closures under autocast to a half precision.

        Its products are cheaper where there is hardware for them, and off by some
        percent: good for finding vectors, not for saying what they are.
        """
        twin = copy.copy(self)
        twin._checks = Checks(type(self).__name__, self._model)
        twin._kept, twin._low = None, dtype
        return twin

    @abc.abstractmethod
    def _evaluate(self, batch: Any) -> tuple[Tensor, ...]:
        """What the closures return: the first by the model, the last the loss."""

    @abc.abstractmethod
    def _make(self, roots: tuple[Tensor, ...]) -> Graph:
        """The graph of what `_evaluate` returned, ready for products."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, nothing changes of what a graph is recorded from.

        A kept graph is compared once in place of before each product. For what makes
        many products in one call.
        """
        before, self._is_held, self._compared = self._is_held, True, None
        try:
            yield
        finally:
            self._is_held, self._compared = before, None

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[Iterator[tuple[Any, int]]]:
        """Within, each batch's recorded graph with its number of samples."""
        self._is_kept()
        with self._bare() if self._is_settled else self._context():
            try:
                yield self._recordings()
                fresh = self._fresh
            finally:
                self._fresh = None
        if fresh is not None:
            batch, _ = next(iter(self._batches))
            snapshot = Snapshot(self._model, batch, self._closures)
            self._kept = _Kept(*fresh, snapshot)

    @contextlib.contextmanager
    def _context(self) -> Iterator[None]:
        """Where closures run: nothing remains changed, everything is recorded."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._whole())
            self._follow_parameters()
            named = list(self._model.named_parameters())
            stack.enter_context(unchanged(self._model, self._generators()))
            stack.enter_context(without_reducers(self._model))
            if self._checks.noise is None:
                stack.enter_context(parameters_kept(named, self._closure))
            self._rewrites = stack.enter_context(differentiable(self._layout.device))
            yield

    @property
    def _is_settled(self) -> bool:
        """Whether the next pass is through a graph that calls nothing of the user's."""
        kept = self._kept
        if kept is None or kept is not self._compared:
            return False
        return not kept.graph.calls_closures

    @contextlib.contextmanager
    def _bare(self) -> Iterator[None]:
        """Where nothing of the user's runs: as `_context` for derivatives alone."""
        with (
            torch.inference_mode(False),
            torch.autocast(self._layout.device.type, enabled=False),
        ):
            yield

    def _whole(self) -> contextlib.AbstractContextManager[None]:
        """Where the model has whole parameters, if ranks hold shards of them."""
        return (
            contextlib.nullcontext() if self._shards is None else self._shards.whole()
        )

    def _recordings(self) -> Iterator[tuple[Any, int]]:
        self._checks.start_pass()
        if self._kept is not None:
            graph, weight = self._kept.graph, self._kept.weight
            self._note(graph, weight)
            yield graph, weight
            return
        self._random.restore()
        for batch, weight in self._batches:
            if self._batches.is_single:
                graph = self._record(batch, weight)
                if self._keeps(graph):
                    self._fresh = graph, weight
                yield graph, weight
            else:
                self._weigh(batch, weight)
                yield self._record(batch, weight), weight

    def _record(self, batch: Any, weight: int) -> Graph:
        roots = self._evaluate(batch)
        self._checks.look_at_graph(roots)
        if self._checks.needs_functions():
            self._look_at_functions(batch)
        with self._explained(roots):
            graph = self._make(roots)
        self._checks.look_at_reach(graph.reached, roots, self._layout, self._closure)
        self._note(graph, weight)
        return graph

    def _keeps(self, graph: Graph) -> bool:
        """Whether the graph of a single batch is kept."""
        return True

    def _note(self, graph: Graph, weight: int) -> None:
        # A vector of losses says itself how many samples it has.
        self._checks.note(weight * graph.roots[-1].numel(), graph.value)

    def _look_at_functions(self, batch: Any) -> None:
        state = self._generators()

        def evaluate() -> tuple[Tensor, ...]:
            state.restore()
            return self._evaluate(batch)

        parameters, names = self._layout.parameters, self._checks.names()
        once = self._first_order
        for part, is_second in ((slice(once), False), (slice(once, None), True)):
            if survey(self._evaluate(batch)[part]).functions:
                look_at_functions(
                    lambda p=part: evaluate()[p],
                    parameters,
                    names,
                    is_second=is_second,
                )
        state.restore()
        self._checks.functions_known = True

    def _weigh(self, batch: Any, weight: int) -> None:  # noqa: B027
        """One of several batches, before it is recorded: is that what it weighs?"""

    @property
    def _first_order(self) -> int:
        """How many of the roots are differentiated by parameters only once."""
        return 1

    def _explained(self, roots: Sequence[Tensor]):
        return explained(roots, self._checks.names(), self._closure)

    def _is_kept(self) -> bool:
        """Whether there is a kept graph, of what is there now."""
        if self._kept is None:
            return False
        if self._kept is self._compared:
            return True
        if self._kept.snapshot.is_current():
            self._compared = self._kept if self._is_held else None
            return True
        if not self._kept.snapshot.is_same_kind:
            self._checks.forget()
        self._kept = None
        return False

    def _follow_parameters(self) -> None:
        """Take in parameters put in the place of others; ValueError where none fits."""
        if not self._layout.is_of(self._model):
            self._layout = self._layout.following(self._model)
            self._kept = None

    def _generators(self) -> RandomState:
        return RandomState(self._layout.device, self._batches.generators)

    def _versions(self) -> list[int]:
        tensors = [*self._model.parameters(), *self._model.buffers()]
        return [0 if t.is_inference() else local(t)._version for t in tensors]

    def _ask(self, closure: Callable[..., Any], *arguments: Any) -> Any:
        """What a closure returns; ValueError if it makes gradients by itself."""
        device, dtype = self._layout.device.type, self._low
        is_low = dtype is not None
        low = torch.autocast(device, dtype, enabled=is_low)
        # Weights may have moved since they were cast for the last evaluation.
        torch.clear_autocast_cache()
        with self._rewrites.remembering(), low if is_low else contextlib.nullcontext():
            value = closure(*arguments)
        if any(p.is_leaf and p.grad is not None for p in self._model.parameters()):
            raise ValueError(
                f"{self._closure} calls backward itself: gradients of the parameters "
                "appeared (they were removed again). Return the loss, and leave its "
                "derivatives to the operator."
            )
        return value

    @property
    def _closure(self) -> str:
        return "loss(model, batch)"

    def _says_the_same(self) -> bool:
        """Whether the loss of the single batch is what it was when recorded."""
        assert self._kept is not None
        with self._context():
            self._random.restore()
            batch, _ = next(iter(self._batches))
            loss = self._evaluate(batch)[-1].detach().mean()
        return self._checks.is_same_loss(float(loss), float(self._kept.graph.value))
