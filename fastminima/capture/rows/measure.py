"""Measure which sample each row of a node's output gradient belongs to.

The samples' losses are weighted by powers of two and the backward pass is run again:
a row that belongs to sample n is multiplied by exactly w_n, in every floating-point
format, because products with powers of two do not round. A row that is not has met
other samples on its way, unless the machine itself is not the same twice: `decode.py`
tells the two apart. Nothing here touches `.grad`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..._memory import return_freed_memory
from ..graph.replay import NODE as COMPILED
from ..graph.tape import Tape
from .decode import Measurement, Scheme, Votes, graph_noise
from .evidence import Measurements
from .fingerprints import Fingerprints, read_votes, votes_of
from .gates import Gates

__all__ = [
    "Passes",
    "leaves_below",
    "measure_samples",
]

# Elements of all gradients watched, above which a pass leaves holes that matter.
_LARGE = 1 << 22
_Votes = dict[int, list[Votes | None]]
Weighting = Callable[[Tensor], list]  # weights [batch] -> handles of its prehooks


@runtime_checkable
class Inner(Protocol):
    """A graph that is there in the passes only, such as that of a checkpoint."""

    seen: dict[int, Fingerprints]
    gates: Gates


class Passes:
    """The measuring passes over one graph.

    Args:
        scheme: how samples are weighted.
        weighting: hooks the given sample weights into the graph.
        backward: `backward(weights, leaves)` runs a pass that reaches `leaves`.
        gates: what is closed in this graph, and how to look behind it.
        regions: nodes that see to graphs of their own.
        inner: what is seen in those graphs, and their gates.
        to_the_end: whether a pass goes on below the last watched node.
        joint: what other ranks do too: called with a number of passes to run, it
            returns how many all of them run. Never with none: who measures nothing
            accompanies until all say so.
    """

    def __init__(
        self,
        tape: Tape,
        watched: Sequence[int],
        *,
        scheme: Scheme,
        weighting: Weighting,
        backward: Callable[[Tensor, list[Tensor]], None],
        gates: Gates,
        regions: Sequence[int] = (),
        inner: Sequence[Inner] = (),
        to_the_end: bool = False,
        joint: Callable[[int], int] = lambda passes: passes,
    ) -> None:
        self._tape, self._scheme = tape, scheme
        # Preparations of parameters mix samples anyway: they are read finely at once.
        fine = tape.is_parameter_side
        self._seen = {i: Fingerprints(scheme.batch, fine[i]) for i in watched}
        self._leaves = leaves_below(tape, [*watched, *regions])
        self._weighting, self._backward = weighting, backward
        self._gates, self._inner, self._joint = gates, inner, joint
        self._all_gates = [gates, *(region.gates for region in inner)]
        self._ends_early = not (to_the_end or regions)
        shapes = (shape for i in watched for shape in tape.shapes(i))
        self._is_large = sum(map(math.prod, shapes)) > _LARGE

    def measure(self) -> Measurements:
        """Labels of every output of the watched nodes."""
        with _repeatable(self._tape, self._leaves):
            self._look()
            while self._settle():
                self._forget()
                self._look()
            self._run(range(1, self._scheme.passes))
            measured = self._decoded()
            coarse = [i for i in self._seen if self._hides(i, measured[i])]
            if coarse:
                for i in coarse:
                    self._seen[i] = Fingerprints(self._scheme.batch)
                self._forget()
                self._run(range(self._scheme.passes))
                measured = self._decoded()
        return measured

    def _decoded(self) -> Measurements:
        """What was seen; after more passes, where it takes these to tell."""
        every = self._votes()
        if any(e.is_open for e in _listed(every)):
            self._run([0])
            every = self._votes()
            noise = [graph_noise(_listed([votes])) for votes in every]
            doubtful = (
                e.is_doubtful(of_graph)
                for votes, of_graph in zip(every, noise, strict=True)
                for e in _listed([votes])
            )
            if any(doubtful):
                self._run(range(self._scheme.passes))
                every = self._votes()
        return read_votes(self._seen, every[0], self._scheme)

    def _votes(self) -> list[_Votes]:
        """What the rows of this graph say, and those of the graphs within."""
        seen = [self._seen, *(region.seen for region in self._inner)]
        return [votes_of(of_graph, self._scheme) for of_graph in seen]

    def _hides(self, i: int, outputs: list[Measurement | None]) -> bool:
        """Whether samples may be told apart within what was read as one row."""
        prints = self._seen[i]
        return any(
            m is not None and m.is_mixed and prints.is_coarse(output)
            for output, m in enumerate(outputs)
        )

    def _look(self) -> None:
        for gates in self._all_gates:
            gates.is_looking = True
        self._run([0])
        for gates in self._all_gates:
            gates.is_looking = False

    def _settle(self) -> bool:
        settled = [gates.settle() for gates in self._all_gates]  # each of them
        return any(settled)

    def _prints(self) -> list[Fingerprints]:
        inner = (seen for region in self._inner for seen in region.seen.values())
        return [*self._seen.values(), *inner]

    def _forget(self) -> None:
        for prints in self._prints():
            prints.passes.clear()

    def _run(self, numbers: Iterable[int]) -> None:
        """The passes of those numbers, and blind ones while other ranks run more."""
        numbers = list(numbers)
        if not numbers:  # that would say that there is nothing more to come
            return
        blind = self._joint(len(numbers)) - len(numbers)
        for number in numbers:
            self._run_one(self._scheme.weights(number), self._seen)
        for _ in range(blind):
            self._run_one(self._scheme.weights(0), {})

    def _run_one(self, weights: Tensor, seen: Mapping[int, Fingerprints]) -> None:
        waiting = set(seen) if self._ends_early else None
        handles = self._gates.hooks(self._tape)  # before what weighs their gradients
        try:
            handles += self._weighting(weights)
            for i, fingerprints in seen.items():
                hook = _recorder(fingerprints, waiting, i)
                handles.append(self._tape.nodes[i].register_prehook(hook))
            self._backward(weights, self._leaves)
        except _AllSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
            if self._is_large:
                return_freed_memory()


def _listed(every: Iterable[_Votes]) -> Iterator[Votes]:
    return (e for votes in every for es in votes.values() for e in es if e is not None)


def measure_samples(tape: Tape, watched: Sequence[int], **options: Any) -> Measurements:
    """Labels of every output of the watched nodes; options as of `Passes`."""
    return Passes(tape, watched, **options).measure()


class _AllSeen(Exception):
    """Ends a pass whose last node need not run: nothing below it is of interest."""


def _recorder(
    fingerprints: Fingerprints, waiting: set[int] | None, i: int
) -> Callable[[tuple], None]:
    def record(grads: tuple[Tensor | None, ...]) -> None:
        fingerprints(grads)
        if waiting is None:
            return
        waiting.discard(i)
        if not waiting:
            raise _AllSeen

    return record


@contextmanager
def _repeatable(tape: Tape, leaves: Sequence[Tensor]) -> Iterator[None]:
    """Deterministic kernels on GPUs, where there are any: rows then grow exactly.

    (On an H100 with torch 2.11: attention by flash kernels and convolutions by cuDNN,
    not attention by cuDNN.)
    """
    is_compiled = any(name.startswith(COMPILED) for name in tape.names)
    if is_compiled or not any(leaf.is_cuda for leaf in leaves):
        yield  # compiled code runs under the setting that it was compiled with
        return
    was = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    # Not through torch.backends.cudnn, whose flags may be closed to assignment.
    benchmarks, deterministic = (
        torch._C._get_cudnn_benchmark(),
        torch._C._get_cudnn_deterministic(),
    )
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        settings.fill_uninitialized_memory = False
        torch._C._set_cudnn_benchmark(False)
        torch._C._set_cudnn_deterministic(True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._C._set_cudnn_deterministic(deterministic)
        torch._C._set_cudnn_benchmark(benchmarks)
        settings.fill_uninitialized_memory = fills
        torch.use_deterministic_algorithms(was, warn_only=only_warned)


def leaves_below(tape: Tape, watched: Iterable[int]) -> list[Tensor]:
    """Few and small leaves such that every watched node lies above one of them."""
    rank = {i: r for r, i in enumerate(tape.leaves_first)}
    covered: set[int] = set()
    leaves = []
    for i in sorted(watched, key=rank.__getitem__):
        if i in covered:
            continue
        below = (j for j in tape.below(i) if tape.is_leaf(j))
        leaf = min(below, key=lambda j: tape.nodes[j].variable.numel())
        leaves.append(tape.nodes[leaf].variable)
        covered.update(tape.above(leaf, enters=lambda j: j not in covered))
    return leaves
