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
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..._dtypes import accumulation_dtype
from ..._memory import return_freed_memory
from ..graph.compiled import NODE as COMPILED
from ..graph.tape import Tape
from .decode import Evidence, Measurement, Scheme, graph_noise, weigh
from .gates import Gates

__all__ = [
    "Fingerprints",
    "Measurements",
    "Passes",
    "decode",
    "leaves_below",
    "measure_samples",
]

_MATRICES = 3  # dims of a batch of them
# Elements of all gradients watched, above which a pass leaves holes that matter.
_LARGE = 1 << 22
_PIECE = 1 << 20  # elements looked at together

Weighting = Callable[[Tensor], list]  # weights [batch] -> handles of its prehooks
Measurements = dict[int, list["Measurement | None"]]  # node -> each of its outputs


@dataclass
class Fingerprints:
    """Row norms of one node in each pass; notes them when called as a hook.

    Of each output the sums of |g| over the last dim, and over all but the last where
    that may hold the batch. Multiplying a row by a power of two does the same to its
    sum, to the last bit, and unlike a sum of squares it cannot underflow. Nothing as
    large as the gradient is kept, and nothing leaves its device.

    Args:
        batch: number of samples.
        is_fine: whether rows are those of the last dim in any case. Else of images and
            the like, which have two dims more, all of a channel is one row.
    """

    batch: int
    is_fine: bool = True
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    passes: list[list[tuple[Tensor, Tensor | None] | None]] = field(
        default_factory=list
    )

    def __call__(self, grads: tuple[Tensor | None, ...]) -> None:
        """Note the gradients of one pass."""
        self.shapes = [() if g is None else tuple(g.shape) for g in grads]
        with torch.no_grad():
            self.passes.append([None if g is None else self._norms(g) for g in grads])

    def is_coarse(self, output: int) -> bool:
        """Whether rows of an output are whole channels."""
        return not self.is_fine and len(self.shapes[output]) > _MATRICES

    def _norms(self, g: Tensor) -> tuple[Tensor, Tensor | None]:
        g = g.detach()
        dtype = accumulation_dtype(g.dtype)
        if g.dim() < 2:
            return g.abs().to(dtype), None
        if not self.is_fine and g.dim() > _MATRICES:
            return _sums(g, tuple(range(2, g.dim())), dtype), None
        last = _sums(g, (-1,), dtype)
        if g.shape[-1] == 0 or g.shape[-1] % self.batch:
            return last, None
        return last, _sums(g, tuple(range(g.dim() - 1)), dtype)


def _sums(g: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Sums of |g| over some dims.

    On a CPU in pieces that stay in the cache: norms of short rows take ten times as
    long there, and absolute values of all elements as much memory again.
    """
    if g.device.type != "cpu":
        return torch.linalg.vector_norm(g, 1, dim=dims, dtype=dtype)
    rows = max(1, _PIECE * len(g) // max(1, g.numel()))
    sums = [part.abs().sum(dims, dtype=dtype) for part in g.split(rows)]
    if 0 in dims:
        return torch.stack(sums).sum(0)
    return torch.cat(sums)


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
            returns how many all of them run.
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
        """What was seen; after a second plain pass, where it takes one to tell."""
        evidence = evidence_of(self._seen, self._scheme)
        inner = (evidence_of(region.seen, self._scheme) for region in self._inner)
        every = [evidence, *inner]
        if any(e and e.is_open for found in every for es in found.values() for e in es):
            self._run([0])
            evidence = evidence_of(self._seen, self._scheme)
        return _labelled(self._seen, evidence, self._scheme)

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
        if not numbers:
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


def decode(seen: Mapping[int, Fingerprints], scheme: Scheme) -> Measurements:
    """Labels of every output of the nodes whose gradients were seen."""
    return _labelled(seen, evidence_of(seen, scheme), scheme)


def evidence_of(
    seen: Mapping[int, Fingerprints], scheme: Scheme
) -> dict[int, list[Evidence | None]]:
    """What the rows of every output say."""
    return {i: _evidence(prints, scheme) for i, prints in seen.items()}


def _labelled(
    seen: Mapping[int, Fingerprints],
    evidence: Mapping[int, list[Evidence | None]],
    scheme: Scheme,
) -> Measurements:
    noise = graph_noise(e for es in evidence.values() for e in es if e is not None)
    return {
        i: [
            _measurement(prints, output, of_output, scheme, noise)
            if _is_there(prints, output)
            else None
            for output, of_output in enumerate(evidence[i])
        ]
        for i, prints in seen.items()
    }


def _is_complete(prints: Fingerprints, scheme: Scheme) -> bool:
    return len(prints.passes) in (scheme.passes, scheme.passes + 1)


def _is_there(prints: Fingerprints, output: int) -> bool:
    """Whether every pass brought a gradient to this output."""
    return bool(prints.shapes) and all(p[output] is not None for p in prints.passes)


def _evidence(prints: Fingerprints, scheme: Scheme) -> list[Evidence | None]:
    """What the rows of each output say; None where they mix, or none came."""
    if not _is_complete(prints, scheme):
        return [None]
    return [
        weigh([p[output][0] for p in prints.passes], scheme)  # type: ignore[index]
        if _is_there(prints, output)
        else None
        for output in range(len(prints.shapes))
    ]


def _measurement(
    prints: Fingerprints,
    output: int,
    evidence: Evidence | None,
    scheme: Scheme,
    noise: float,
) -> Measurement:
    labels = weight = trailing = None
    if evidence is not None:
        labels, weight = evidence.rows(noise)
    columns = [p[output][1] for p in prints.passes]  # type: ignore[index]
    if labels is None and columns[0] is not None:
        of_columns = weigh(columns, scheme)  # type: ignore[arg-type]
        if of_columns is not None and of_columns.is_clear:
            trailing, _ = of_columns.rows(noise)
    return Measurement(prints.shapes[output], labels, trailing, weight)


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
